"""Packed linear layers: rows are coded, then multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bellbox.core.grid import Grid
from bellbox.errors import BellboxError
from bellbox.ops.backends.triton.launch.coding import Weights, arranged, code_rows
from bellbox.ops.backends.triton.launch.products import multiply
from bellbox.ops.packed_linear import check
from bellbox.ops.weight_layout import check_packed


def packed_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor, act_thresholds: Tensor,
    act_rstd: Tensor | None, act_signs: Tensor | None, in_features: int, weight_levels: int,
    weight_zero_point: float, act_zero_point: float, block: int, normalise: str, rescale: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `bellbox.ops.packed_linear`."""
    tensors = weight, weight_scale, bias, act_scale, act_thresholds, act_rstd, act_signs
    numbers = in_features, weight_levels, weight_zero_point, act_zero_point, block, normalise, rescale
    return packed_linear_group(x, [(tensors, numbers)], dtype)[0]


def packed_linear_group(
    x: Tensor, layers: Sequence[tuple[tuple[Tensor | None, ...], tuple[Any, ...]]], dtype: torch.dtype
) -> list[Tensor]:
    """Packed layers that code their common input alike, at weights of one width: it is coded once.

    Args:
        x: `[..., in_features]`.
        layers: tensors and numbers of each, in the order of the schema of `bellbox.ops.packed_linear`.
        dtype: of the results.
    """
    for tensors, numbers in layers:
        check(x, *tensors, *numbers, features=numbers[0])  # type: ignore[arg-type]
    tensors, numbers = layers[0]
    columns, _, _, zero_point, *coding = numbers
    if x.dim() == 0 or x.shape[-1] != columns:
        raise BellboxError(f"a packed layer of {columns} inputs got shape {tuple(x.shape)}, dtype {x.dtype}")
    act_scale, thresholds, rstd, signs = tensors[3:]
    assert act_scale is not None
    assert thresholds is not None
    grid = Grid(thresholds.numel() + 1, zero_point)
    weights = [_weights(*each) for each in layers]
    given = x.detach().reshape(-1, columns)
    rows = code_rows(given, weights[0], grid, act_scale, thresholds, rstd, signs, *coding)
    outs = []
    for (own, _), weight in zip(layers, weights, strict=True):
        own_scale = own[3]
        assert own_scale is not None
        out = multiply(rows._replace(act_scale=own_scale), weight, dtype)
        outs.append(out.reshape(*x.shape[:-1], weight.outputs))
    return outs


def _weights(tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> Weights:
    weight, scale, bias = tensors[:3]
    assert weight is not None
    assert scale is not None
    return Weights(weight, scale, bias, Grid(numbers[1], numbers[2]), numbers[0])


def kept_linear(
    kept: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor,
    thresholds: Sequence[float], weight_levels: int, weight_zero_point: float, act_zero_point: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `bellbox.ops.kept`."""
    check_packed(weight, weight_scale.numel(), kept.shape[1], weight_levels)
    if row_scale.numel() not in (1, len(kept)) or act_scale.numel() != 1:
        raise BellboxError(f"{tuple(row_scale.shape)} scales of rows do not fit {len(kept)} rows")
    if bias is not None and bias.numel() != weight_scale.numel():
        raise BellboxError(f"a bias of {bias.numel()} numbers does not fit {weight_scale.numel()} outputs")
    weights = Weights(weight, weight_scale, bias, Grid(weight_levels, weight_zero_point), kept.shape[1])
    grid = Grid(len(thresholds) + 1, act_zero_point)
    return multiply(arranged(kept, row_scale, weights, grid, act_scale, thresholds), weights, dtype)
