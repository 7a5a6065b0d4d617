"""Steps whose loss is not finite: the run ends, or leaves them out and counts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.runs.checkpoint import Checkpoints
from bellbox.runs.config import CewtSection, CheckpointSection, OptimizerSection, QuantizationSection
from bellbox.runs.metrics import read_records
from bellbox.training import TrainConfig, Trainer
from bellbox.training.loop import MOST_SKIPPED

Tiny = Callable[..., TrainConfig]


def poisoned(config: TrainConfig, steps: set[int]) -> Trainer:
    """A run in which the batches of some steps (from 0) give a loss that is NaN, by what the model makes of them."""
    trainer = Trainer(config, show=False)
    embedding = trainer.model.get_submodule("model.embed_tokens")

    def poison(_: torch.nn.Module, __: object, output: Tensor) -> Tensor:
        return output * float("nan") if trainer.model.training and trainer.state.step in steps else output

    embedding.register_forward_hook(poison)
    return trainer


def test_by_default_the_run_ends_and_names_the_layer(tiny: Tiny) -> None:
    with pytest.raises(
        BellboxError, match=r"step 3: the loss is nan: .*embed_tokens.*step-00000002"
    ) as caught:
        poisoned(tiny(steps=6), {2}).run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("granularity", ["token", "ema"])
def test_a_step_is_left_out_and_nothing_of_it_stays(tiny: Tiny, granularity: str) -> None:
    section = QuantizationSection(granularity=granularity)  # pyright: ignore[reportArgumentType]
    config = tiny(steps=6, checkpoint_every=1, nonfinite="skip", quantization=section)
    result = poisoned(config, {2, 4}).run()
    assert result.finished
    last = Checkpoints(Path(config.folder) / "checkpoints").last()
    assert last is not None
    assert last.state.skipped == 2
    assert all(
        torch.isfinite(t.float()).all() for t in last.model_tensors().values() if t.is_floating_point()
    )
    assert all(torch.isfinite(t).all() for t in last.optimizer_tensors().values())
    records = [r for r in read_records(Path(config.folder) / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in records] == [1, 2, 4, 6]
    assert [r.get("skipped", 0) for r in records] == [0, 0, 1, 2]
    # AdamW has stepped four times, and with the batches of the other steps.
    steps = {int(t) for name, t in last.optimizer_tensors().items() if name.endswith("/step")}
    assert steps == {4}


def test_running_statistics_forget_the_batch(tiny: Tiny) -> None:
    trainer = poisoned(tiny(steps=4, nonfinite="skip"), {1})
    embedding, norm = trainer.model.get_submodule("model.embed_tokens"), torch.nn.BatchNorm1d(32)
    embedding.add_module("norm", norm)
    embedding.register_forward_hook(lambda _, __, output: (norm(output.flatten(0, 1)), output)[1])
    trainer.run()
    assert norm.running_mean is not None
    assert torch.isfinite(norm.running_mean).all()


def test_weights_stay_as_they_were(tiny: Tiny) -> None:
    config = tiny(steps=6, checkpoint_every=1, checkpoint=CheckpointSection(keep=6), nonfinite="skip")
    poisoned(config, {2}).run()
    checkpoints = Checkpoints(Path(config.folder) / "checkpoints")
    before, after, later = (checkpoints.at(step).model_tensors() for step in (2, 3, 4))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not all(torch.equal(later[name], value) for name, value in before.items())


def test_constrained_weights_are_still_made_gaussian_when_that_is_due(tiny: Tiny) -> None:
    config = tiny(steps=4, nonfinite="skip", optimizer=OptimizerSection(cewt=CewtSection(every=16)))
    trainer = poisoned(config, {3})
    projected: list[int] = []
    assert trainer.optimizer.cewt is not None
    trainer.optimizer.cewt.project = lambda: projected.append(trainer.state.step)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.run()
    assert projected == [3]


def test_many_in_a_row_end_the_run_all_the_same(tiny: Tiny) -> None:
    config = tiny(steps=40, nonfinite="skip")
    with pytest.raises(BellboxError, match=rf"step {2 + MOST_SKIPPED + 1}: the loss is nan"):
        poisoned(config, set(range(2, 40))).run()
