"""SOAP (arXiv 2409.11321), AdamW in the eigenbases of Shampoo's preconditioner, by the package `pytorch-optimizer`.

It adds its update to the weights, which is all that CEWT asks of an optimizer; its first step only looks at the
gradients, and moves nothing. Its state has lists and numbers where that of others has tensors. A checkpoint holds
tensors by name, so `flat` and `put` go between the two:

    exp_avg, exp_avg_sq      in the eigenbasis, the latter
    GG.0, GG.1, Q.0, Q.1     the preconditioner of rows and of columns, and its eigenvectors
    step                     which the package counts for a group
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bellbox.errors import require
from bellbox.runs.config import OptimizerSection

_LISTS = "GG", "Q"


def soap(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    """The package's optimizer.

    Args:
        groups: of matrices, with their weight decay.
        section: its numbers; as of AdamW.

    Raises:
        BellboxError: the package is not installed.
    """
    package = require("pytorch_optimizer", "soap")
    return package.SOAP(groups, lr=section.lr, betas=tuple(section.betas), eps=section.eps)


def flat(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What is remembered of a matrix, as tensors by name; empty before the first step."""
    state = optimizer.state.get(parameter)
    if not state:
        return {}
    found: dict[str, Tensor] = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    for name in _LISTS:  # an axis that is too long for a preconditioner has an empty list
        found |= {f"{name}.{axis}": each for axis, each in enumerate(state[name]) if len(each)}
    return {**found, "step": torch.tensor(float(_group(optimizer, parameter)["step"]))}


def put(optimizer: torch.optim.Optimizer, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    """The inverse of `flat`.

    Raises:
        KeyError: a tensor is missing.
    """
    group = _group(optimizer, parameter)
    group["step"] = int(tensors["step"])
    shampoo_beta = group["shampoo_beta"]
    optimizer.state[parameter] = {
        "exp_avg": tensors["exp_avg"],
        "exp_avg_sq": tensors["exp_avg_sq"],
        **{name: [tensors.get(f"{name}.{axis}", []) for axis in range(parameter.dim())] for name in _LISTS},
        "precondition_frequency": group["precondition_frequency"],
        "shampoo_beta": group["betas"][1] if shampoo_beta is None else shampoo_beta,
    }


def shape_of(key: str, parameter: Tensor) -> tuple[int, ...]:
    """The shape that a tensor of `flat` has, which is not a number."""
    name, _, axis = key.partition(".")
    if name not in _LISTS:
        return tuple(parameter.shape)
    size = parameter.shape[int(axis)]
    return size, size


def _group(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
