"""Continuous batching: texts join and leave between the steps of a decoder, and each is the one that `generate` writes.

`Batcher` is the plain core, without threads, queues or text: a caller adds a `Continuation` whenever a slot is free and
calls `advance` for the next tokens. `generate_batch` does that for a list of prompts; the server (`bellbox.serve`) does
it for requests as they come.

```python
texts = generate_batch(model, [[1, 5, 7], [3]], max_new_tokens=100, temperature=0.8, seeds=[0, 1])
```
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.inference.generation import PROMPT_PIECE, check_known, prompt_pieces
from bellbox.inference.sampling import Sampling, finite_rows, generator_for, not_finite, sample_each
from bellbox.inference.slots import SlotDecoder
from bellbox.ops.cache_codes import CachePrecision


class Continuation:
    """A prompt, how it is continued, and what has come of it.

    Attributes:
        new_ids: tokens so far, the stop token included.
        finished: whether no more will come: the stop token came, or as many tokens as were asked for.
        error: why it cannot go on, where it failed.

    Raises:
        BellboxError: an empty prompt, or a seed beyond 64 bits.
    """

    def __init__(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        if not prompt_ids:
            raise BellboxError("the prompt is empty; give at least one token")
        self.prompt_ids = list(prompt_ids)
        self.sampling = sampling
        self.generator = generator_for(sampling.seed)
        self.new_ids: list[int] = []
        self.finished = False
        self.error: BellboxError | None = None

    @property
    def stopped(self) -> bool:
        """Whether the stop token came."""
        return bool(self.new_ids) and self.new_ids[-1] == self.sampling.stop_token

    def _take(self, token: int) -> None:
        self.new_ids.append(token)
        self.finished = self.stopped or len(self.new_ids) == self.sampling.max_new_tokens


def take_next(continuations: Sequence[Continuation], logits: Tensor) -> None:
    """Sample the next token of each from its row of logits `[n, vocab_size]`.

    A row that is not finite ends its continuation with an error, and concerns no other.
    """
    settings = [each.sampling for each in continuations], [each.generator for each in continuations]
    tokens = sample_each(logits, *settings)
    for each, token, finite in zip(continuations, tokens, finite_rows(logits), strict=True):
        if finite:
            each._take(token)
        else:
            each.error, each.finished = not_finite(len(each.new_ids) + 1), True


class Batcher:
    """Continuations in the slots of a decoder.

    Args:
        decoder: whose free slots it takes.
    """

    def __init__(self, decoder: SlotDecoder) -> None:
        self._decoder = decoder
        self._slots: dict[Continuation, int] = {}
        self._prompts: dict[Continuation, deque[Tensor]] = {}
        self._decoding: list[Continuation] = []

    def __len__(self) -> int:
        """Continuations that have a slot."""
        return len(self._slots)

    @property
    def room(self) -> int:
        """Free slots."""
        return len(self._decoder.free)

    def check(self, each: Continuation) -> None:
        """Whether a continuation can be added once there is room.

        Raises:
            BellboxError: it is longer than a slot, or has tokens that the model does not know.
        """
        check_continuation(self._decoder, each)

    def add(self, each: Continuation) -> None:
        """Give it a slot; its first token comes from a later `advance`.

        Raises:
            BellboxError: as `check`, or there is no free slot.
        """
        self.check(each)
        if not self.room:
            raise BellboxError(f"all {len(self)} slots are taken; wait for one, or make the decoder larger")
        self._slots[each] = self._decoder.free.pop()
        self._prompts[each] = deque(prompt_pieces(torch.tensor([each.prompt_ids])))

    def remove(self, each: Continuation) -> None:
        """Take its slot back, whatever it is at; nothing where it has none."""
        if each not in self._slots:
            return
        self._decoder.release(self._slots.pop(each))
        if self._prompts.pop(each, None) is None:
            self._decoding.remove(each)

    def advance(self) -> list[Continuation]:
        """Some of the prompts, then one token of each whose prompt is done. Finished ones have left.

        A round takes one piece of a long prompt, or several short prompts of no more tokens together, so that those who
        are being decoded wait for no more than that.

        Returns:
            those that have a new token, or failed.
        """
        going = list(self._decoding)
        changed = self._prefill()
        if going:
            logits = self._decoder.step([self._slots[c] for c in going], [c.new_ids[-1] for c in going])
            take_next(going, logits)
        changed += going
        for each in changed:
            if each.finished:
                self.remove(each)
        return changed

    def _prefill(self) -> list[Continuation]:
        """Those whose prompt came to its end and gave a first token."""
        spent, begun = 0, []
        for each, pieces in list(self._prompts.items()):
            while pieces and (not spent or spent + pieces[0].shape[1] <= PROMPT_PIECE):
                piece = pieces.popleft()
                spent += piece.shape[1]
                logits = self._decoder.prefill(self._slots[each], piece)
                if not pieces:
                    del self._prompts[each]
                    self._decoding.append(each)
                    take_next([each], logits)
                    begun.append(each)
            if spent >= PROMPT_PIECE or each in self._prompts:
                break
        return begun


def check_continuation(decoder: SlotDecoder, each: Continuation) -> None:
    """Whether a decoder can take a continuation.

    Raises:
        BellboxError: it is longer than a slot, or has tokens that the model does not know.
    """
    prompt, wanted, most = len(each.prompt_ids), each.sampling.max_new_tokens, decoder.max_length
    if prompt + wanted > most:
        raise BellboxError(
            f"a prompt of {prompt:,} and {wanted:,} new tokens are more than the {most:,} that fit; "
            "shorten the prompt or ask for fewer"
        )
    check_known(decoder.model, min(each.prompt_ids), max(each.prompt_ids))


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
    stop_token: int | None = None,
    kv_cache: CachePrecision = "fp32",
    slots: int = 16,
) -> list[list[int]]:
    """Continue prompts of any lengths, some of them at once.

    Args:
        model: a LLaMA or GPT of Bellbox on the CPU; packed, it decodes them together.
        prompts: token ids of each.
        max_new_tokens: of each at most.
        temperature: as for `generate`, and so are the rest that have its names.
        top_k: likewise.
        top_p: likewise.
        seeds: one for each prompt; fresh ones where None.
        stop_token: ends a text; it is the last token of the result.
        kv_cache: what keys and values are kept in.
        slots: sequences at once; each takes memory for the longest.

    Returns:
        the new tokens of each prompt: those that `generate` gives for it alone with its seed.

    Raises:
        BellboxError: as `generate`; not as many seeds as prompts; logits that are not finite.
    """
    if seeds is not None and len(seeds) != len(prompts):
        raise BellboxError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    if slots < 1:
        raise BellboxError(f"slots is {slots}; it must be at least 1")
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, stop_token=stop_token)
    made = [
        Continuation(each, sampling if seeds is None else replace(sampling, seed=seeds[i]))
        for i, each in enumerate(prompts)
    ]
    if not made:
        return []
    longest = max(map(len, prompts)) + max_new_tokens
    batcher = Batcher(SlotDecoder(model, min(slots, len(made)), longest, kv_cache))
    for each in made:
        batcher.check(each)
    waiting = deque(made)
    while waiting or len(batcher):
        while waiting and batcher.room:
            batcher.add(waiting.popleft())
        for each in batcher.advance():
            if each.error is not None:
                raise each.error
    return [each.new_ids for each in made]
