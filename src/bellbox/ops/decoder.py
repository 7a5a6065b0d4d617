"""What stands between the packed layers of a decoder: norm, attention of one token, a head of int8 weights.

A packed layer takes microseconds for one row, so that a dozen small operations around it would cost more than it
does. Each of these is one call of the compiled kernels, or plain torch where they are not there. They are for
evaluation: none has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops import native
from bellbox.ops.dispatch import is_direct

INT8_COLUMNS = 8192
"""Longest row of `int8_linear` in the compiled kernels: 127 * 2047 * 8192 fits 32 bits."""
_SMALLEST = 1e-30


def _plain(*tensors: Tensor) -> bool:
    return all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _check_width(what: str, x: Tensor, features: int) -> None:
    if x.shape[-1:] != (features,):
        raise BellboxError(f"{what} of {features} inputs got shape {tuple(x.shape)}")


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
    if is_direct(x):
        return _rms_norm(x, weight, eps)
    return torch.ops.bellbox.rms_norm(x, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_width("a norm", x, len(weight))
    x = x.contiguous()
    module = native.compiled()
    if module is None or not _plain(x, weight) or not x.numel():
        mean = x.double().square().mean(dim=-1, keepdim=True)
        return x * (mean + eps).rsqrt().to(torch.float32) * weight
    out = torch.empty_like(x)
    module.rms_norm(x.detach(), weight.detach(), eps, out, torch.get_num_threads())
    return out


def attends(query: Tensor, keys: Tensor) -> bool:
    """Whether `attend` serves: one token of fp32 on the CPU, the kernels there, no gradient asked for."""
    return (
        query.shape[1] == 1
        and not torch.is_grad_enabled()
        and is_direct(query)
        and native.available()
        and _plain(query, keys)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    start: int,
) -> Tensor:
    """One new token of each sequence: rotary positions, key and value into the cache, attention over all so far.

    Args:
        query: `[B, 1, heads * head_dim]` fp32, contiguous, not yet rotated.
        key: `[B, 1, kv_heads * head_dim]`, likewise.
        value: as `key`.
        rotary: cosines and sines `[positions, head_dim / 2]` fp32, or None.
        keys: the layer's cache, `[B, kv_heads, room, head_dim]` fp32; position `start` is written.
        values: as `keys`.
        start: tokens held; less than `room`.

    Returns:
        `[B, 1, heads * head_dim]`.
    """
    module = native.compiled()
    assert module is not None
    batch, kv_heads, room, head_dim = keys.shape
    cosines, sines = (None, None) if rotary is None else rotary
    out = torch.empty_like(query)
    sizes = batch, query.shape[2] // head_dim, kv_heads, head_dim, room, start
    key, value = key.contiguous(), value.contiguous()
    module.attend(query, key, value, cosines, sines, keys, values, *sizes, out, torch.get_num_threads())
    return out


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x @ (weight * scale).T` with each row of `x` rounded to integers of 12 bits first; the integer sum is exact.

    A row's largest magnitude becomes 2047, so that rounding the row costs far less than the int8 of the weights did. A
    row with NaN or infinity gives NaN.

    Args:
        x: `[..., columns]` fp32.
        weight: `[rows, columns]` int8.
        scale: `[rows]` fp32.

    Returns:
        `[..., rows]` fp32.

    Raises:
        BellboxError: another number of columns than the weight's.
    """
    if is_direct(x):
        return _int8_linear(x, weight, scale)
    return torch.ops.bellbox.int8_linear(x, weight, scale)


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows, columns = weight.shape
    _check_width("an int8 layer", x, columns)
    x = x.contiguous()
    module = native.compiled()
    whole = weight.is_cpu and weight.dtype == torch.int8 and weight.is_contiguous()
    if module is None or not (_plain(x, scale) and whole and x.numel() and columns <= INT8_COLUMNS):
        return _int8_reference(x, weight, scale)
    out = x.new_empty((*x.shape[:-1], rows))
    module.int8_linear(x.detach(), weight, scale.detach(), columns, out, torch.get_num_threads())
    return out


def _int8_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    largest = x.abs().amax(dim=-1, keepdim=True)
    usable = largest.isfinite() & (largest >= _SMALLEST)
    factor = x.new_tensor(2047.0) / largest  # with a plain number torch would multiply by the reciprocal
    integers = torch.where(usable, (x * factor).round(), 0.0)
    x_scale = torch.where(usable, largest / 2047.0, torch.where(largest.isfinite(), 0.0, float("nan")))
    outputs = [
        (integers.double() @ part.double().t()).to(torch.float32) for part in weight.split(4096)
    ]  # exact in fp64; a slab at a time, since fp64 weights take eight times the memory
    return torch.cat(outputs, dim=-1) * (scale * x_scale)


_library = torch.library.Library("bellbox", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.define("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor")
for _name, _function in (("rms_norm", _rms_norm), ("int8_linear", _int8_linear)):
    # On any device: torch where the kernels are not.
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("bellbox::rms_norm", lib=_library)
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("bellbox::int8_linear", lib=_library)
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
