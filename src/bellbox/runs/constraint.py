"""CEWT as a run's configuration asks for it: around its optimizers, or on weights alone, to settle averages of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bellbox.optim import CEWT, constrained_weights, head_weights
from bellbox.runs.config import CewtSection


def constraint_of(
    model: nn.Module,
    section: CewtSection,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    norms: Mapping[str, Tensor] | None = None,
    at_once: bool = False,
) -> CEWT:
    """The constraint of a model's weights; of none where nothing is constrained.

    Args:
        model: prepared.
        section: of the run.
        optimizers: which train the weights; none for a model that is as it is.
        norms: by the parameter's name, what each weight keeps; those that the weights have where None.
        at_once: whether the weights are projected now.
    """
    if not section.every:
        return CEWT([], {})
    heads = head_weights(model) if section.rule == "published" else []
    named = norms or {}
    known: dict[Tensor, Tensor] = {p: named[name] for name, p in model.named_parameters() if name in named}
    weights = constrained_weights(model)
    return CEWT(optimizers, weights, section.hyperball, norms_only=heads, at_once=at_once, norms=known)
