"""Several corpora read as one, each with a weight: which of them a sample comes from is a function of its number.

Samples go by in rounds of 4,096. In each round a corpus has as many places as its weight asks for, to the nearest
4,096th, and a pseudo-random permutation says which places those are. So the shares are exact round by round, and the
place of a sample within its corpus follows from the number of the round: nothing is counted, stored or remembered. A
corpus goes through its own epochs at its own pace.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bellbox.data.batches import Permutation, Steps, Walk, key_of
from bellbox.data.shards import Manifest, ShardEntry, SplitEntry, TokenDataset, TokenSplit
from bellbox.errors import BellboxError

ROUND = 4096


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that no mixture can have.

    Raises:
        BellboxError: a weight that is not above 0 and finite, or too small beside the others.
    """
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise BellboxError(
                f"data.mixture: the weight of '{name}' is {weight}, must be above 0 and finite"
            )
    total = sum(weights.values())
    for name, weight in weights.items():
        if round(ROUND * weight / total) < 1:
            raise BellboxError(
                f"data.mixture: '{name}' has {weight / total:.2g} of the weight, the smallest share is 1 in {ROUND:,}; "
                "leave it out, or give it more"
            )


def shares_of(weights: list[float]) -> list[int]:
    """Places of each corpus in a round: `ROUND` in all, the nearest to the weights (largest remainders)."""
    exact = [ROUND * weight / sum(weights) for weight in weights]
    shares = [max(1, math.floor(each)) for each in exact]
    by_rest = sorted(range(len(weights)), key=lambda one: (shares[one] - exact[one], one))
    for turn in range(ROUND - sum(shares)):
        shares[by_rest[turn % len(by_rest)]] += 1
    while sum(shares) > ROUND:  # of many that were raised to one place
        shares[max(range(len(shares)), key=lambda one: shares[one])] -= 1
    return shares


class MixedDataset(TokenDataset):
    """Datasets of one tokenizer, with weights.

    The order in which they are given decides nothing: they are sorted by what they hold. The validation split is that
    of all of them together, each with its own size.

    Args:
        parts: datasets and their weights.

    Raises:
        BellboxError: none, two that hold the same, or different tokenizers.
    """

    def __init__(self, parts: list[tuple[TokenDataset, float]]) -> None:
        if not parts:
            raise BellboxError("a mixture of no datasets; name at least one")
        parts = sorted(parts, key=lambda part: part[0].content_checksum())
        first = parts[0][0]
        for (one, _), (other, _) in itertools.pairwise(parts):
            if one.content_checksum() == other.content_checksum():
                raise BellboxError(f"{one.path} and {other.path} hold the same; keep one, with both weights")
            if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise BellboxError(
                    f"{first.path} and {other.path} were made with different tokenizers; prepare one of them again "
                    f"with --tokenizer {first.path}"
                )
        self.parts = [dataset for dataset, _ in parts]
        self.shares = shares_of([weight for _, weight in parts])
        entries = {
            name: SplitEntry(
                tokens=sum(part.manifest.splits[name].tokens for part in self.parts),
                documents=sum(part.manifest.splits[name].documents for part in self.parts),
                bytes=sum(part.manifest.splits[name].bytes for part in self.parts),
                shards=[
                    ShardEntry(file=f"{number}/{shard.file}", tokens=shard.tokens, sha256=shard.sha256)
                    for number, part in enumerate(self.parts)
                    for shard in part.manifest.splits[name].shards
                ],
            )
            for name in first.splits
        }
        sources = [source for part in self.parts for source in part.manifest.sources]
        manifest = Manifest(**{**dict(first.manifest), "sources": sources, "splits": entries})
        arrays = {
            name: [array for part in self.parts for array in part.splits[name].shards]
            for name in first.splits
        }
        super().__init__(first.path, manifest, arrays)

    def file_of(self, shard: str) -> Path:
        """See `TokenDataset`."""
        number, _, name = shard.partition("/")
        return self.parts[int(number)].file_of(name)

    def checksum(self) -> str:
        """See `TokenDataset`; of the corpora and their shares."""
        return _digest(
            [[part.checksum(), share] for part, share in zip(self.parts, self.shares, strict=True)]
        )

    def content_checksum(self) -> str:
        """See `TokenDataset`; of the corpora and their shares."""
        parts = zip(self.parts, self.shares, strict=True)
        return _digest([[part.content_checksum(), share] for part, share in parts])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class MixedBatches(Steps):
    """The batches of a training run over several corpora.

    Args:
        splits: one of each corpus.
        shares: places of each in a round (`shares_of`).
        context, sequences_per_step, seed, rank, world_size: as of `Steps`.

    Raises:
        BellboxError: for a split shorter than one window, or sizes that do not fit.
    """

    def __init__(
        self,
        splits: list[TokenSplit],
        shares: list[int],
        context: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(context, sequences_per_step, seed, rank, world_size)
        # Each in an order of its own: else corpora of equal length would go by in step.
        self.walks = [Walk(split, context, key_of(seed, number, 3)) for number, split in enumerate(splits)]
        self.shares = shares
        self._begins = np.cumsum([0, *shares])
        self._orders: dict[int, Permutation] = {}

    def places(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The corpus of each sample and its place in the order of that corpus, int64 `[n]` each."""
        rounds, slots = np.divmod(np.asarray(samples, dtype=np.int64), ROUND)
        mixed = np.empty_like(slots)
        for number in np.unique(rounds).tolist():
            here = rounds == number
            mixed[here] = self._order(number)(slots[here])
        corpus = np.searchsorted(self._begins, mixed, side="right") - 1
        return corpus, rounds * np.array(self.shares)[corpus] + mixed - self._begins[corpus]

    def windows(self, samples: np.ndarray) -> list[np.ndarray]:
        """See `Steps`."""
        corpora, places = self.places(samples)
        found: list[np.ndarray] = [np.empty(0, np.int64)] * len(samples)
        for number in np.unique(corpora).tolist():
            walk, here = self.walks[number], np.flatnonzero(corpora == number)
            for place, start in zip(here.tolist(), walk.starts(places[here]).tolist(), strict=True):
                found[place] = walk.read(start)
        return found

    def _order(self, number: int) -> Permutation:
        if number not in self._orders:
            self._orders = {number: Permutation(ROUND, self.seed, number, 2)}
        return self._orders[number]
