"""The arithmetic of one step and the calendar of a run, against plain formulas: no run is long enough to learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bellbox.errors import BellboxError
from bellbox.runs.config import (
    BatchSection,
    CewtSection,
    DistillSection,
    MecSection,
    OptimizerSection,
    PhasesSection,
    QuantizationSection,
    ScheduleSection,
)
from bellbox.runs.metrics import read_records
from bellbox.training import TrainConfig, Trainer, arithmetic
from bellbox.training import loop as module

Tiny = Callable[..., TrainConfig]
FULL = QuantizationSection(method="none")


def all_records(config: TrainConfig, kind: str) -> list[dict[str, Any]]:
    found = read_records(Path(config.folder) / "metrics.jsonl")
    return [record for record in found if record["kind"] == kind]


@pytest.mark.parametrize("clip", [0.0, 0.05, 100.0])
@pytest.mark.parametrize("micro", [2, 4])
def test_a_step_is_adamws_on_the_clipped_mean_of_the_gradients(tiny: Tiny, clip: float, micro: int) -> None:
    optimizer = OptimizerSection(lr=3e-3, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.2, clip=clip)
    config = tiny(steps=1, quantization=FULL, optimizer=optimizer, batch=BatchSection(64, micro))
    trainer = Trainer(config, show=False)
    before = {name: p.detach().double().clone() for name, p in trainer.model.named_parameters()}
    inputs, targets = trainer.task.batches.at(0)  # pyright: ignore[reportAttributeAccessIssue]
    loss = F.cross_entropy(trainer.model(inputs).flatten(0, 1), targets.flatten())
    names, parameters = zip(*trainer.model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    trainer.run()

    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    (record,) = all_records(config, "train")
    assert record["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert record["perplexity"] == pytest.approx(math.exp(float(loss.detach())), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert (record["step"], record["tokens"], record["phase"], record["lr"]) == (1, 64, 0, 3e-3)
    assert not {"divergence", "mec"} & record.keys()
    factor = min(1.0, clip / norm) if clip else 1.0
    assert clip != 0.05 or factor < 1
    for name, parameter in trainer.model.named_parameters():
        g = gradients[name].double() * factor
        # After one step both moments, freed of their bias, are the gradient and its square.
        decay = 0.2 if name.endswith("weight") and parameter.dim() == 2 and "embed" not in name else 0.0
        expected = before[name] * (1 - 3e-3 * decay) - 3e-3 * g / (g.abs() + 1e-4)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_the_objective_mixes_the_data_the_teacher_and_the_entropy_term(tiny: Tiny) -> None:
    trainer = Trainer(tiny(quantization=FULL), show=False)
    inputs, targets = trainer.task.micro_batches(0)[0]
    logits = trainer.model(inputs).detach().double()
    loss = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    alone = trainer._losses(inputs, targets)
    assert alone.tolist() == pytest.approx([loss, loss, 0.0, 0.0], rel=1e-5)

    wanted = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    trainer.teacher = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        weight=0.25, temperature=2.0, logits=lambda x: wanted
    )
    p, q = (wanted.double() / 2).softmax(-1), (logits / 2).softmax(-1)
    apart = 4 * float((p * (p.log() - q.log())).sum(-1).mean())
    found = trainer._losses(inputs, targets)
    mixed = 0.75 * loss + 0.25 * apart
    assert found.tolist() == pytest.approx([mixed, loss, apart, 0.0], rel=1e-4)

    trainer.config = dataclasses.replace(trainer.config, mec=MecSection(weight=0.5))
    trainer.entropy = SimpleNamespace(value=lambda: torch.tensor(-0.3))  # pyright: ignore[reportAttributeAccessIssue]
    found = trainer._losses(inputs, targets)
    assert found.tolist() == pytest.approx([mixed - 0.15, loss, apart, -0.3], rel=1e-4)
    assert found[0].requires_grad


def test_what_is_recorded_evaluated_and_saved_when(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10_000))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    config = tiny(steps=7, log_every=3, eval_every=4, checkpoint_every=5, quantization=FULL)
    trainer, saved = Trainer(config, show=False), list[int]()
    save = trainer.checkpoints.save
    monkeypatch.setattr(
        trainer.checkpoints, "save", lambda state, *rest: (saved.append(state.step), save(state, *rest))
    )
    result = trainer.run()
    trained, evaluated = all_records(config, "train"), all_records(config, "eval")
    assert [record["step"] for record in trained] == [3, 6, 7]
    assert [record["step"] for record in evaluated] == [4, 7]
    assert [record["tokens"] for record in trained] == [192, 384, 448]
    improved = [4] + [7] * (evaluated[1]["loss"] < evaluated[0]["loss"])
    assert saved == sorted({*improved, 5, 7})
    # Each step, evaluation and saving takes a second by this clock; after 4 steps and after 5 it saves.
    assert [record["tokens_per_s"] for record in trained] == [64.0] * 3
    assert [record["seconds"] for record in trained] == [3.0, 9.0, 10.0]
    assert [record["seconds"] for record in evaluated] == [5.0, 11.0]
    assert (result.step, result.total_steps, result.tokens) == (7, 7, 448)
    assert result.finished
    assert result.validation is not None
    assert result.validation["step"] == 7
    assert result.best_loss == min(record["loss"] for record in evaluated)


@pytest.mark.parametrize("every", [0, 1, 3])
def test_rates_follow_the_schedule_and_projections_their_interval(tiny: Tiny, every: int) -> None:
    config = tiny(
        steps=7, eval_every=7, checkpoint_every=7, schedule=ScheduleSection(0.5, 0.2, 0.4),
        optimizer=OptimizerSection(lr=2e-3, cewt=CewtSection(every=every)),
    )  # fmt: skip
    trainer, calls = Trainer(config, show=False), list[tuple[float, bool]]()
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda lr, ball, project: (calls.append((lr, project)), step(lr, ball, project))[
        1
    ]
    trainer.run()
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        reference, max_lr=2e-3, total_steps=7, pct_start=0.5, div_factor=5, final_div_factor=0.5,
        cycle_momentum=False,
    )  # fmt: skip
    expected = []
    for _ in range(7):
        expected.append(cycle.get_last_lr()[0])
        reference.step()
        if len(expected) < 7:
            cycle.step()
    assert [lr for lr, _ in calls] == pytest.approx(expected)
    projected = [i + 1 for i, (_, project) in enumerate(calls) if project]
    assert projected == {0: [], 1: [1, 2, 3, 4, 5, 6, 7], 3: [3, 6, 7]}[every]


def test_a_teacher_is_counted_by_its_share_in_a_run_too(tiny: Tiny) -> None:
    teacher = tiny("teacher", steps=1, quantization=FULL)
    Trainer(teacher, show=False).run()
    share = DistillSection(teacher.folder, weight=0.5, temperature=2.0)
    config = tiny("student", steps=1, quantization=FULL, distill=share)
    trainer = Trainer(config, show=False)
    inputs, targets = trainer.task.batches.at(0)  # pyright: ignore[reportAttributeAccessIssue]
    expected = trainer._losses(inputs, targets).tolist()
    trainer.run()
    (record,) = all_records(config, "train")
    assert record["loss"] == pytest.approx(expected[1], rel=1e-5)
    assert record["divergence"] == pytest.approx(expected[2], rel=1e-4)
    assert expected[0] == pytest.approx((expected[1] + expected[2]) / 2, rel=1e-5)


def test_a_precision_that_was_chosen_once_stays_the_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(steps=1, precision="auto", quantization=FULL)
    monkeypatch.setattr(arithmetic, "choose_precision", lambda device: ("bf16", "it is fast here"))
    begun = Trainer(config, show=False)
    assert begun.config.precision == "bf16"
    begun.run()
    monkeypatch.setattr(arithmetic, "choose_precision", lambda device: ("fp32", "it is fast here"))
    assert Trainer(config, show=False).config.precision == "bf16"
    assert Trainer(tiny("other", steps=1, precision="auto"), show=False).config.precision == "fp32"


def test_a_phase_is_announced_with_its_first_step(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(tiny(steps=4, phases=PhasesSection(quantized=0.5))).run()
    shown = capsys.readouterr()
    lines = [line.split() for line in (shown.out + shown.err).splitlines() if "from here on" in line]
    assert [line[line.index("step") + 1] for line in lines] == ["3"]


def test_three_differences_are_named_and_no_more(tiny: Tiny) -> None:
    Trainer(tiny(steps=1, quantization=FULL), show=False).run()
    other = tiny(steps=1, seed=5, schedule=ScheduleSection(0.3, 0.02, 0.3), quantization=FULL)
    with pytest.raises(BellboxError, match="another configuration") as caught:
        Trainer(other, show=False).run()
    named = str(caught.value).partition("configuration: ")[2].partition("; choose")[0]
    assert len(named.split("; ")) == 3
