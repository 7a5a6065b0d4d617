"""Codes of an embedding or a head: integers of 8 bits a row, or of 4 bits by groups of columns.

A row of a table stands for `scale * multiplier of the group * integer`. With 8 bits a row is one group, whose
multiplier is 1. With 4 bits the multiplier is a whole number from 0 to 255: it costs a byte a group, and the product of
a row with integers is one whole number, so that no order of summation can change a bit of it. Symmetric, nearest, ties
to even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bellbox.errors import BellboxError

TABLE_BITS = (4, 8)
TABLE_GROUPS = (32, 64)
"""Columns that may share a multiplier."""
MOST_MULTIPLIER = 255
_SMALLEST = 1e-30


class TableCodes(NamedTuple):
    """A rounded table as layers and files hold it."""

    weight: Tensor
    """int8 `[rows, columns]`; of 4 bits uint8 `[rows, columns / 2]`, integer + 8, the even column in the low half."""
    multipliers: Tensor | None
    """uint8 `[rows, columns / group]`; None with 8 bits."""
    scale: Tensor
    """fp32 `[rows]`."""


@dataclass(frozen=True)
class TableCoding:
    """How a table is rounded."""

    bits: int
    """4 or 8."""
    group: int | None = None
    """Columns that share a multiplier, 32 or 64; None with 8 bits."""

    @classmethod
    def of(cls, bits: int, group: int | None, columns: int) -> TableCoding:
        """That of a table with so many columns; where no group is asked for, 64 columns, or 32 where 64 do not divide.

        Raises:
            BellboxError: other bits or groups, a group with 8 bits, or one that does not divide the columns.
        """
        if bits not in TABLE_BITS:
            raise BellboxError(f"embeddings can have 4 or 8 bits, not {bits!r}")
        if bits == 8:
            if group is not None:
                raise BellboxError(f"embeddings of 8 bits have one scale a row: leave out the group {group}")
            return cls(8)
        if group is None:
            group = TABLE_GROUPS[0] if columns % TABLE_GROUPS[-1] else TABLE_GROUPS[-1]
        if group not in TABLE_GROUPS:
            raise BellboxError(f"embeddings of 4 bits have groups of 32 or 64 columns, not {group!r}")
        if columns % group:
            raise BellboxError(
                f"groups of {group} do not divide the {columns} columns of an embedding; use 8 bits"
            )
        return cls(4, group)

    def __str__(self) -> str:
        return f"{self.bits} bits by groups of {self.group}" if self.group else f"{self.bits} bits a row"

    @property
    def most(self) -> int:
        """The largest integer: 127 or 7."""
        return 2 ** (self.bits - 1) - 1

    def round(self, weight: Tensor) -> TableCodes:
        """A float table `[rows, columns]` as codes; the scale of a row with NaN or infinity is NaN."""
        integers, multipliers, scale = self._rounded(weight.detach())
        if multipliers is None:
            return TableCodes(integers.to(torch.int8), None, scale)
        codes = (integers + 8).to(torch.uint8)
        return TableCodes(codes[:, 0::2] | (codes[:, 1::2] << 4), multipliers.to(torch.uint8), scale)

    def fake(self, weight: Tensor) -> Tensor:
        """The values that the codes of `[rows, columns]` stand for, fp32; NaN in a row with NaN or infinity."""
        integers, multipliers, scale = self._rounded(weight)
        return _values(integers, multipliers, scale)

    def _rounded(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Integers, multipliers and scales, all as fp32."""
        weight = weight.to(torch.float32)
        most = weight.new_tensor(self.most)
        if self.group is None:
            scale = _finite(weight.abs().amax(dim=1) / most)
            return _nearest(weight, scale[:, None], self.most), None, scale
        groups = weight.unflatten(1, (-1, self.group))  # a table of no rows too
        largest = groups.abs().amax(dim=2)
        row = largest.amax(dim=1)
        scale = _finite(row / (most * MOST_MULTIPLIER))
        # Rounded up: so the group's largest entry stays within the integers.
        share = (largest / row[:, None] * MOST_MULTIPLIER).ceil().clamp(max=MOST_MULTIPLIER)
        multipliers = torch.where(row[:, None] > 0, share, 0.0)
        integers = _nearest(groups, (scale[:, None] * multipliers).unsqueeze(-1), self.most)
        return integers.reshape(weight.shape), multipliers, scale


def _finite(scale: Tensor) -> Tensor:
    return torch.where(scale.isfinite(), scale, float("nan"))


def _nearest(weight: Tensor, unit: Tensor, most: int) -> Tensor:
    return weight.div(unit.clamp(min=_SMALLEST)).round_().clamp_(-most, most).add_(0.0)  # no -0


def _values(integers: Tensor, multipliers: Tensor | None, scale: Tensor) -> Tensor:
    """`[..., columns]` times `[..., groups]`, exact, times `[...]`: the one rounding."""
    if multipliers is not None:
        grouped = integers.unflatten(-1, (multipliers.shape[-1], -1)) * multipliers.unsqueeze(-1)
        integers = grouped.flatten(-2)
    return integers * scale.unsqueeze(-1)


def table_integers(codes: TableCodes) -> Tensor:
    """The whole numbers that multiply the scale, fp32 `[..., columns]`: at most 127, or 8 * 255.

    Args:
        codes: of rows of any leading shape.
    """
    if codes.multipliers is None:
        return codes.weight.to(torch.float32)
    halves = torch.stack((codes.weight & 15, codes.weight >> 4), dim=-1).flatten(-2)
    groups = codes.multipliers.shape[-1]
    integers = (halves.to(torch.float32) - 8).unflatten(-1, (groups, -1))
    return (integers * codes.multipliers.unsqueeze(-1)).flatten(-2)


def table_values(codes: TableCodes) -> Tensor:
    """What codes stand for: fp32 `[..., columns]`, the numbers that `TableCoding.fake` gave in training."""
    return table_integers(codes) * codes.scale.unsqueeze(-1)
