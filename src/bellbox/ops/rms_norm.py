"""The norm between the packed layers of a decoder, for evaluation: it has no gradient.

A packed layer takes microseconds for one row, so that a dozen small operations around it would cost more than it does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation


def check_width(what: str, x: Tensor, features: int) -> None:
    """Refuse rows of another length.

    Raises:
        BellboxError: naming `what`, both widths.
    """
    if x.shape[-1:] != (features,) or not x.is_floating_point():
        raise BellboxError(f"{what} of {features} inputs got shape {tuple(x.shape)}, dtype {x.dtype}")


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_width("a norm", x, len(weight))
    mean = x.double().square().mean(dim=-1, keepdim=True)
    return x.contiguous() * (mean + eps).rsqrt().to(torch.float32) * weight


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    del weight, eps
    return torch.empty_like(x, memory_format=torch.contiguous_format)


operation = Operation("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _reference, _fake)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x * float32(1 / sqrt(mean(x^2) + eps)) * weight`, the mean in fp64: the same bits on every kernel path.

    Args:
        x: `[..., features]` fp32.
        weight: `[features]` fp32.
        eps: added to the mean of squares.

    Returns:
        fp32, the shape of `x`.

    Raises:
        BellboxError: another number of features than weights.
    """
    return operation.direct(x, weight, eps)
