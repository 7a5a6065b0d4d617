"""Averages of the weights (`torch.optim.swa_utils`), validated and loaded in place of the trained ones.

    average <- decay * average + (1 - decay) * weight        after every step; buffers are those of the model

or, without a decay, the plain mean of the last steps. It is saved with the optimizer's state, under the names of the
model's tensors and a prefix of its own.

**On the hyperball** all the weights that are averaged have one norm, and their mean a smaller one. BBQ divides each row
by its RMS: the norm of a row changes no code and no output. Other methods compare weights with a learned scale, and to
them a mean that shrank is another function. The mean is not exactly Gaussian either. So it is kept as it is, for the
next step to go on from, and what is validated and loaded is settled: see `settle`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bellbox.nn.tools import unique_tensors
from bellbox.quantizers.learned import LearnedQuantizer
from bellbox.runs.build import load_model_tensors
from bellbox.runs.config import AverageSection, CewtSection
from bellbox.runs.constraint import constraint_of

PREFIX = "average:"
COUNT = PREFIX + "updates"


class Average:
    """The averaged form of a model.

    Args:
        model: what is trained.
        section: how it is averaged; None: not at all, the average is then the model itself.
        cewt: how its weights are constrained.
        steps: of the whole run.
    """

    def __init__(
        self, model: nn.Module, section: AverageSection | None, cewt: CewtSection, steps: int
    ) -> None:
        self._trained, self._section, self._cewt = model, section, cewt
        self._begins = steps if section is None else section.begins(steps)
        self._averaged: AveragedModel | None = None

    @property
    def model(self) -> nn.Module:
        """The average as it is kept; the trained model where there is none (yet)."""
        return self._trained if self._averaged is None else self._averaged.module

    @contextmanager
    def judged(self) -> Iterator[nn.Module]:
        """What is to be validated: the average, its constrained weights settled (`settle`) within."""
        if self._averaged is None:
            yield self._trained
            return
        averaged = self._averaged.module
        raw = [(weight, weight.detach().clone()) for weight in constraint_of(averaged, self._cewt).norms]
        settle(averaged, self._cewt, kept_norms(self._trained, self._cewt))
        try:
            yield averaged
        finally:
            with torch.no_grad():
                for weight, was in raw:
                    weight.copy_(was)

    def update(self, step: int) -> None:
        """Take in the weights after a step; the first time, all of them (scales are set by then).

        Args:
            step: its number, from 0.
        """
        if self._section is None or step < self._begins:
            return
        if self._averaged is None:
            self._averaged = self._make()
        _set_what_was_unset(self._averaged.module, self._trained)
        self._averaged.update_parameters(self._trained)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; empty without an average."""
        if self._averaged is None:
            return {}
        found = {
            PREFIX + name: value.detach() for name, value in unique_tensors(self._averaged.module).items()
        }
        return {**found, COUNT: self._averaged.n_averaged.detach().clone()}

    def restore(self, tensors: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Take out what `tensors` has put in, of a run that has done `steps`; returns the rest.

        An average of steps that no longer count, since the run now goes on for longer, is let go.
        """
        if COUNT in tensors and steps > self._begins:
            self._averaged = self._make()
            load_model_tensors(self._averaged.module, averaged_tensors(tensors), "the averaged model")
            self._averaged.n_averaged.copy_(tensors[COUNT])
        return {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}

    def _make(self) -> AveragedModel:
        assert self._section is not None
        decay = self._section.decay
        with torch.no_grad():
            return AveragedModel(
                self._trained, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay)
            )


def kept_norms(model: nn.Module, section: CewtSection) -> dict[str, Tensor]:
    """The norms of the constrained weights of a model, fp64 `[]`, by the parameter's name."""
    norms = constraint_of(model, section).norms
    return {name: norms[weight] for name, weight in model.named_parameters() if weight in norms}


def settle(model: nn.Module, section: CewtSection, norms: dict[str, Tensor]) -> None:
    """Bring a mean of constrained weights, in place, to where weights are kept.

    Points of a sphere have their mean within it. So each constrained weight gets back its norm, and where the run's
    last weights are projected, exactly Gaussian values.

    Args:
        model: whose weights are averages.
        section: how those were constrained that were averaged.
        norms: `kept_norms` of the model that was trained.
    """
    constraint_of(model, section, norms=norms).settle(project=section.until == 1)


@contextmanager
def settled(model: nn.Module, section: CewtSection) -> Iterator[None]:
    """Around the loading of averages into a model that holds the trained weights: see `settle`."""
    norms = kept_norms(model, section)
    yield
    settle(model, section, norms)


@torch.no_grad()
def _set_what_was_unset(averaged: nn.Module, trained: nn.Module) -> None:
    """An average with NaN is NaN for ever: scales that are set late (an expert's) begin with their first value."""
    for ours, theirs in zip(averaged.modules(), trained.modules(), strict=True):
        if isinstance(ours, LearnedQuantizer) and isinstance(theirs, LearnedQuantizer) and not ours.is_set:
            given = theirs.own_scales()
            for name, scale in ours.own_scales().items():
                scale.copy_(given[name])


def averaged_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged model's own among those of a checkpoint; empty where there was no average."""
    names = (name for name in tensors if name.startswith(PREFIX) and name != COUNT)
    return {name.removeprefix(PREFIX): tensors[name] for name in names}
