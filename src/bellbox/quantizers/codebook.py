"""Codebooks of NormalFloat and k-means: a table of levels, and one scale a group of a row.

    x_hat = s * (nearest entry of the table to x / s)

A value in the middle between two entries goes to the upper one. The gradient passes straight through everywhere; the
scale s follows the data and has none. The levels are not evenly spaced, so products need floats.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from bellbox.core.grid import Levels, strictly_rising
from bellbox.ops.encode import row_scale
from bellbox.ops.transforms import TransformableFunction, apply
from bellbox.quantizers.base import Normaliser, Quantizer


class _Lookup(TransformableFunction):
    @staticmethod
    def forward(x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG004
        values = table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
        return (values * scale).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.input_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0].to(ctx.input_dtype), None, None, None, None


def levels_between(table: Sequence[float]) -> Levels:
    """Thresholds halfway between the rising entries of a table; the grid itself means nothing."""
    return Levels(len(table), -0.5, strictly_rising((a + b) / 2 for a, b in itertools.pairwise(table)))


class Codebook(Quantizer):
    """A quantizer with a table; see `Quantizer` for the arguments."""

    on_grid: ClassVar[bool] = False
    rescale = True
    group: int
    """Entries that share a scale."""

    @property
    def scales_a_row(self) -> int:
        """One a group."""
        return self.features // self.group

    @abstractmethod
    def table(self) -> Tensor:
        """The values of the codes, rising, `[n]`, in units of the scale."""

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with the straight-through gradient."""
        assert norm.sigma is not None
        codes = self.codes_of(rows.detach(), norm.r)
        scale = (norm.sigma * (norm.r - norm.r + 1)).to(norm.r.dtype)
        table = self.table().to(norm.r.dtype)
        return apply(_Lookup, rows, codes, table, scale, dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and row scales; a row is NaN where one of its groups is, and its scales are in units of `table`."""
        rows = self.rows_of(x)
        self.see_first(rows)
        norm = self.normaliser(rows, training=False)
        codes = self.codes_of(rows, norm.r)
        shape = self._shape_of_marks(x)
        groups = len(rows) // max(1, math.prod(shape))
        row_scales = row_scale(norm.r, len(rows)).reshape(*shape[:-1], groups).mean(-1)
        return codes.reshape(x.shape), row_scales.reshape(shape)

    @torch.no_grad()
    def packed_scales(self, x: Tensor, row_scales: Tensor) -> Tensor:  # noqa: ARG002
        """What a stored value of `table` is multiplied with: fp32 `[rows]`, or `[rows, groups]`."""
        rows = self.rows_of(x)
        norm = self.normaliser(rows, training=False)
        scales = row_scale(norm.r, len(rows), norm.sigma).reshape(-1, self.scales_a_row)
        return scales.reshape(-1) if self.scales_a_row == 1 else scales

    def scale(self) -> Tensor:
        """The table has the scale of the data."""
        return torch.ones(())

    def rows_of(self, x: Tensor) -> Tensor:
        """An input or a weight as the rows that are coded, signs changed: `[rows, features]`.

        Raises:
            BellboxError: another last dimension, or no floats.
        """
        return super().rows_of(x).reshape(-1, self.group)
