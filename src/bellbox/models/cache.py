"""The keys and values of the tokens seen so far, so that the next token costs one row of work.

The memory is taken once, for the whole length: a cache that grows by concatenation copies everything at every
token. Positions beyond `length` hold garbage and are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.errors import BellboxError


class KVCache:
    """Keys and values of every layer, preallocated.

    Attributes:
        keys: per layer `[batch, key-value heads, max_length, head_dim]`; values likewise.
        length: tokens held, the same in every layer and every sequence of the batch.
        max_length: tokens that fit.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        max_length: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch < 1 or max_length < 1:
            raise BellboxError(f"a KV cache of {batch} x {max_length} tokens; both must be at least 1")
        shape = (batch, heads, max_length, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.batch = batch
        self.max_length = max_length
        self.length = 0

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
            keys: `[batch, heads, T, head_dim]`, rotated already; values likewise. Stored in the cache's
                dtype.

        Returns:
            views on all keys and values so far, `[batch, heads, length + T, head_dim]`.
        """
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has written."""
        self.length += tokens

    def reset(self) -> None:
        """Forget everything; the memory stays for the next prompt."""
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(tensor.nbytes for tensor in self.keys + self.values)
