from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from bellbox.errors import BellboxError
from bellbox.models import build, preset, save_hf
from bellbox.runs.config import DistillSection, OptimizerSection, QuantizationSection
from bellbox.runs.metrics import WALL_CLOCK, read_records
from bellbox.training import TrainConfig, Trainer, load_run, train
from bellbox.training.distill import divergence

Tiny = Callable[..., TrainConfig]


def records(config: TrainConfig, kind: str = "train") -> list[dict[str, Any]]:
    found = read_records(Path(config.folder) / "metrics.jsonl")
    return [
        {k: v for k, v in record.items() if k not in WALL_CLOCK} for record in found if record["kind"] == kind
    ]


@pytest.fixture(scope="module")
def teacher(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in full precision that has learned something."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    config = dataclasses.replace(
        tiny_run.config(tokens, folder), steps=60, eval_every=60, checkpoint_every=60,
        quantization=QuantizationSection(method="none"), optimizer=OptimizerSection(lr=2e-2),
    )  # fmt: skip
    train(config, show=False)
    return folder


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_the_formula(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.detach().double() / temperature).softmax(-1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    found = divergence(student, teacher, temperature)
    assert found.item() == pytest.approx(float(expected), rel=1e-5)
    found.backward()
    assert student.grad is not None
    # d/ds T^2 KL = T (q - p), over the 6 positions of the mean.
    assert torch.allclose(student.grad.double(), temperature * (q - p) / 6, atol=1e-6)
    assert float(divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)
    assert torch.equal(divergence(student, teacher), divergence(student, teacher, 1.0))


def test_the_student_comes_nearer_to_its_teacher(tiny: Tiny, teacher: Path) -> None:
    distill, optimizer = DistillSection(str(teacher), weight=1.0), OptimizerSection(lr=1e-2)
    config = tiny(steps=40, eval_every=40, distill=distill, optimizer=optimizer)
    train(config, show=False)
    lines = records(config)
    assert lines[-1]["divergence"] < 0.7 * lines[0]["divergence"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_loss_that_is_recorded_is_that_of_the_text(tiny: Tiny, teacher: Path) -> None:
    plain, taught = tiny("plain", steps=1), tiny("taught", steps=1, distill=DistillSection(str(teacher)))
    train(plain, show=False)
    train(taught, show=False)
    assert records(taught)[0]["loss"] == records(plain)[0]["loss"]
    assert "divergence" not in records(plain)[0]
    assert records(taught)[0]["grad_norm"] != records(plain)[0]["grad_norm"]


def test_a_run_in_pieces_equals_a_run_in_one(tiny: Tiny, teacher: Path) -> None:
    section = DistillSection(str(teacher), weight=0.7, temperature=2.0)
    whole, pieces = tiny("whole", steps=5, distill=section), tiny("pieces", steps=5, distill=section)
    train(whole, show=False)

    class Cut(Trainer):
        def _train_step(self) -> None:
            super()._train_step()
            if self.state.step == 3 and self.saved_step != 3:
                self.signals.received = 15

    assert Cut(pieces, show=False).run().step == 3
    assert train(pieces, show=False).finished
    assert records(whole) == records(pieces)
    ours, theirs = load_run(whole.folder).model.state_dict(), load_run(pieces.folder).model.state_dict()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_hugging_face_folder_teaches_too(tiny: Tiny, tmp_path: Path, teacher: Path) -> None:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    folder = tmp_path / "hf"
    save_hf(build(preset("tiny", vocab_size=270, **shape), seed=3), folder)
    (folder / "tokenizer.json").write_text((teacher / "tokenizer.json").read_text())
    config = tiny(steps=2, distill=DistillSection(str(folder)))
    train(config, show=False)
    assert records(config)[-1]["divergence"] > 0


def test_another_teacher_than_at_the_start_is_refused(tiny: Tiny, tmp_path: Path, teacher: Path) -> None:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    folder = tmp_path / "hf"
    config = tiny(steps=4, distill=DistillSection(str(folder)))
    for seed in (3, 4):
        save_hf(build(preset("tiny", vocab_size=270, **shape), seed=seed), folder)
        (folder / "tokenizer.json").write_text((teacher / "tokenizer.json").read_text())
        if seed == 3:
            train(config, show=False)
    with pytest.raises(BellboxError, match=r"is not what .* was begun with"):
        train(config, show=False)


def test_a_teacher_that_does_not_fit_is_one_line(tiny: Tiny, tmp_path: Path, teacher: Path) -> None:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    folder = tmp_path / "hf"
    cases: list[tuple[dict[str, int], str]] = [
        ({"vocab_size": 300}, "has a vocabulary of 300, the student of 270"),
        ({"vocab_size": 270, "max_position_embeddings": 8}, "takes 8 tokens, data.context is 16"),
    ]
    for changes, message in cases:
        save_hf(build(preset("tiny", **shape, **changes), seed=0), folder)
        (folder / "tokenizer.json").write_text((teacher / "tokenizer.json").read_text())
        with pytest.raises(BellboxError, match=message):
            Trainer(tiny(distill=DistillSection(str(folder))), show=False)
    with pytest.raises(BellboxError, match=r"distill.teacher: .*nowhere.*: no such folder"):
        Trainer(tiny(distill=DistillSection(str(tmp_path / "nowhere"))), show=False)
    with pytest.raises(BellboxError, match=r"distill.weight is 0, must be in \(0, 1\]"):
        tiny(distill=DistillSection(str(teacher), weight=0)).check()
