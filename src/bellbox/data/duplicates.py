"""Documents that occur more than once: equal ones by their hash, similar ones by MinHash.

The first of them in the order of the corpus is kept, whichever process read it. Equal means equal to the byte: 64 bits
of BLAKE2b are compared, with which one document of 365 million (C4) would be dropped by mistake in one run of 280.
Similar means that the sets of runs of five words have a Jaccard similarity of at least a threshold, as 128 permutations
estimate it (Broder 1997); candidates come from the index of the package `datasketch`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bellbox.errors import BellboxError, require

PERMUTATIONS = 128
_SCHEME = "affine32"
"""Of `datasketch`: how the permutations are computed."""
_WORDS = 5
_MOST_RUNS = 16


class Seen:
    """The hashes of all documents so far, in eight bytes each."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def new(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these documents (int64 `[n]`) occur for the first time, bool `[n]`; they are remembered."""
        distinct, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(distinct), dtype=bool)
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            known |= run[place] == distinct
        fresh = np.zeros(len(hashes), dtype=bool)
        fresh[first[~known]] = True
        if not known.all():
            self._runs.append(distinct[~known])
        if len(self._runs) > _MOST_RUNS:
            self._runs = [np.sort(np.concatenate(self._runs))]
        return fresh


class Signatures:
    """MinHash signatures of documents, piece by piece.

    Args:
        permutations: numbers of a signature.

    Raises:
        BellboxError: `datasketch` is not installed.
    """

    def __init__(self, permutations: int) -> None:
        self._empty: Any = require("datasketch", "dedup").MinHash(
            num_perm=permutations, seed=1, scheme=_SCHEME
        )
        self._current, self._done = self._empty.copy(), []

    def update(self, text: str) -> None:
        """Go on with the current document."""
        words = text.lower().split()
        runs = {" ".join(words[i : i + _WORDS]) for i in range(max(1, len(words) - _WORDS + 1))}
        self._current.update_batch([run.encode() for run in sorted(runs)])

    def close(self, *, keep: bool) -> None:
        """The current document ends."""
        if keep:
            self._done.append(self._current.hashvalues.astype(np.uint32))
        self._current = self._empty.copy()

    def take(self) -> np.ndarray:
        """The signatures of the documents since the last time, uint32 `[documents, permutations]`."""
        found = np.array(self._done, dtype=np.uint32).reshape(-1, len(self._empty))
        self._done = []
        return found


class Similar:
    """An index of the documents so far; it grows by about five kilobytes a document.

    Args:
        threshold: Jaccard similarity from which on two documents are taken for one, in (0, 1).

    Raises:
        BellboxError: `datasketch` is not installed, or no such threshold.
    """

    def __init__(self, threshold: float) -> None:
        check_threshold(threshold)
        self._library: Any = require("datasketch", "dedup")
        self._index = self._library.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._threshold = threshold
        self._kept: list[np.ndarray] = []

    def new(self, signatures: np.ndarray) -> np.ndarray:
        """Which of these documents resemble none before them, bool `[n]`; they are remembered.

        Args:
            signatures: uint32 `[n, permutations]`.
        """
        fresh = np.zeros(len(signatures), dtype=bool)
        for place, values in enumerate(signatures):
            entry = self._library.MinHash(
                num_perm=PERMUTATIONS, seed=1, scheme=_SCHEME, hashvalues=values.astype(np.uint64)
            )
            if any(np.mean(self._kept[one] == values) >= self._threshold for one in self._index.query(entry)):
                continue
            fresh[place] = True
            self._index.insert(len(self._kept), entry)
            self._kept.append(values)
        return fresh


def check_threshold(threshold: float) -> None:
    """Refuse a similarity that is none.

    Raises:
        BellboxError: it is not between 0 and 1.
    """
    if not 0.0 < threshold < 1.0:
        raise BellboxError(f"similarity of near duplicates {threshold}: must be between 0 and 1, such as 0.8")
