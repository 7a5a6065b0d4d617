"""The keys and values of the tokens seen so far, so that the next token costs one row of work.

The memory is taken once, for the whole length: a cache that grows by concatenation copies everything at every
token. Positions beyond `length` hold garbage and are never read.

In long texts a decode step reads more of the cache than of a packed model. So it may be coded, in int8 or in 4 bits
with one scale a head and token (`ops/cache_codes.py`). What attention reads is then always what was stored, the newest
token's own key included: a prompt at once, in pieces or token by token give one function.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.attend import CacheLayer
from bellbox.ops.cache_codes import (
    CachePrecision,
    check_cache_precision,
    code_rows,
    decode_rows,
    head_block,
    row_length,
)


class KVCache:
    """Keys and values of every layer, preallocated.

    Attributes:
        keys: per layer `[batch, key-value heads, max_length, head_dim]`; int8 codes, or uint8 of two codes a byte and
            half as long, where the cache is coded; values likewise.
        key_scales: per layer `[batch, key-value heads, max_length]` fp32, or None where it is not; value_scales
            likewise.
        precision: fp32 (as they come, in `dtype`), int8 or int4.
        block: of the rotation of a head before it is coded; 1 where there is none.
        length: tokens held, the same in every layer and every sequence of the batch.
        max_length: tokens that fit.

    Raises:
        BellboxError: sizes below 1, another precision.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        max_length: int,
        head_dim: int,
        *,
        precision: CachePrecision = "fp32",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or max_length < 1:
            raise BellboxError(f"a KV cache of {batch} x {max_length} tokens; both must be at least 1")
        check_cache_precision(precision)
        rows, coded = (batch, heads, max_length), precision != "fp32"
        width = row_length(precision, head_dim) if coded else head_dim
        dtype = {"fp32": dtype, "int8": torch.int8, "int4": torch.uint8}[precision]

        def scales() -> list[Tensor | None]:
            return [torch.empty(rows, device=device) if coded else None for _ in range(layers)]

        self.keys = [torch.empty(*rows, width, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(*rows, width, dtype=dtype, device=device) for _ in range(layers)]
        self.key_scales, self.value_scales = scales(), scales()
        self.precision: CachePrecision = precision
        self.block = head_block(head_dim) if coded else 1
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        self._head_dim = head_dim

    def layer(self, layer: int) -> CacheLayer:
        """One layer's tensors, as the compiled kernels take them."""
        scales = self.key_scales[layer], self.value_scales[layer]
        return CacheLayer(self.keys[layer], self.values[layer], *scales, self.block)

    def check_room(self, batch: int, tokens: int) -> None:
        """Whether this many sequences and further tokens fit.

        Raises:
            BellboxError: another batch size, or more tokens than are left.
        """
        if batch != self.batch:
            raise BellboxError(f"the KV cache was made for a batch of {self.batch}, not of {batch}")
        if self.length + tokens > self.max_length:
            raise BellboxError(
                f"the KV cache is full: it holds {self.length} of {self.max_length} tokens and {tokens} more "
                "came; make it longer with new_cache(batch, max_length)"
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new tokens after those held; `advance` counts them once every layer has written.

        Args:
            layer: index of the block.
            keys: `[batch, heads, T, head_dim]`, rotary positions done; values likewise. Stored in the cache's
                dtype, or coded.

        Returns:
            all keys and values so far, `[batch, heads, length + T, head_dim]`: views, or, of a coded cache, what the
            codes stand for in the dtype of `keys`.
        """
        end = self.length + keys.shape[2]
        held = self.keys[layer], self.values[layer]
        for new, into, scales in zip(
            (keys, values), held, (self.key_scales[layer], self.value_scales[layer]), strict=True
        ):
            if scales is None:
                into[:, :, self.length : end] = new
            else:
                codes, new_scales = code_rows(new, self.precision, self.block)
                into[:, :, self.length : end], scales[:, :, self.length : end] = codes, new_scales
        return self._read(layer, end, keys.dtype)

    def _read(self, layer: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        key_scales, value_scales = self.key_scales[layer], self.value_scales[layer]
        if key_scales is None or value_scales is None:
            return keys, values
        decoded = (
            decode_rows(codes, scales[:, :, :end], self._head_dim, self.block).to(dtype)
            for codes, scales in ((keys, key_scales), (values, value_scales))
        )
        return next(decoded), next(decoded)

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self.length += tokens

    def reset(self) -> None:
        """Forget everything; the memory stays for the next prompt."""
        self.length = 0

    def row(self, index: int) -> KVCache:
        """An empty cache of one sequence in the memory of sequence `index` of this one."""
        row = copy.copy(self)
        here = slice(index, index + 1)
        row.keys, row.values = [t[here] for t in self.keys], [t[here] for t in self.values]
        row.key_scales = [None if t is None else t[here] for t in self.key_scales]
        row.value_scales = [None if t is None else t[here] for t in self.value_scales]
        row.batch, row.length = 1, 0
        return row

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes, scales included."""
        tensors = self.keys + self.values + self.key_scales + self.value_scales
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class SlotCache:
    """Sequences that come and go, each with a length of its own: a slot of one cache is a cache of one sequence.

    Attributes:
        store: the memory of all; its own `length` says nothing.
        slots: each slot as the cache that a prompt goes into.
    """

    def __init__(self, store: KVCache) -> None:
        self.store = store
        self.slots = [store.row(index) for index in range(store.batch)]

    def places(self, slots: Sequence[int]) -> Tensor:
        """Slot and length of each of these sequences, int64 `[n, 2]`, as the compiled kernels take them."""
        return torch.tensor([(slot, self.slots[slot].length) for slot in slots])

    def check_room(self, slots: Sequence[int]) -> None:
        """Whether another token of each of these sequences fits.

        Raises:
            BellboxError: a slot twice, none of the cache's, or a full one.
        """
        if len(set(slots)) != len(slots) or not all(0 <= slot < len(self.slots) for slot in slots):
            raise BellboxError(f"slots {list(slots)} of a cache of {len(self.slots)}; each may come once")
        for slot in slots:
            self.slots[slot].check_room(1, 1)

    def advance(self, slots: Sequence[int]) -> None:
        """Count the token that every layer has written of each of these sequences."""
        for slot in slots:
            self.slots[slot].advance(1)
