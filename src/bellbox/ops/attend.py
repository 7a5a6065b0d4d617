"""Attention of one new token over a cache, rotary positions included, in one call of the compiled kernels.

It writes into the cache, so that it is no operation of the registry: who calls it asks `attends` first, and goes on
with torch where that says no.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bellbox.ops import native
from bellbox.ops.dispatch import is_direct


class CacheLayer(NamedTuple):
    """Keys and values of one layer, with room for more."""

    keys: Tensor
    """`[B, kv_heads, room, head_dim]` fp32 or int8 codes, or uint8 `[B, kv_heads, room, ceil(head_dim / 2)]`."""
    values: Tensor
    """As `keys`."""
    key_scales: Tensor | None = None
    """`[B, kv_heads, room]` fp32 of codes, else None."""
    value_scales: Tensor | None = None
    """As `key_scales`."""
    block: int = 1
    """Of the rotation of a head before it is coded (`ops/cache_codes.py`)."""

    def is_direct(self) -> bool:
        """Whether the compiled kernels take it: fp32 or coded, on the CPU, contiguous."""
        tensors = [t for t in self[:4] if t is not None]
        kinds = torch.float32, torch.int8, torch.uint8
        return all(t.is_cpu and t.dtype in kinds and t.is_contiguous() for t in tensors)


def attends(query: Tensor, cache: CacheLayer) -> bool:
    """Whether `attend` serves: one token of fp32 on the CPU, the kernels there, no gradient asked for."""
    return (
        query.shape[1] == 1
        and not torch.is_grad_enabled()
        and is_direct(query)
        and native.available()
        and query.is_cpu
        and query.dtype == torch.float32
        and query.is_contiguous()
        and cache.is_direct()
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cache: CacheLayer,
    start: int | Tensor,
) -> Tensor:
    """One new token of each sequence: rotary positions, key and value into the cache, attention over all so far.

    Args:
        query: `[B, 1, heads * head_dim]` fp32, contiguous, not yet rotated.
        key: `[B, 1, kv_heads * head_dim]`, likewise.
        value: as `key`.
        rotary: cosines and sines `[positions, head_dim / 2]` fp32, or None.
        cache: the layer's, of `B` sequences or of as many slots as there are; position `start` is written.
        start: tokens held, less than `room`; or int64 `[B, 2]`, the slot of each sequence in the cache and how many it
            holds, no slot twice.

    Returns:
        `[B, 1, heads * head_dim]`.
    """
    module = native.compiled()
    assert module is not None
    _, kv_heads, room, head_dim = cache.keys.shape
    if cache.keys.dtype == torch.uint8:
        head_dim = key.shape[2] // kv_heads
    cosines, sines = (None, None) if rotary is None else rotary
    out = torch.empty_like(query)
    sizes = len(query), query.shape[2] // head_dim, kv_heads, head_dim, room, start
    key, value = key.contiguous(), value.contiguous()
    module.attend(query, key, value, cosines, sines, *cache, *sizes, out, torch.get_num_threads())
    return out
