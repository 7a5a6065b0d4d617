"""Sequences that are decoded together though they come and go: each has a slot, and the numbers that it has alone.

A packed product of sixteen rows costs little more than one of one row, so that a server decodes whatever is running in
one step. What a sequence gets does not depend on the others, to the last bit: its prompt goes through the model by
itself, in the pieces that `generate` cuts it into, and a step computes each row as if it were alone (`decoding.py`). A
model that has no such step is called for one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bellbox.convert import require_causal
from bellbox.errors import BellboxError
from bellbox.inference.decoding import steps_for
from bellbox.inference.generation import evaluate
from bellbox.models import GPT, KVCache, Llama, SlotCache
from bellbox.ops.cache_codes import CachePrecision, check_cache_precision


class SlotDecoder:
    """A model and a cache of some slots; a slot is free until its first piece of prompt comes.

    Args:
        model: a language model on the CPU.
        slots: sequences at once.
        max_length: tokens of each, prompt included.
        precision: of keys and values.

    Raises:
        BellboxError: a model that is not causal, more tokens than its context, or no such precision.
    """

    def __init__(
        self, model: nn.Module, slots: int, max_length: int, precision: CachePrecision = "fp32"
    ) -> None:
        require_causal(model, "generating")
        check_cache_precision(precision)
        if not isinstance(model, Llama | GPT):
            raise BellboxError(f"a {type(model).__name__} is none of the models that are decoded in slots")
        store: KVCache = model.new_cache(slots, max_length, precision)
        self.model, self._cache = model, SlotCache(store)
        self._steps = steps_for(model, store)
        self.max_length = max_length
        self.free = list(range(slots))[::-1]
        """Slots that nobody has; take one off its end."""

    @property
    def is_joint(self) -> bool:
        """Whether a step decodes all sequences at once."""
        return self._steps is not None

    @torch.no_grad()
    def prefill(self, slot: int, piece: Tensor) -> Tensor:
        """Put a piece of a prompt, int64 `[1, T]` (`generation.prompt_pieces`), behind what the slot holds.

        Returns:
            logits `[1, vocab_size]` after its last token.
        """
        return evaluate(self.model, piece, self._cache.slots[slot])[:, -1]

    @torch.no_grad()
    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One more token for each of these sequences.

        Returns:
            logits `[n, vocab_size]`, in their order.

        Raises:
            BellboxError: a slot twice, unknown or full.
        """
        ids = torch.tensor(tokens)[:, None]
        if self._steps is not None:
            return self._steps.step_slots(self._cache, slots, ids)[:, -1]
        self._cache.check_room(slots)
        rows = [evaluate(self.model, ids[i : i + 1], self._cache.slots[slot]) for i, slot in enumerate(slots)]
        return torch.cat(rows)[:, -1]

    def release(self, slot: int) -> None:
        """Give a slot back; what it held is forgotten."""
        self._cache.slots[slot].reset()
        self.free.append(slot)
