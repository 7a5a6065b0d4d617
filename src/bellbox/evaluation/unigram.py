"""The floor that a trained model must beat: a model that knows how often each token occurs, and nothing else.

It predicts every token from the training split's counts alone, in full precision, with one added to each
count so that a token never seen costs a finite number of bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bellbox.data.shards import TokenDataset, TokenSplit
from bellbox.errors import BellboxError

_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class UnigramResult:
    """A unigram model's score on a validation split, on the same tokens as `perplexity` scores."""

    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """None where no scored token stands for bytes."""
    tokens: int
    """Tokens scored: all but the first."""


def counts(split: TokenSplit, vocab_size: int) -> np.ndarray:
    """Occurrences of each token id, int64 `[vocab_size]`."""
    total = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(split), _AT_ONCE):
        total += np.bincount(split.read(start, min(start + _AT_ONCE, len(split))), minlength=vocab_size)
    return total


def unigram(dataset: TokenDataset, train: str = "train", valid: str = "valid") -> UnigramResult:
    """Count one split, score another.

    Args:
        dataset: the dataset that holds both.
        train: name of the split to count.
        valid: name of the split to score.

    Raises:
        BellboxError: for a split that is missing, or one of under two tokens to score.
    """
    scored = dataset.split(valid)
    if len(scored) < 2:
        raise BellboxError(f"split '{valid}' holds {len(scored)} tokens: at least 2 are needed")
    smoothed = counts(dataset.split(train), dataset.vocab_size) + 1
    nats_of = -np.log(smoothed / smoothed.sum())
    seen = counts(scored, dataset.vocab_size)
    first = int(scored.read(0, 1)[0])
    seen[first] -= 1
    nats = float((seen * nats_of).sum())
    tokens = len(scored) - 1
    size = scored.bytes - int(dataset.byte_lengths()[first])
    loss = nats / tokens
    return UnigramResult(loss, math.exp(loss), nats / math.log(2) / size if size else None, tokens)
