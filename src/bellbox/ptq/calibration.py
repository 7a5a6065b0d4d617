"""Calibration text: whole sequences of tokens, spread evenly over a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bellbox.data.sources import resolve
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError

_CHARACTERS_A_TOKEN = 16


def calibration_tokens(tokenizer: Tokenizer, source: str | Path, samples: int, context: int) -> Tensor:
    """Sequences at equal distances over a text, without overlap.

    Args:
        tokenizer: the model's own.
        source: a text file (plain, .gz, .xz, .zst), JSON lines, or a folder of them; of a long one, the first 16
            characters for each token that is wanted, some four times what these take.
        samples: number of sequences.
        context: tokens of each.

    Returns:
        int64 `[samples, context]`.

    Raises:
        BellboxError: no such file, or too little text.
    """
    needed = samples * context
    ids = [
        number
        for text in _documents(source, _CHARACTERS_A_TOKEN * needed)
        for number in tokenizer.encode(text)
    ]
    if len(ids) < needed:
        raise BellboxError(
            f"{source}: {len(ids):,} tokens are too little calibration text for {samples} samples of {context} tokens "
            f"({needed:,}); give more text, or fewer (--samples) or shorter ones (--context)"
        )
    step = (len(ids) - context) / max(samples - 1, 1)
    starts = [round(number * step) for number in range(samples)]
    tokens = torch.tensor(ids, dtype=torch.int64)
    return torch.stack([tokens[start : start + context] for start in starts])


def _documents(source: str | Path, most: int) -> Iterator[str]:
    """The documents of the first so many characters."""
    left, parts = most, []
    for piece in (piece for one in resolve([source]) for piece in one.pieces()):
        parts.append(piece.text[:left])
        left -= len(parts[-1])
        if piece.ends or left == 0:
            yield "".join(parts)
            parts = []
        if left == 0:
            return
