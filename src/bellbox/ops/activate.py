"""The activation between the packed layers of an MLP, for evaluation: it has no gradient.

A library's vectors take the last few numbers of a buffer by another routine, and each library its own. Here every step
is one rounding in fp32, in a fixed order: a value has one result, wherever it lies and whatever runs it
(`native/runtime` too). So no code of the next layer depends on that. Below -87 the exponential stays what it is there,
so a magnitude above 1e30 gives no zero; no layer takes such numbers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation, is_direct

Activation = Literal["silu", "gelu", "gelu_erf"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_erf")
"""In the order of the kernels: x times its sigmoid; GPT-2's GELU by tanh; x Phi(x)."""
# Phi(-t) is e^(-t^2/2) y P(y), y = 1 / (1 + 0.3 t): a fit to 4e-9 of itself (native/kernels/activations.h).
_TAIL = (
    0.119686641, 0.119572721, 0.110228412, 0.0784200951, 0.0960749015,
    -0.0792814046, 0.191625372, -0.228102282, 0.112391412, -0.0206158627,
)  # fmt: skip


def exponential(x: Tensor) -> Tensor:
    """e^x of fp32 x <= 0, to about one unit in the last place: 2^n times the Taylor polynomial of the rest."""
    x = torch.where(x < -87.0, torch.full_like(x, -87.0), x)
    magic = 12582912.0  # 1.5 * 2^23: adding it rounds to a whole number, which lies in the low bits
    shifted = x * _fp32(1.44269504) + magic
    n = shifted - magic
    r = (x - n * _fp32(0.693359375)) + n * _fp32(2.12194440e-4)
    p = torch.full_like(x, _fp32(1 / 5040))
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = p * r + _fp32(factor)
    bits = ((shifted.view(torch.int32) << 23) + (127 << 23)).view(torch.float32)
    return p * bits


def _fp32(number: float) -> float:
    """The nearest fp32 number, which torch would otherwise take in fp64 where it pleases."""
    return torch.tensor(number, dtype=torch.float32).item()


def _gated(x: Tensor, z: Tensor) -> Tensor:
    below = z < 0
    e = exponential(torch.where(below, z, -z))
    return torch.where(below, x * e, x) / (1.0 + e)


def _gelu(x: Tensor) -> Tensor:
    return _gated(x, x * (_fp32(1.59576912) + _fp32(0.0713548163) * (x * x)))


def _gelu_erf(x: Tensor) -> Tensor:
    below = x < 0
    t = torch.where(below, -x, x)
    y = 1.0 / (1.0 + _fp32(0.3) * t)
    p = torch.full_like(x, _fp32(_TAIL[-1]))
    for factor in reversed(_TAIL[:-1]):
        p = p * y + _fp32(factor)
    product = x * (exponential(-0.5 * t * t) * (y * p))
    return torch.where(below, product, x - product)


def check(x: Tensor, times: Tensor | None, kind: str) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: no such activation, another dtype than fp32, a factor of another shape.
    """
    if kind not in ACTIVATIONS:
        raise BellboxError(f"the activation is {kind!r}; it must be one of {', '.join(ACTIVATIONS)}")
    for each in (x, x if times is None else times):
        if each.dtype != torch.float32 or each.shape != x.shape:
            raise BellboxError(f"{kind} of {x.dtype} {tuple(x.shape)} times {each.dtype} {tuple(each.shape)}")


def _reference(x: Tensor, times: Tensor | None, kind: str) -> Tensor:
    check(x, times, kind)
    x = x.detach().contiguous()
    out = _gated(x, x) if kind == "silu" else _gelu(x) if kind == "gelu" else _gelu_erf(x)
    return out if times is None else out * times.detach()


def _fake(x: Tensor, times: Tensor | None, kind: str) -> Tensor:
    del times, kind
    return torch.empty_like(x, memory_format=torch.contiguous_format)


operation = Operation("activate(Tensor x, Tensor? times, str kind) -> Tensor", _reference, _fake)


def is_pinned(x: Tensor) -> bool:
    """Whether evaluation of `x` goes by the library's own arithmetic between layers: fp32 on the CPU, no gradients.

    A compiler sees its operations; an export and other tracers see torch's, which others know.
    """
    return (
        not torch.is_grad_enabled()
        # before its dtype is looked at: a tracer's stand-in has none
        and (is_direct(x) or (torch.compiler.is_compiling() and not torch.compiler.is_exporting()))
        and x.dtype == torch.float32
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
    )


def activate(x: Tensor, kind: Activation, times: Tensor | None = None) -> Tensor:
    """An activation of fp32 numbers, the same bits on every kernel path.

    Args:
        x: any shape.
        kind: which.
        times: of the same shape: what the result is multiplied with.

    Returns:
        the shape of `x`.

    Raises:
        BellboxError: see `check`.
    """
    return operation.direct(x, times, kind)
