"""A running average of the weights (`torch.optim.swa_utils`), validated and loaded in place of the trained ones.

    average <- decay * average + (1 - decay) * weight        after every step; buffers are those of the model

It is saved with the optimizer's state, under the names of the model's tensors and a prefix of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bellbox.nn.tools import unique_tensors
from bellbox.quantizers.learned import LearnedQuantizer
from bellbox.runs.build import load_model_tensors

PREFIX = "average:"
COUNT = PREFIX + "updates"


class Average:
    """The averaged form of a model.

    Args:
        model: what is trained.
        decay: in [0, 1); 0 for no averaging: the average is then the model itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._trained, self._decay = model, decay
        self._averaged: AveragedModel | None = None

    @property
    def model(self) -> nn.Module:
        """What is to be judged."""
        return self._trained if self._averaged is None else self._averaged.module

    def update(self) -> None:
        """Take in the weights after a step; the first time, all of them (scales are set by then)."""
        if not self._decay:
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

    def restore(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take out what `tensors` has put in; returns the rest."""
        if self._decay and COUNT in tensors:
            self._averaged = self._make()
            load_model_tensors(self._averaged.module, averaged_tensors(tensors), "the averaged model")
            self._averaged.n_averaged.copy_(tensors[COUNT])
        return {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}

    def _make(self) -> AveragedModel:
        with torch.no_grad():
            return AveragedModel(self._trained, multi_avg_fn=get_ema_multi_avg_fn(self._decay))


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
