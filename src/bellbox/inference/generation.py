"""Text from a model, token by token, as it is made.

`generate` is a plain iterator over token ids: the prompt goes through the model, some hundred tokens at a time, and
fills the KV cache, then every token costs one row. `TextStream` turns ids into text without waiting for the end: a
character may be spread over several tokens, and it comes out when its last byte is there. `generate_text` puts the two
together with a tokenizer and a clock.

Decoding with the cache is the full forward, to the last bit where the compiled kernels are (fp32, on the CPU).
Elsewhere it is so to the last code with `model.exact_attention = True`, by default up to the order in which PyTorch's
attention sums, so that a value beside a threshold may get another code.

A model whose activations' scale looks at the whole batch (`granularity="tensor"`) is no function of the prefix,
so decoding it token by token would give another model than the trained one; it is refused before anything
runs.

```python
stream = generate_text(model, tokenizer, "Once upon a time", max_new_tokens=100, seed=0)
for piece in stream:
    print(piece, end="", flush=True)
print(f"{stream.decode_tokens_per_second:.0f} tokens/s")
```
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from bellbox.data.tokenizer import plain_ids
from bellbox.errors import BellboxError
from bellbox.inference.sampling import Sampling, generator_for, require_finite, sample
from bellbox.models import GPT, Llama
from bellbox.ops.cache_codes import CachePrecision, check_cache_precision

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPT_PIECE = 256
"""Tokens of a prompt that go through the model at once."""


def generate(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    kv_cache: CachePrecision = "fp32",
    fixed_shapes: bool = False,
) -> Iterator[Tensor]:
    """Continue every sequence of a batch, one token at a time.

    The arguments are checked at the call; the model first runs when the first token is asked for, in
    evaluation mode and without gradients, and gets its mode back after each token.

    Args:
        model: called as `model(input_ids, cache=..., last_only=True)`, with `new_cache(batch, max_length)`.
        input_ids: `[B, T]` int64, the prompts, all of one length.
        max_new_tokens: how many tokens at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest (exactly k, also among ties); None means all.
        top_p: sample among the fewest likeliest whose probabilities, after `top_k`, reach this sum; None
            means all.
        seed: makes the samples a function of it, by a random generator of their own; None draws a fresh one.
        stop_token: a sequence that has produced it goes on producing it; the iterator ends when all have.
        kv_cache: what keys and values are kept in: fp32 (the model's dtype), int8 or int4; the latter two are another
            function, for less memory and faster steps in long texts, and for the library's own models.
        fixed_shapes: steps whose shapes do not depend on how many came before (`graphs.StaticSteps`); on CUDA they are
            recorded as a graph, which nobody has seen run yet.

    Yields:
        the next token of each sequence, `[B]` int64 on the model's device; the stop token included.

    Raises:
        BellboxError: a value out of range, an empty prompt, more tokens than the context, a model that is not
            causal; later, logits that are not finite.
    """
    from bellbox.convert import require_causal

    require_causal(model, "generating")
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, stop_token)
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        shape = list(input_ids.shape)
        raise BellboxError(
            f"the prompt is {input_ids.dtype} of shape {shape}; it must be int64 [batch, tokens]"
        )
    batch, prompt = input_ids.shape
    if not batch or not prompt:
        raise BellboxError("the prompt is empty; give at least one token")
    check_known(model, int(input_ids.min()), int(input_ids.max()))
    check_cache_precision(kv_cache)
    if kv_cache != "fp32" and not isinstance(model, Llama | GPT):
        raise BellboxError(f"kv_cache is {kv_cache}; a {type(model).__name__} has a cache of its own, fp32")
    coding = () if kv_cache == "fp32" else (kv_cache,)
    try:
        cache = model.new_cache(batch, prompt + max_new_tokens, *coding)  # pyright: ignore[reportCallIssue]
    except BellboxError as error:
        raise BellboxError(f"a prompt of {prompt} and {max_new_tokens} new tokens: {error}") from error
    device = next((parameter.device for parameter in model.parameters()), input_ids.device)
    generator = generator_for(seed, device)
    steps = None
    if fixed_shapes:
        from bellbox.inference.graphs import fixed_steps

        steps = fixed_steps(model, cache)
    return _tokens(model, input_ids.to(device), cache, sampling, generator, steps)


def check_known(model: nn.Module, least: int, most: int) -> None:
    """Refuse tokens that a model does not know.

    Raises:
        BellboxError: the least or the largest of a prompt's is none of its vocabulary.
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and not 0 <= least <= most < vocabulary:
        raise BellboxError(
            f"the prompt holds token {most if most >= vocabulary else least}, but the model's vocabulary is "
            f"0..{vocabulary - 1}; is this the tokenizer that it was trained with?"
        )


# no_grad rather than inference_mode: a quantizer may keep what it computes here and use it in training. On a
# generator function it holds while the function runs, not while the caller does.
class Steps(Protocol):
    """What continues a sequence whose prompt is in a cache."""

    def step(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, 1, vocab_size]` after one more token of each sequence, `[B, 1]` int64."""
        ...


@torch.no_grad()
def _tokens(
    model: nn.Module,
    input_ids: Tensor,
    cache: object,
    sampling: Sampling,
    generator: torch.Generator,
    steps: Steps | None = None,
) -> Iterator[Tensor]:
    from bellbox.inference.decoding import steps_for

    stop_token = sampling.stop_token
    stopped = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    steps = steps or steps_for(model, cache)
    for count in range(sampling.max_new_tokens):
        if count and steps is not None:
            logits = steps.step(input_ids)[:, -1]
        else:
            *first, last = prompt_pieces(input_ids)
            for piece in first:
                evaluate(model, piece, cache)
            logits = evaluate(model, last, cache)[:, -1]
        require_finite(logits, count + 1)
        token = sample(logits, sampling, generator)
        if stop_token is not None:
            token = torch.where(stopped, stop_token, token)
            stopped |= token == stop_token
        yield token
        if stop_token is not None and stopped.all():
            return
        input_ids = token[:, None]


def prompt_pieces(input_ids: Tensor) -> tuple[Tensor, ...]:
    """A prompt `[B, T]` in the pieces in which it goes through a model, always the same ones.

    Torch's attention sums by the shape of a call, so a prompt that is cut otherwise has other last bits. Pieces keep
    the scores of a long prompt small, and let sequences that are decoded beside it go on in between.
    """
    return input_ids.split(PROMPT_PIECE, dim=1)


def evaluate(model: nn.Module, input_ids: Tensor, cache: object) -> Tensor:
    """The model's logits for the last token, in evaluation mode; every module's mode is put back."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        return model(input_ids, cache=cache, last_only=True)
    finally:
        for module in training:
            module.training = True


class TextStream:
    """Token ids to text, piece by piece, such that the pieces joined are what decoding all at once would
    give.

    A token may end in the middle of a character; the text up to there is held back until the character is
    complete. And a tokenizer may write a token differently at the start of a text (no space before the first
    word); so each piece is the difference between two decodings that begin at the same earlier token.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        prompt: the ids before the first one pushed; their text is not given out.
        skip_special_tokens: leave out such as `<|endoftext|>`.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # A few tokens of context do: they only have to make the first word not the first of the text.
        self._ids = list(prompt)[-8:]
        self._start, self._given = 0, len(self._ids)

    def push(self, token: int) -> str:
        """The text that this token completes: often a word, sometimes nothing yet."""
        self._ids.append(token)
        before, now = self._decode(self._given), self._decode(len(self._ids))
        if len(now) <= len(before) or now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """What is still held back, with a replacement character for an unfinished one."""
        rest = self._decode(len(self._ids))[len(self._decode(self._given)) :]
        self._start = self._given = len(self._ids)
        return rest

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._start : end], skip_special_tokens=self._skip)


class TextGeneration:
    """An iterator over pieces of text that keeps what was made and how fast.

    Attributes:
        prompt_ids: the prompt's tokens.
        new_ids: the tokens made so far, without the stop token.
        text: the text given out so far.
        prefill_seconds: from the first request to the first token: the prompt's pass through the model.
        decode_seconds: the time of the tokens after the first, without the caller's own.
    """

    def __init__(
        self, tokens: Iterator[Tensor], tokenizer: Tokenizer, prompt_ids: list[int], stop_token: int | None
    ) -> None:
        self._stop = stop_token
        self._made = 0
        self.prompt_ids = prompt_ids
        self.new_ids: list[int] = []
        self.text = ""
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._pieces = self._run(tokens, TextStream(tokenizer, prompt_ids))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, tokens: Iterator[Tensor], stream: TextStream) -> Iterator[str]:
        while True:
            start = time.perf_counter()
            token = next(tokens, None)
            number = None if token is None else int(token)  # waits for the device
            elapsed = time.perf_counter() - start
            if number is None:
                break
            if self._made:
                self.decode_seconds += elapsed
            else:
                self.prefill_seconds = elapsed
            self._made += 1
            if number == self._stop:
                break
            self.new_ids.append(number)
            if piece := stream.push(number):
                self.text += piece
                yield piece
        if piece := stream.flush():
            self.text += piece
            yield piece

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second until the first new token; 0 before it."""
        return len(self.prompt_ids) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second after the first; 0 before there are any."""
        return (self._made - 1) / self.decode_seconds if self.decode_seconds else 0.0


def generate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    kv_cache: CachePrecision = "fp32",
) -> TextGeneration:
    """Continue a text; iterate over the result for the pieces of the continuation as they are made.

    Args:
        model: as for `generate`, and so are the rest.
        tokenizer: a `tokenizers.Tokenizer`, the one that the model was trained with.
        prompt: at least one token's worth of text; its tokens are those that data preparation gives a document's
            beginning, without what a template would add (an end of text before anything is written, say).

    Raises:
        BellboxError: as `generate`, at this call.
    """
    prompt_ids = plain_ids(tokenizer, prompt)
    tokens = generate(
        model,
        torch.tensor([prompt_ids], dtype=torch.int64),
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        stop_token,
        kv_cache,
    )
    return TextGeneration(tokens, tokenizer, prompt_ids, stop_token)
