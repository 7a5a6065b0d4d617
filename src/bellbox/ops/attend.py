"""Attention of one new token over a cache, rotary positions included, in one call of the compiled kernels.

It writes into the cache, so that it is no operation of the registry: who calls it asks `attends` first, and goes on
with torch where that says no.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.ops import native
from bellbox.ops.dispatch import is_direct


def attends(query: Tensor, keys: Tensor) -> bool:
    """Whether `attend` serves: one token of fp32 on the CPU, the kernels there, no gradient asked for."""
    return (
        query.shape[1] == 1
        and not torch.is_grad_enabled()
        and is_direct(query)
        and native.available()
        and all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (query, keys))
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
