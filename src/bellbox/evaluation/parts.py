"""Losses of a validation split part by part, so that two models can be compared on the same texts or images.

A part is a document, or several neighbours where there are more than `MOST`; a block of tokens where the split has
fewer than `FEWEST` documents (neighbouring blocks of one text are not independent, and the record says what they are);
of images, every so-manieth one, so that each part has its share of every class, in whatever order they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bellbox.data.shards import TokenSplit

MOST = 256
"""Parts of a split at most, so that a record stays within some kilobytes."""
FEWEST = 16
"""Documents: fewer say little about others, and blocks of tokens are taken in their place."""
SHORTEST = 64
"""Tokens of a block at least."""
_DIGITS = 6
_AT_ONCE = 1 << 22


class PartLosses:
    """Sums of what a model loses in each part of a split.

    Args:
        unit: what a part is made of: `documents`, `blocks of tokens` or `images`.
        count: number of parts.
        part_of: places in the split, int64 `[n]` -> their parts, int64 `[n]`, from 0 up.
    """

    def __init__(self, unit: str, count: int, part_of: Callable[[np.ndarray], np.ndarray]) -> None:
        self.unit, self._count, self._part_of = unit, count, part_of
        self._sizes, self._nats, self._right = np.zeros(count), np.zeros(count), np.zeros(count)
        self._judged = False

    def add(self, first: int, nats: np.ndarray, right: np.ndarray | None = None) -> None:
        """Count neighbours in.

        Args:
            first: place of the first one in the split.
            nats: its loss and those of the ones after it, float64 `[n]`.
            right: whether each was named rightly, bool `[n]`; of images alone.
        """
        parts = self._part_of(np.arange(first, first + len(nats)))
        self._sizes += np.bincount(parts, minlength=self._count)
        self._nats += np.bincount(parts, nats, self._count)
        if right is not None:
            self.judge()
            self._right += np.bincount(parts, right, self._count)

    def judge(self) -> None:
        """Say that these are parts of which something is named rightly, whoever counts it."""
        self._judged = True

    def add_up(self, over_processes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Count in what other processes have counted of the same split.

        Args:
            over_processes: the sum of a tensor over them, in all of them.
        """
        own = torch.from_numpy(np.stack((self._sizes, self._nats, self._right)))
        self._sizes, self._nats, self._right = over_processes(own).numpy()

    def record(self) -> dict[str, Any] | None:
        """`unit`; `sizes`, the tokens or images scored in each part; `losses`, mean nats of each; of images `right`,
        how many were named rightly. Parts without any are left out; None where a loss is not finite."""
        if not np.isfinite(self._nats).all():
            return None
        filled = self._sizes > 0
        sizes = self._sizes[filled]
        found: dict[str, Any] = {
            "unit": self.unit,
            "sizes": sizes.astype(int).tolist(),
            "losses": [float(f"{loss:.{_DIGITS}g}") for loss in self._nats[filled] / sizes],
        }
        if self._judged:
            found["right"] = self._right[filled].astype(int).tolist()
        return found


class TokenParts:
    """The parts of a split of tokens; read once, they serve every validation.

    Args:
        split: of a dataset, with an end-of-text token after each document.
    """

    def __init__(self, split: TokenSplit) -> None:
        ends = _document_ends(split)
        self.unit = "documents" if len(ends) >= FEWEST else "blocks of tokens"
        if len(ends) >= FEWEST:
            together = -(-len(ends) // MOST)
            self.ends = np.append(ends[together - 1 : -1 : together], len(split))
        else:
            count = max(1, min(MOST, len(split) // SHORTEST))
            self.ends = np.linspace(0, len(split), count + 1).astype(np.int64)[1:]

    def losses(self) -> PartLosses:
        """Sums of nothing yet."""
        return PartLosses(self.unit, len(self.ends), lambda at: np.searchsorted(self.ends, at, side="right"))


def image_losses(images: int) -> PartLosses:
    """Sums of nothing yet, for so many images in a fixed order."""
    count = min(MOST, images)
    return PartLosses("images", count, lambda at: at % count)


def _document_ends(split: TokenSplit) -> np.ndarray:
    """The place after each document, int64; the last one is the split's end."""
    found = [np.empty(0, np.int64)]
    for start in range(0, len(split), _AT_ONCE):
        tokens = split.read(start, min(start + _AT_ONCE, len(split)))
        found.append(np.flatnonzero(tokens == split.dataset.end_of_text) + start + 1)
    ends = np.concatenate(found)
    return ends if len(ends) and ends[-1] == len(split) else np.append(ends, len(split))
