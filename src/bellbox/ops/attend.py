"""Attention of new tokens over a cache, rotary positions included, in one call of the compiled kernels.

It writes into the cache, so that it is no operation of the registry: who calls it asks `attends` first, and goes on
with torch where that says no.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bellbox.ops import native
from bellbox.ops.activate import is_pinned
from bellbox.ops.dispatch import forced, is_direct


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


def attends(query: Tensor, cache: CacheLayer | None) -> bool:
    """Whether `attend` serves: fp32 on the CPU, the kernels there, no gradient asked for."""
    return (
        is_pinned(query)
        and is_direct(query)
        and native.available()
        and forced() in (None, "cpu")
        and query.numel() > 0
        and (cache is None or cache.is_direct())
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cache: CacheLayer | None,
    start: int | Tensor,
    head_dim: int,
    causal: bool = True,
) -> Tensor:
    """New tokens of each sequence: rotary positions, keys and values into the cache, attention over all so far.

    A token gets the same bits whether it comes alone or with others, before or after it.

    Args:
        query: `[B, T, heads * head_dim]` fp32, not yet rotated.
        key: `[B, T, kv_heads * head_dim]`, likewise.
        value: as `key`.
        rotary: cosines and sines `[positions, head_dim / 2]` fp32, or None.
        cache: the layer's, of `B` sequences or of as many slots as there are; positions from `start` on are written.
            None: these tokens are all.
        start: tokens held, `T` less than `room` at most; or, where T is 1, int64 `[B, 2]`, the slot of each sequence in
            the cache and how many it holds, no slot twice.
        head_dim: of attention.
        causal: whether a token sees those before it and itself only.

    Returns:
        `[B, T, heads * head_dim]`.
    """
    module = native.compiled()
    assert module is not None
    batch, tokens, width = query.shape
    kv_heads = key.shape[2] // head_dim
    if cache is None:
        keys, values = query.new_empty(2, batch, kv_heads, tokens, head_dim).unbind()
        cache = CacheLayer(keys, values)
    room = cache.keys.shape[2]
    cosines, sines = (None, None) if rotary is None else rotary
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out, threads = torch.empty_like(query), torch.get_num_threads()
    given = query, key, value, cosines, sines, *cache
    if tokens == 1:
        module.attend(*given, batch, width // head_dim, kv_heads, head_dim, room, start, out, threads)
    else:
        sizes = batch, tokens, width // head_dim, kv_heads, head_dim, room
        module.attend_prompt(*given, *sizes, start, causal, out, threads)
    return out
