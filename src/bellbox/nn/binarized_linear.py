"""The layer that a binarized weight matrix becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.core import packing
from bellbox.core.binarize import BILLM_SCALES, RTN_SCALES, Binarized, decode
from bellbox.nn.input_cache import keeping_dtype, version_of
from bellbox.ops import binarized


def round_activations(x: Tensor, bits: int) -> Tensor:
    """Round each token to integers of its own scale, symmetric: max|x| becomes 2^(bits-1) - 1.

    Args:
        x: float `[..., features]`.
        bits: 2 to 15; 16 leaves `x` as it is.
    """
    if bits >= 16:
        return x
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / most
    return (x / scale).round_() * scale


class BinarizedLinear(nn.Module):
    """A linear layer whose weights are stored as signs, bits and fp16 scales (`core/binarize.py` says how they decode).

    Args:
        in_features: length of the last dimension of the input.
        out_features: length of the last dimension of the output.
        bias: whether there is a bias.
        block: columns that share a row's scales.
        residual: whether there are bits and salient columns; false for rounding to nearest.
        activation_bits: what each token of the input is rounded to; 16 for no rounding.

    Its buffers are what is stored: `signs` and `bits` uint8 `[out, ceil(in / 8)]`, `salient` uint8 `[1, ceil(in / 8)]`,
    `scales` fp16 `[out, blocks, 7 or 2]`, `bias` fp32 `[out]`.

    With inputs of at most 8 bits and few rows (a decode step) the compiled kernel of `ops/binarized.py` multiplies
    signs and bits as they are. Else the weights are decoded at the first use and kept in fp32. The two agree to
    rounding in fp32.
    """

    signs: Tensor
    bits: Tensor | None
    salient: Tensor | None
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        block: int,
        residual: bool,
        activation_bits: int = 16,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block, self.activation_bits = block, activation_bits
        size, blocks = packing.row_bytes(in_features, 2), -(-in_features // block)
        self.register_buffer("signs", torch.zeros(out_features, size, dtype=torch.uint8))
        self.register_buffer("bits", torch.zeros(out_features, size, dtype=torch.uint8) if residual else None)
        self.register_buffer("salient", torch.zeros(1, size, dtype=torch.uint8) if residual else None)
        count = BILLM_SCALES if residual else RTN_SCALES
        self.register_buffer("scales", torch.zeros(out_features, blocks, count, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self._made: dict[str, tuple[tuple[Tensor, ...], tuple[int, ...], Any]] = {}

    @classmethod
    def from_blocks(cls, blocks: Sequence[Binarized], bias: Tensor | None, block: int) -> BinarizedLinear:
        """Pack what `binarize_matrix` gave."""
        signs = torch.cat([one.signs for one in blocks], 1)
        rows, columns = signs.shape
        layer = cls(columns, rows, bias is not None, block, blocks[0].bits is not None)
        layer.signs.copy_(_pack(signs))
        if layer.bits is not None and layer.salient is not None:
            layer.bits.copy_(_pack(torch.cat([one.bits for one in blocks if one.bits is not None], 1)))
            layer.salient.copy_(
                _pack(torch.cat([one.salient for one in blocks if one.salient is not None])[None])
            )
        layer.scales.copy_(torch.stack([one.scales for one in blocks], 1))
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
        return layer

    def weight(self) -> Tensor:
        """The weights, fp32 `[out, in]`, decoded now or before."""
        return self._kept("weight", self._decode)

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, now or before: until something that is stored changes."""
        stored = tuple(
            t for t in (self.signs, self.bits, self.salient, self.scales, self.bias) if t is not None
        )
        versions, kept = tuple(map(version_of, stored)), self._made.get(name)
        if (
            kept is None
            or versions != kept[1]
            or any(a is not b for a, b in zip(kept[0], stored, strict=True))
        ):
            kept = self._made[name] = (stored, versions, make())
        return kept[2]

    @torch.no_grad()
    def _planes(self) -> binarized.Planes:
        assert self.bits is not None
        assert self.salient is not None
        signs, bits, salient = map(self._unpacked, (self.signs, self.bits, self.salient))
        return binarized.Planes(signs, bits, salient[0], self.scales, self.block, self.bias)

    @torch.no_grad()
    def _decode(self) -> Tensor:
        signs = self._unpacked(self.signs)
        bits = None if self.bits is None else self._unpacked(self.bits)
        salient = None if self.salient is None else self._unpacked(self.salient)[0]
        parts = []
        for number, first in enumerate(range(0, self.in_features, self.block)):
            here = slice(first, first + self.block)
            parts.append(
                decode(
                    Binarized(
                        signs[:, here],
                        None if bits is None else bits[:, here],
                        None if salient is None else salient[here],
                        self.scales[:, number],
                    )
                )
            )
        return torch.cat(parts, 1)

    def _unpacked(self, packed: Tensor) -> Tensor:
        return packing.unpack(packed, self.in_features, 2).bool()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        fits = self.bits is not None and self.signs.is_cpu and x.shape[-1:] == (self.in_features,)
        if fits and binarized.serves(x, self.activation_bits):
            return self._kept("planes", self._planes).multiply(x, self.activation_bits)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(round_activations(x, self.activation_bits), self.weight().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.stored_bits() / (self.in_features * self.out_features):.3g}, "
            f"activation_bits={self.activation_bits}"
        )

    def stored_bits(self) -> int:
        """Bits of everything that is stored for the weights: planes, salient columns and scales."""
        planes = (self.signs, self.bits, self.salient, self.scales)
        return sum(8 * t.nbytes for t in planes if t is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BinarizedLinear:
        """Follow moves between devices, never a change of dtype: fp16 scales are what is stored."""
        return super()._apply(keeping_dtype(fn), recurse)


def _pack(bits: Tensor) -> Tensor:
    return packing.pack(bits.to(torch.uint8), 2)
