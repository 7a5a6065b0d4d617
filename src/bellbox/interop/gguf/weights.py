"""Weights for GGUF: the codes, grid and scales of a layer, written as the type of block that holds them.

A GGUF file knows no rotation of inputs and no table of one's own values: a weight that needs either is refused, and the
message says what to train instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bellbox.core.grid import Grid
from bellbox.core.table import TableCodes
from bellbox.errors import BellboxError, require
from bellbox.interop.gguf.block_types import BLOCK_TYPES, BlockType, Fit, natural_type
from bellbox.nn.binarized_linear import BinarizedLinear
from bellbox.nn.coded import CodedLayer
from bellbox.nn.compact import Compact
from bellbox.nn.packed import PackedLayer
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.quantized_table import QuantizedTable
from bellbox.nn.weight_only import WeightOnlyMatrix

_SMALLEST_HALF, _NORMAL_HALF, _LARGEST_HALF = 2.0**-24, 2.0**-14, 65504.0


@dataclass(frozen=True)
class Coded:
    """A weight of integers: `level(code) * scale`."""

    codes: np.ndarray
    """uint8 `[rows, columns]`."""
    grid: Grid
    scales: np.ndarray
    """fp32 `[rows, groups]`: what one level is worth in each of so many equal parts of a row."""

    def rows(self, order: np.ndarray) -> Coded:
        """With rows in another order, or some of them."""
        return Coded(self.codes[order], self.grid, self.scales[order])


@dataclass(frozen=True)
class Written:
    """A tensor as it goes into the file."""

    type: str
    """GGUF's name of the type."""
    data: np.ndarray
    """Floats of that type (bf16 and blocks: bytes)."""
    natural: str | None = None
    """The narrowest type of the grid, where blocks of that do not divide the rows or it is avoided; None otherwise."""
    scale_change: float = 0.0
    """Largest relative change of a scale by its rounding to fp16; scales below fp16's normal range left out."""
    small_scales: int = 0
    """Scales below fp16's normal range, which are rounded to one unit of fp16, 6e-8, and no finer."""


def weight_of(name: str, layer: nn.Module) -> Coded | Tensor:
    """The weight of a linear layer, an embedding or a norm: integers where it has them, else its own floats.

    Raises:
        BellboxError: one that GGUF cannot hold, by its name.
    """
    if isinstance(layer, BinarizedLinear):
        raise BellboxError(
            f"{name}: binarized weights have several scales a weight, and no GGUF type holds them; export a model "
            "that was trained with levels on one grid, such as bbq or rtn with block: 1"
        )
    if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None:
        return _of_quantized(name, layer)
    if isinstance(layer, CodedLayer):
        return _of_packed(name, layer)
    if isinstance(layer, QuantizedTable):
        return _of_table(name, layer.codes())
    if isinstance(layer, Compact) and layer.coding is not None:
        return _of_table(name, layer.codes())
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not _is_its_weight(layer):
        raise BellboxError(
            f"{name}: is a {type(layer).__name__}, of which more than its weight may count (an adapter does: merge it "
            "first), and a GGUF file has no place for more"
        )
    return weight.detach().clone()  # a rotated one is decoded here


def _is_its_weight(layer: nn.Module) -> bool:
    """Whether a module computes by its weight alone: torch's own layers, ours, and norms."""
    if isinstance(layer, QuantizedLayer | Compact):
        return True
    plain = (nn.Linear, nn.Embedding)
    if isinstance(layer, plain):
        return any(type(layer).forward is kind.forward for kind in plain)
    return type(layer).__name__.endswith("Norm")


@torch.no_grad()
def _of_quantized(name: str, layer: QuantizedLayer) -> Coded:
    quantizer, rotating = layer.weight_quantizer, layer.rotating_quantizer
    assert quantizer is not None
    assert rotating is not None
    _require_unrotated(name, rotating.block, rotating.signs is not None)
    if quantizer.table() is not None:
        raise _no_grid(name)
    if (why := quantizer.why_not_packed()) is not None:
        raise BellboxError(f"{name}: its weight cannot be written as integers: {why}")
    codes, row_scales = layer.encoded_weight()
    scales = quantizer.packed_scales(layer.weight_rows().detach(), row_scales)
    return _coded(name, codes, quantizer.levels.grid, scales)


@torch.no_grad()
def _of_packed(name: str, layer: CodedLayer) -> Coded:
    if isinstance(layer, PackedLayer):
        block = layer.coding.block
    elif isinstance(layer, WeightOnlyMatrix):
        block = layer.block
        if layer.weight_table is not None:
            raise _no_grid(name)
    else:
        raise BellboxError(f"{name}: a {type(layer).__name__} is none of the layers that GGUF could hold")
    _require_unrotated(name, block, layer.act_signs is not None)
    return _coded(name, layer.weight_codes(), layer.weight_levels, layer.weight_scale)


def _of_table(name: str, codes: TableCodes) -> Coded:
    """An embedding or head of 8 or 4 bits; the scale of a group of columns is its multiplier times the row's."""
    scales = codes.scale[:, None]
    if codes.multipliers is None:
        return _coded(name, (codes.weight.to(torch.int16) + 127).to(torch.uint8), Grid(255, -0.5), scales)
    integers = torch.stack((codes.weight & 15, codes.weight >> 4), dim=-1).flatten(-2)
    return _coded(name, integers, Grid(16, 0.0), scales * codes.multipliers)


def _coded(name: str, codes: Tensor, grid: Grid, scales: Tensor) -> Coded:
    scales = scales.detach().to(torch.float32)
    if not bool(scales.isfinite().all()):
        raise BellboxError(f"{name}: a scale of its weight is NaN or infinite")
    scales = scales.reshape(len(codes), -1)
    return Coded(codes.cpu().numpy(), grid, scales.cpu().numpy())


def _require_unrotated(name: str, block: int, signs: bool) -> None:
    if block != 1 or signs:
        what = f"rotated in blocks of {block}" if block != 1 else "multiplied by random signs"
        raise BellboxError(
            f"{name}: its input is {what}, which a GGUF file cannot say, and rotated back the weight is on no grid; "
            "train with quantization.block: 1 (and no random signs), or write another format"
        )


def _no_grid(name: str) -> BellboxError:
    return BellboxError(
        f"{name}: its levels are a table of values that are not evenly spaced, and no GGUF type holds those; train "
        "with an even grid: bbq, rtn, lsq, quest, ternary, with quantization.block: 1"
    )


def encode(name: str, parts: Sequence[Coded], avoid: Collection[str] = (), check: bool = True) -> Written:
    """The blocks of a weight, or of several that are put under one another (q, k, v of a GPT-2).

    Args:
        name: for messages.
        parts: of equal columns.
        avoid: names of types not to use.
        check: decode the blocks with the `gguf` package and compare every weight.

    Raises:
        BellboxError: no type holds the grid, or none whose blocks divide the rows; a scale beyond fp16.
    """
    kind, fits = _choose(name, parts, avoid)
    data: list[np.ndarray] = []
    change, small = 0.0, 0
    for part, fit in zip(parts, fits, strict=True):
        d = _half_scales(name, part.scales, fit.divisor)
        exact = np.abs(part.scales) / np.float32(fit.divisor)
        normal = exact >= _NORMAL_HALF
        small += int(((exact > 0) & ~normal).sum())
        if normal.any():
            moved = np.abs(np.abs(d[normal].astype(np.float32)) - exact[normal]) / exact[normal]
            change = max(change, float(moved.max()))
        blocks = part.codes.shape[1] // kind.block
        each = np.repeat(d, blocks // part.scales.shape[1], axis=1)
        stored = part.codes * np.uint8(fit.step) + np.uint8(fit.first)
        data.append(kind.encode(stored, each, fit))
        if check:
            _check(name, kind, data[-1], part, d, fit)
    narrowest = max((natural_type(part.grid) or kind for part in parts), key=lambda one: one.bits)
    natural = narrowest.name if narrowest is not kind else None
    return Written(kind.name, np.concatenate(data), natural, change, small)


def _choose(name: str, parts: Sequence[Coded], avoid: Collection[str]) -> tuple[BlockType, list[Fit]]:
    columns = parts[0].codes.shape[1]
    holding = [kind for kind in BLOCK_TYPES if all(kind.fit(part.grid) for part in parts)]
    if not holding:
        grids = " and ".join(
            f"{part.grid.n} levels from {-part.grid.offset:g} to {part.grid.n - 1 - part.grid.offset:g}"
            for part in parts
        )
        raise BellboxError(
            f"{name}: no GGUF type holds {grids}; train with at most 8 bits and a grid around zero"
        )
    for kind in holding:
        whole = all(columns // part.scales.shape[1] % kind.block == 0 for part in parts)
        if whole and kind.name not in avoid:
            return kind, [fit for part in parts if (fit := kind.fit(part.grid)) is not None]
    run = min(columns // part.scales.shape[1] for part in parts)
    blocks = ", ".join(f"{kind.name} {kind.block}" for kind in holding if kind.name not in avoid)
    raise BellboxError(
        f"{name}: {run:,} weights have a scale of their own, and no block of a type that holds its grid divides that "
        f"({blocks or 'all are avoided'}); make the model's widths multiples of 32, better of 256, or avoid fewer types"
    )


def _half_scales(name: str, scales: np.ndarray, divisor: int) -> np.ndarray:
    """d of a type, fp16: rounded to nearest, but never to 0 where it was not, so that no code is lost."""
    exact = scales.astype(np.float64) / divisor
    if np.abs(exact).max(initial=0.0) > _LARGEST_HALF:
        raise BellboxError(
            f"{name}: a scale is {np.abs(scales).max():g}, and GGUF's fp16 scales end at {_LARGEST_HALF * divisor:g}; "
            "scale the weight down, and the norm before it up"
        )
    half = exact.astype(np.float16)
    lost = (half == 0) & (exact != 0)
    half[lost] = np.copysign(_SMALLEST_HALF, exact[lost]).astype(np.float16)
    return half


def _check(name: str, kind: BlockType, data: np.ndarray, part: Coded, d: np.ndarray, fit: Fit) -> None:
    """Every weight, as the `gguf` package decodes it, against the grid; nothing where that does not know the type."""
    values = decoded(kind.name, data)
    if values is None:
        return
    levels = np.array(part.grid.integers, dtype=np.float32)[part.codes]
    scales = d.astype(np.float32) * np.float32(fit.divisor / part.grid.multiplier)
    expected = levels.reshape(len(levels), scales.shape[1], -1) * scales[:, :, None]
    if not np.array_equal(values, expected.reshape(values.shape)):
        raise RuntimeError(
            f"{name}: the blocks of {kind.name} are not the weight; this is a defect of Bellbox"
        )


def decoded(kind: str, data: np.ndarray) -> np.ndarray | None:
    """fp32 `[rows, columns]` of blocks, by the `gguf` package; None where that has no decoder for the type."""
    gguf: Any = require("gguf", "gguf")
    try:
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        return None


def encode_floats(values: Tensor, kind: str) -> Written:
    """Floats as F32, F16 or BF16, or rounded to Q8_0 where blocks of 32 divide the rows (else F16).

    Args:
        values: of any shape; vectors are always F32, as readers of GGUF want them.
        kind: `f32`, `f16`, `bf16` or `q8_0`.
    """
    gguf: Any = require("gguf", "gguf")
    plain = values.detach().to(torch.float32).cpu().numpy()
    if plain.ndim < 2 or kind == "f32":
        return Written("F32", np.ascontiguousarray(plain))
    wanted = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[kind]
    if wanted == "Q8_0" and plain.shape[-1] % 32:
        wanted = "F16"
    return Written(wanted, gguf.quants.quantize(plain, gguf.GGMLQuantizationType[wanted]))
