"""Parts to shards, in the order of the corpus: what stands in the shards does not depend on who made the parts when.

Here duplicates are dropped and the corpus is cut at its budget, since both depend on what came before. After each part
the shards are on the disk and a journal says how far they go; the part's tokens are then removed. A process that is
killed goes on from the journal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bellbox.data import shards
from bellbox.data.duplicates import Seen, Similar
from bellbox.data.units import BYTES, ENDS, HASH, MARGIN, SPLIT, TOKENS, Job, Part
from bellbox.utils.files import read_json, write_text

JOURNAL = "journal.json"


@dataclass
class Dropped:
    """Documents that were left out as duplicates."""

    equal: int = 0
    similar: int = 0


@dataclass
class _Waiting:
    """A part whose last document goes on in the next one."""

    part: Part
    index: np.ndarray
    kept: list[np.ndarray] = field(default_factory=list)
    """Of the documents that end in it, bool."""


class Assembler:
    """Takes the parts of a job one after the other.

    Args:
        job: their job.
        work: the job's folder; `parts/` and `dataset/` in it.
        dtype: stored type of the ids.
        shard_tokens: tokens a shard.
        most_tokens: of the training split, with which the corpus is cut; all where None.
        exact: whether to drop documents that are equal to an earlier one.
        similarity: from which on documents are dropped as similar to an earlier one; None to keep them.
    """

    def __init__(
        self,
        job: Job,
        work: Path,
        dtype: str,
        shard_tokens: int,
        *,
        most_tokens: int | None = None,
        exact: bool = False,
        similarity: float | None = None,
    ) -> None:
        self._job, self._work, self._dtype = job, work, dtype
        journal = read_json(work / JOURNAL) if (work / JOURNAL).is_file() else {}
        self._written = int(journal.get("parts", 0))
        saved = journal.get("splits", {})
        self.writers = {
            name: shards.ShardWriter(work / "dataset", name, dtype, shard_tokens, saved.get(name))
            for name in shards.SPLITS
        }
        self._seen = Seen() if exact else None
        self._similar = Similar(similarity) if similarity is not None else None
        self.dropped = Dropped()
        self._most = most_tokens
        self._train_tokens = self._bytes = 0
        self._stop: int | None = None
        self._taken = 0
        self._waiting: list[_Waiting] = []
        self.unit = self.part = 0
        """The part that is wanted next."""
        self.is_spent = False
        """Whether the budget is: further units of the training text are left out."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is missing any more."""
        return self.unit >= len(self._job.units)

    def skip_spent(self) -> None:
        """Go over the units that the budget leaves out."""
        while self.is_spent and not self.is_done and self._job.units[self.unit].split != "valid":
            self.unit, self.part = self.unit + 1, 0

    def take(self, part: Part) -> None:
        """The part that is wanted next."""
        index = part.index()
        signatures = part.signatures() if self._similar is not None else None
        waiting = _Waiting(part, index)
        self._waiting.append(waiting)
        waiting.kept.append(self._decide(index[index[:, ENDS] == 1], signatures))
        if part.is_last:
            self.unit, self.part = self.unit + 1, 0
        else:
            self.part += 1
        open_document = len(index) > 0 and not index[-1, ENDS]
        if not open_document or part.is_last:
            self._write()
        self.skip_spent()

    def _decide(self, documents: np.ndarray, signatures: np.ndarray | None) -> np.ndarray:
        kept = np.ones(len(documents), dtype=bool)
        if self._seen is not None:
            kept = self._seen.new(documents[:, HASH])
            self.dropped.equal += int((~kept).sum())
        if self._similar is not None and signatures is not None:
            places = np.flatnonzero(kept)
            fresh = self._similar.new(signatures[places])
            self.dropped.similar += int((~fresh).sum())
            kept[places[~fresh]] = False
        return kept

    def _write(self) -> None:
        """All parts that wait: every document in them is decided."""
        index = np.concatenate([waiting.index for waiting in self._waiting])
        decided = np.concatenate([kept for waiting in self._waiting for kept in waiting.kept])
        # A fragment belongs to the first document that ends at or after it.
        document = np.cumsum(index[:, ENDS]) - index[:, ENDS]
        kept = decided[document] if len(index) else np.zeros(0, dtype=bool)
        kept = self._within_budget(index, kept)
        begin = 0
        for waiting in self._waiting:
            rows = slice(begin, begin + len(waiting.index))
            begin = rows.stop
            self._taken += 1
            if self._taken > self._written:
                self._copy(waiting.part, waiting.index, kept[rows])
        if self._taken > self._written:
            self._journal()
        for waiting in self._waiting:
            waiting.part.drop_tokens()
        self._waiting.clear()

    def _within_budget(self, index: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Leave out what follows when the training split has its tokens, and the text a whole number of megabytes.

        The rest of a megabyte gives a small budget validation documents too.
        """
        if self._most is None or self._job.units[self._waiting[0].part.unit].split == "valid":
            return kept
        ends = index[:, ENDS] == 1
        tokens = self._train_tokens + np.cumsum(np.where(kept & (index[:, SPLIT] == 0), index[:, TOKENS], 0))
        size = self._bytes + np.cumsum(np.where(kept, index[:, BYTES], 0))
        reached = np.flatnonzero((tokens >= self._most) & ends)
        if self._stop is None and len(reached):
            self._stop = -(-int(size[reached[0]]) // MARGIN) * MARGIN
        over = np.flatnonzero(ends & (size >= (np.inf if self._stop is None else self._stop)))
        if len(over):
            self.is_spent = True
            kept = kept & (np.arange(len(kept)) <= over[0])
        if len(index):
            self._train_tokens, self._bytes = int(tokens[-1]), int(size[-1])
        return kept

    def _copy(self, part: Part, index: np.ndarray, kept: np.ndarray) -> None:
        tokens = part.tokens(self._dtype)
        for number, name in enumerate(shards.SPLITS):
            chosen = kept & (index[:, SPLIT] == number)
            writer = self.writers[name]
            ids = tokens if chosen.all() else tokens[np.repeat(chosen, index[:, TOKENS])]
            writer.append(ids, int(index[chosen, BYTES].sum()))
            writer.documents += int(index[chosen, ENDS].sum())

    def _journal(self) -> None:
        splits: dict[str, Any] = {name: writer.save() for name, writer in self.writers.items()}
        write_text(self._work / JOURNAL, json.dumps({"parts": self._taken, "splits": splits}))
        self._written = self._taken


def parts_written(work: Path) -> int:
    """How many parts of a job stand in its shards."""
    return int(read_json(work / JOURNAL).get("parts", 0)) if (work / JOURNAL).is_file() else 0
