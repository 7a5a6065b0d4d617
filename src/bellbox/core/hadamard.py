"""The bell: a block-diagonal Hadamard rotation along the last dimension.

Sums of many independent terms are close to Gaussian whatever the terms were, so rotating gives weights and
activations one known shape. Both factors of `x W^T` are rotated by the same orthonormal matrix, which then
cancels in the product.

The additions are done in one fixed order everywhere (fp32, stages h = 1, 2, 4, ..., block/2, each `(a + b,
a - b)`), so that every backend that follows it gets the same bits. The factor block^-1/2 is left to the
caller, who has a multiplication to fold it into.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from bellbox.errors import BellboxError

DEFAULT_BLOCK = 128
_warned: set[int] = set()


def block_size(features: int, largest: int = DEFAULT_BLOCK) -> int:
    """The largest power of two up to `largest` that divides `features`.

    An odd number of features gets 1 (no rotation), with one warning for each such size, since without the
    rotation the codes are no longer used equally often.

    Args:
        features: length of the rotated dimension, at least 1.
        largest: a power of two; 1 switches the rotation off.

    Raises:
        BellboxError: `largest` is no power of two, or `features` is below 1.
    """
    if largest < 1 or largest & (largest - 1):
        raise BellboxError(f"Hadamard block {largest}: must be a power of two, such as 32, 64 or 128")
    if features < 1:
        raise BellboxError(f"cannot rotate {features} features: at least 1 is needed")
    block = min(largest, features & -features)
    if block == 1 < largest and features not in _warned:
        _warned.add(features)
        if features == 1:
            warnings.warn(
                "one input channel a group leaves nothing to rotate: depthwise convolutions are quantized without "
                "rotation, which costs accuracy; keep=(...) leaves them in full precision",
                stacklevel=2,
            )
            return block
        warnings.warn(
            f"{features} features have no factor of two: the layer is quantized without rotation, "
            "which costs accuracy; an even size, best a multiple of 128, avoids it",
            stacklevel=2,
        )
    return block


def butterfly(x: Tensor, block: int) -> Tensor:
    """Unnormalised Hadamard transform of each run of `block` entries along the last dimension.

    Differentiable and traceable. For the orthonormal transform multiply by `block**-0.5`.

    Args:
        x: `[..., features]`, `features` a multiple of `block`, any floating dtype (computed in it).
        block: a power of two.

    Returns:
        The shape and dtype of `x`; for block 1, `x` itself.
    """
    shape, h = x.shape, 1
    while h < block:
        pairs = x.reshape(-1, 2, h)
        a, b = pairs[:, 0], pairs[:, 1]
        x = torch.stack((a + b, a - b), dim=1)
        h *= 2
    return x.reshape(shape)


def butterfly_between(x: Tensor, block: int, scratch: tuple[Tensor, Tensor]) -> Tensor:
    """`butterfly` without allocation: stages alternate between two buffers.

    Fresh memory costs more than the additions (page faults), hence this form for chunked CPU work.

    Args:
        x: contiguous, `numel` a multiple of `block`; not changed.
        block: a power of two, at least 2.
        scratch: two contiguous buffers with the shape and dtype of `x`.

    Returns:
        One of the two buffers.
    """
    if x.storage_offset() % 2:
        x = x.clone()  # a view that begins between two floats cannot be looked at as complex numbers
    source, h = x.view(-1), 1
    target, spare = scratch[0].view(-1), scratch[1].view(-1)
    if x.dtype == torch.float32 and x.device.type == "cpu" and block >= 16:
        # Runs of one, two and four floats defeat the vector units; the same additions in wider types do not.
        # (a - ib)(1 + i) = (a + b) + i(a - b). Conjugated in memory: tracing loses torch's lazy conjugation.
        wide = torch.view_as_complex(target.view(-1, 2))
        torch.conj_physical(torch.view_as_complex(source.view(-1, 2)), out=wide)
        torch.mul(wide, 1 + 1j, out=wide)
        source, target, spare = target, spare, target
        for h, moved in ((2, torch.float64), (4, torch.complex128)):
            halves, swapped = source.view(moved).view(-1, 2), target.view(moved).view(-1, 2)
            swapped[:, 0].copy_(halves[:, 1])
            swapped[:, 1].copy_(halves[:, 0])
            blocks = target.view(-1, block)
            torch.addcmul(blocks, source.view(-1, block), _signs(h, block), out=blocks)
            source, target, spare = target, spare, target
        h = 8
    while h < block:
        pairs, out = source.view(-1, 2, h), target.view(-1, 2, h)
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        source, target, spare = target, spare, target
        h *= 2
    return source.view(x.shape)


@functools.cache
def _signs(h: int, block: int) -> Tensor:
    """+1 on the first half and -1 on the second half of each run of 2h, `[block]`."""
    return torch.tensor(([1.0] * h + [-1.0] * h) * (block // (2 * h)))


def hadamard(x: Tensor, block: int) -> Tensor:
    """The orthonormal block Hadamard transform along the last dimension; its own inverse up to rounding."""
    return butterfly(x, block) * block**-0.5


def hadamard_matrix(
    block: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """The +-1 Sylvester matrix `[block, block]`; `x @ hadamard_matrix(block)` is `butterfly(x)` up to rounding."""
    return butterfly(torch.eye(block, dtype=dtype, device=device), block)
