"""Codebooks that are fitted anew while a run trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers
from bellbox.runs.config import OptimizerSection, PhasesSection, QuantizationSection
from bellbox.runs.metrics import WALL_CLOCK, read_records
from bellbox.training import TrainConfig, Trainer, load_run, train

Tiny = Callable[..., TrainConfig]


def kmeans(**options: bool | float | str) -> QuantizationSection:
    return QuantizationSection(method="kmeans", bits=2, weight_only="float", options=options)


def centroids(trainer: Trainer) -> list[Tensor]:
    state = trainer.model.state_dict()
    return [t.clone() for name, t in state.items() if name.endswith("centroids")]


class Watched(Trainer):
    """Writes down the codebooks after each step; stops after some."""

    stops: tuple[int, ...] = ()

    def _train_step(self) -> None:
        super()._train_step()
        self.__dict__.setdefault("seen", []).append(centroids(self))
        if self.state.step in self.stops and self.state.step != self.saved_step:
            self.signals.received = 15


@pytest.mark.parametrize("fisher", [False, True])
def test_codebooks_change_in_the_steps_that_they_are_due_in(tiny: Tiny, fisher: bool) -> None:
    trainer = Watched(tiny(steps=7, quantization=kmeans(refit_every=3, fisher=fisher)), show=False)
    first = centroids(trainer)
    trainer.run()
    moved = [
        not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        for before, after in zip([first, *trainer.seen], trainer.seen, strict=False)  # type: ignore[attr-defined]
    ]
    assert moved == [False, False, True, False, False, True, False]
    for _, layer in quantized_layers(trainer.model):
        assert layer.weight_quantizer is not None
        found = trainer.optimizer.state_of(layer.stored_weight)["exp_avg_sq"]  # type: ignore[arg-type]
        layer.weight_quantizer.refit(layer.weight_rows().detach(), found if fisher else None)
    again = centroids(trainer)
    trainer.optimizer.refit_codebooks(trainer.model, 9)
    assert all(torch.equal(a, b) for a, b in zip(again, centroids(trainer), strict=True))


def test_a_run_that_was_stopped_between_fits_ends_with_the_same_bits(tiny: Tiny) -> None:
    settings = {
        "steps": 8,
        "quantization": kmeans(refit_every=2, fisher=True),
        "phases": PhasesSection(quantized=0.7),
        "eval_every": 4,
    }
    whole, pieces = tiny("whole", **settings), tiny("pieces", **settings)
    train(whole, show=False)
    for stop in (4, 7):
        trainer = Watched(pieces, show=False)
        trainer.stops = (stop,)
        assert not trainer.run().finished
    assert train(pieces, show=False).finished
    ours, theirs = (load_run(each.folder).model.state_dict() for each in (whole, pieces))
    assert any(name.endswith("centroids") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = [
        [{k: v for k, v in r.items() if k not in WALL_CLOCK} for r in read_records(Path(each.folder) / "metrics.jsonl")]
        for each in (whole, pieces)
    ]  # fmt: skip
    assert kept[0] == kept[1]


def test_muon_keeps_no_squared_gradients_and_a_run_that_needs_them_is_refused_at_once(tiny: Tiny) -> None:
    config = tiny(optimizer=OptimizerSection(kind="muon"), quantization=kmeans(refit_every=2, fisher=True))
    with pytest.raises(BellboxError, match="muon, which keeps no squared gradients of matrices"):
        Trainer(config, show=False)
    for options in ({"refit_every": 2}, {"fisher": True}):  # neither needs them
        Trainer(dataclasses.replace(config, quantization=kmeans(**options)), show=False)
