"""Perplexity over a whole split, with its protocol: two numbers compare only where the protocol is the same.

The windows cover the split from its first token on. Every token but the first is scored exactly once. With
`stride = context` the windows share one token: the last target of one is the first input of the next. With a
smaller stride each window after the first scores only its last `stride` targets, each of which then has more
than `context - stride` tokens before it, at `context / stride` times the cost.

Losses are taken from fp32 logits and summed in float64. Bits per byte divides by the UTF-8 bytes of the
scored text, and so compares models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bellbox.data.shards import TokenSplit
from bellbox.errors import BellboxError

_LOGITS_AT_ONCE = 1 << 22  # fp32 elements of one cross-entropy chunk: 16 MiB


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured, and how."""

    loss: float
    """Mean negative log likelihood of the scored tokens, nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Total bits over the UTF-8 bytes of the scored text; None where the bytes are not known."""
    tokens: int
    """Tokens scored."""
    bytes: int | None
    """UTF-8 bytes of the scored tokens."""
    context: int
    stride: int
    protocol: str
    """The protocol in one line, to be printed beside the numbers."""


def perplexity(
    model: nn.Module,
    split: TokenSplit | np.ndarray | torch.Tensor,
    context: int,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    byte_lengths: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
    each: Callable[[int, np.ndarray], None] | None = None,
    kv_cache: str = "fp32",
    share: tuple[int, int] = (0, 1),
    add_up: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> PerplexityResult:
    """Perplexity and bits per byte of a causal language model; its train/eval modes are restored.

    Args:
        model: maps int64 tokens `[batch, T]` to logits `[batch, T, vocab]` (or to an object with `.logits`).
        split: a split of a dataset, or a 1-D sequence of integer tokens.
        context: tokens a window, at most what the model takes.
        stride: tokens between the beginnings of windows, 1 to `context`; `context` where None.
        batch_size: windows at once.
        max_tokens: score at most so many tokens, from the beginning; all where None.
        device: where to compute; where the model's first parameter lies if None. The model is not moved.
        byte_lengths: UTF-8 bytes of each token id, int64 `[vocab]`; a `TokenSplit` has its own.
        progress: called with (tokens scored, tokens to score) after every batch.
        each: called with the place of a token in the split and the losses from there on, nats, float64 `[n]`.
        kv_cache: with int8 or int4, each window goes through a cache in that precision (`Llama.new_cache`).
        share: rank and number of processes that evaluate together, each a share of the windows.
        add_up: the sum of a tensor over them, in all of them; needed where there are several.

    Raises:
        BellboxError: for sizes that do not fit, under two tokens, or logits that are NaN.
    """
    stride = context if stride is None else stride
    if context < 1 or batch_size < 1:
        raise BellboxError(f"context {context} and batch size {batch_size}: both must be at least 1")
    if not 1 <= stride <= context:
        raise BellboxError(f"stride {stride}: must be between 1 and the context, {context}")
    if max_tokens is not None and max_tokens < 1:
        raise BellboxError(f"at most {max_tokens} tokens: must be at least 1")
    total = len(split) if max_tokens is None else min(len(split), max_tokens + 1)
    if total < 2:
        raise BellboxError(
            f"{len(split)} tokens to evaluate on: at least 2 are needed, one of them as context"
        )
    if kv_cache != "fp32" and not hasattr(model, "new_cache"):
        raise BellboxError(f"a KV cache in {kv_cache}: a {type(model).__name__} has none of Bellbox's")
    if device is None:
        device = next((one.device for one in model.parameters()), torch.device("cpu"))

    nats, scored = 0.0, 0
    with evaluating(model), torch.no_grad():
        for number, windows in enumerate(_batches(total, context, stride, batch_size)):
            if number % share[1] != share[0]:
                scored += windows[0][2] * len(windows)
                continue
            rows = np.stack([_read(split, start, stop + 1) for start, stop, _ in windows])
            tokens = torch.from_numpy(rows).to(device)
            new = windows[0][2]
            inputs = tokens[:, :-1]
            if kv_cache == "fp32":
                output = model(inputs)
            else:
                output = model(inputs, cache=model.new_cache(*inputs.shape, kv_cache))  # pyright: ignore[reportCallIssue]
            logits = logits_of(output)[:, -new:]
            try:
                nats += _sum_of_losses(logits, tokens[:, -new:], scored + 1, each)
            except BellboxError:
                if share[1] == 1:
                    raise
                nats = math.nan  # none of several processes may leave alone
            scored += new * len(windows)
            if progress is not None:
                progress(scored, total - 1)

    if add_up is not None:
        nats = add_up(torch.tensor([nats], dtype=torch.float64)).item()
    if math.isnan(nats):
        raise BellboxError("the model's logits are NaN in one of the processes; its weights are not finite")
    size = _scored_bytes(split, total, byte_lengths)
    loss = nats / scored
    rule = (
        "disjoint targets"
        if stride == context
        else f"the last {stride} targets of each window after the first"
    )
    cut = "" if total == len(split) else f" (the first {total:,} of {len(split):,})"
    return PerplexityResult(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / size if size else None,
        tokens=scored,
        bytes=size,
        context=context,
        stride=stride,
        protocol=f"{scored:,} tokens{cut} scored once each, context {context}, stride {stride} ({rule})"
        + ("" if kv_cache == "fp32" else f", KV cache {kv_cache}"),
    )


def _batches(total: int, context: int, stride: int, batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Windows (first input, last target, targets to score), in batches of equal shape."""
    batch: list[tuple[int, int, int]] = []
    done = 0  # last token scored
    start = 0
    while done < total - 1:
        stop = min(start + context, total - 1)
        window = (start, stop, stop - done)
        if batch and (len(batch) == batch_size or _shape(batch[0]) != _shape(window)):
            yield batch
            batch = []
        batch.append(window)
        done = stop
        start += stride
    yield batch


def _shape(window: tuple[int, int, int]) -> tuple[int, int]:
    return window[1] - window[0], window[2]


def _read(split: TokenSplit | np.ndarray | torch.Tensor, start: int, stop: int) -> np.ndarray:
    if isinstance(split, TokenSplit):
        return split.read(start, stop)
    return np.asarray(split[start:stop]).astype(np.int64)


def logits_of(output: Any) -> torch.Tensor:
    """What a model gave: the logits, or an object that has them."""
    return output if isinstance(output, torch.Tensor) else output.logits


def _sum_of_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    each: Callable[[int, np.ndarray], None] | None,
) -> float:
    """Sum over `[batch, T, vocab]` and `[batch, T]` of the cross entropy, a bounded part of it at a time."""
    vocab = logits.shape[-1]
    rows, labels = logits.reshape(-1, vocab), targets.reshape(-1)
    step = max(1, _LOGITS_AT_ONCE // vocab)
    total = 0.0
    for at in range(0, len(labels), step):
        losses = F.cross_entropy(rows[at : at + step].float(), labels[at : at + step], reduction="none")
        nats = losses.cpu().double()
        part = nats.sum().item()
        if math.isnan(part):
            raise BellboxError(
                f"the model's logits are NaN among scored tokens {first:,} to {first + len(labels) - 1:,}; "
                "its weights or its inputs are not finite"
            )
        total += part
        if each is not None:
            each(first + at, nats.numpy())
    return total


def _scored_bytes(
    split: TokenSplit | np.ndarray | torch.Tensor, total: int, byte_lengths: np.ndarray | None
) -> int | None:
    """UTF-8 bytes of tokens 1 to total - 1."""
    if isinstance(split, TokenSplit):
        lengths = split.dataset.byte_lengths() if byte_lengths is None else byte_lengths
        if total == len(split):  # exact for any tokenizer
            return split.bytes - int(lengths[split.read(0, 1)][0])
    elif byte_lengths is None:
        return None
    else:
        lengths = byte_lengths
    step = 1 << 20
    return sum(int(lengths[_read(split, at, min(at + step, total))].sum()) for at in range(1, total, step))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the while; each module gets its own mode back, frozen ones included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
