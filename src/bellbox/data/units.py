"""A corpus in units of work: each is turned into parts on its own, whoever does it and in whatever order.

A unit is one large source, or several small ones that follow each other. What it becomes depends on the unit and on the
job's options alone. So any number of processes make the same parts, and parts that are there already, of a process that
was killed, need not be made again.

A unit's parts lie in the job's folder. Part 2 of unit 7 is

    000007-0002.bin     token ids in the stored type, fragment after fragment
    000007-0002.npy     int64 [fragments, 5]: split, tokens, UTF-8 bytes, whether a document ends, its hash (else 0)
    000007-0002.sig.npy uint32 [documents, permutations], where near duplicates are looked for
    000007-0002.json    what else is to be known; it comes last, so that a part without it is none

A part ends after `part_chars` characters. A unit that is taken up again is read from its beginning, which is cheap, and
encoded from where the last whole part ended.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bellbox.data import shards
from bellbox.data.duplicates import Signatures
from bellbox.data.pieces import Piece, cut_point
from bellbox.data.sources import Source
from bellbox.data.tables import Rows, Skipped
from bellbox.data.tokenizer import FILE_NAME, Tokenizer
from bellbox.utils.files import read_json, sync, write_text

JOB = "job.json"
UNIT_BYTES = 1 << 23
"""Small sources are put together until they have so many bytes on disk."""
PART_CHARS = 1 << 26
BATCH_CHARS = 1 << 20
MARGIN = 1 << 20
"""A corpus that is cut at a number of tokens ends with at most so many bytes of text more."""
_TELL_BYTES = 1 << 20
SPLIT, TOKENS, BYTES, ENDS, HASH = range(5)
"""Columns of a part's index."""


@dataclass(frozen=True)
class Unit:
    """Sources that are read one after the other."""

    sources: tuple[Source, ...]
    split: str | None = None
    """The split that all of it belongs to; None where each document's hash decides."""
    head: int | None = None
    """Characters for training, where the whole corpus is cut in two instead of choosing documents."""

    @property
    def size(self) -> int | None:
        """Bytes on disk; None where that is not known."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def look(self) -> list[Any]:
        """What changes when a file of it does: names, sizes, times."""
        files = [[source.name, source.shard, *_look(source.path)] for source in self.sources]
        return [files, self.split, self.head]


@dataclass(frozen=True)
class Job:
    """What every process needs to know to make the parts of a unit."""

    units: tuple[Unit, ...]
    fraction: float
    """Of the documents, for validation."""
    column: str = "text"
    skip_null: bool = False
    enough_tokens: int | None = None
    """Training tokens after which the rest of a unit, but for a margin, can no longer be of use."""
    permutations: int = 0
    """Numbers in a document's signature; 0 for none."""
    part_chars: int = PART_CHARS
    batch_chars: int = BATCH_CHARS

    def save(self, folder: Path) -> None:
        """Write it down for other processes."""
        write_text(folder / JOB, json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Read it back."""
        fields = json.loads((folder / JOB).read_bytes())
        units = tuple(
            Unit(tuple(map(_source, unit["sources"])), unit["split"], unit["head"])
            for unit in fields.pop("units")
        )
        return cls(units=units, **fields)

    def options(self) -> dict[str, Any]:
        """All that decides what the parts of a unit are, besides the unit and the tokenizer."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "units"}


def _look(path: Path | None) -> list[int]:
    if path is None:
        return []
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _source(fields: dict[str, Any]) -> Source:
    path, shard = fields.pop("path"), fields.pop("shard")
    return Source(
        path=None if path is None else Path(path), shard=None if shard is None else tuple(shard), **fields
    )


def grouped(found: Sequence[Source], split: str | None = None) -> list[Unit]:
    """Sources in their order, small ones that follow each other together."""
    units: list[Unit] = []
    waiting: list[Source] = []
    room = UNIT_BYTES
    for source in found:
        size = UNIT_BYTES if source.size is None else source.size
        if waiting and size > room:
            units.append(Unit(tuple(waiting), split))
            waiting, room = [], UNIT_BYTES
        waiting.append(source)
        room -= size
    return [*units, Unit(tuple(waiting), split)] if waiting else units


class Router:
    """Sends each document to a split, piece by piece; all to one where there is no fraction.

    Args:
        fraction: of the documents, for validation.
        head: characters that are for training, where the whole text is cut in two instead.
        split: where all documents go, without a fraction.
    """

    def __init__(self, fraction: float | None, head: int | None, split: str = "train") -> None:
        self._fraction, self._head, self._all = fraction, head, split

    def route(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, Piece]]:
        """Each piece with its split."""
        if self._head is not None:
            yield from self._cut(pieces, self._head)
            return
        split: str | None = None
        for piece in pieces:
            split = split or (self._all if self._fraction is None else split_of(piece.text, self._fraction))
            yield split, piece
            if piece.ends:
                split = None

    def _cut(self, pieces: Iterable[Piece], head: int) -> Iterator[tuple[str, Piece]]:
        for piece in pieces:
            if head <= 0:
                yield "valid", piece
            elif len(piece.text) <= head:
                head -= len(piece.text)
                yield "train", Piece(piece.text, piece.ends or not head)
            else:
                cut = cut_point(piece.text, head)
                head = 0
                yield "train", Piece(piece.text[:cut], True)
                yield "valid", Piece(piece.text[cut:], piece.ends)
        self._head = head  # the next source goes on from here


def split_of(beginning: str, fraction: float) -> str:
    """A function of the document alone, so equal documents stay on one side."""
    place = int.from_bytes(hashlib.sha256(beginning.encode()).digest()[:7], "big") / (1 << 56)
    return "valid" if place < fraction else "train"


def router_of(unit: Unit, fraction: float) -> Router:
    """How the documents of a unit are sent to splits."""
    if unit.split is not None:
        return Router(None, None, unit.split)
    return Router(fraction, unit.head)


@dataclass(frozen=True)
class Part:
    """One finished part of a unit."""

    folder: Path
    unit: int
    number: int
    about: dict[str, Any] = field(repr=False)

    @classmethod
    def find(cls, folder: Path, unit: int, number: int) -> Part | None:
        """It, if it is there and whole."""
        file = _stem(folder, unit, number).with_suffix(".json")
        return cls(folder, unit, number, read_json(file)) if file.is_file() else None

    @property
    def is_last(self) -> bool:
        """Whether the unit ends with it."""
        return bool(self.about["last"])

    @property
    def pieces(self) -> int:
        """Pieces of the unit up to its end."""
        return int(self.about["pieces"])

    @property
    def skipped(self) -> Skipped:
        """Rows of the unit up to its end that gave no document."""
        return Skipped(**self.about["skipped"])

    def index(self) -> np.ndarray:
        """Int64 `[fragments, 5]`."""
        return np.load(self._file(".npy"), allow_pickle=False)

    def signatures(self) -> np.ndarray:
        """Uint32 `[documents that end in it, permutations]`."""
        return np.load(self._file(".sig.npy"), allow_pickle=False)

    def tokens(self, dtype: str) -> np.ndarray:
        """Its token ids, mapped."""
        file = self._file(".bin")
        kind = shards.DTYPES[dtype]
        return np.memmap(file, dtype=kind, mode="r") if file.stat().st_size else np.empty(0, kind)

    def drop_tokens(self) -> None:
        """Remove the tokens, which stand in shards by now; the index stays."""
        self._file(".bin").unlink(missing_ok=True)

    def _file(self, ending: str) -> Path:
        return _stem(self.folder, self.unit, self.number).with_suffix(ending)


def parts_of(folder: Path, unit: int) -> list[Part]:
    """The finished parts of a unit, without a gap."""
    found: list[Part] = []
    while (part := Part.find(folder, unit, len(found))) is not None:
        found.append(part)
    return found


def encode_unit(job: Job, number: int, folder: Path, tokenizer: Tokenizer) -> Iterator[dict[str, int]]:
    """Make the parts of a unit that are not there yet.

    Args:
        job: what to make of it.
        number: the unit's place in the job.
        folder: for the parts.
        tokenizer: to encode with.

    Yields:
        `{"read": bytes}` now and then, and `{"part": number}` for each part, also for those that were there.

    Raises:
        BellboxError: a source that cannot be read.
    """
    unit = job.units[number]
    there = parts_of(folder, number)
    for part in there:
        yield {"part": part.number}
    if there and there[-1].is_last:
        return
    skipped, read = Skipped(), [0]
    rows = Rows(job.column, job.skip_null, skipped)

    def count(more: int) -> None:
        read[0] += more

    def pieces() -> Iterator[tuple[str, Piece]]:
        router = router_of(unit, job.fraction)
        for source in unit.sources:
            yield from router.route(source.pieces(rows, count))

    writer = _PartWriter(job, number, folder, tokenizer, len(there))
    done = there[-1].pieces if there else 0
    for place, (split, piece) in enumerate(pieces()):
        writer.take(split, piece, encode=place >= done)
        if read[0] >= _TELL_BYTES:
            yield {"read": read[0]}
            read[0] = 0
        if writer.is_full:
            yield {"part": writer.finish(place + 1, skipped, last=False)}
        if writer.has_enough and piece.ends:
            break
    yield {"read": read[0]}
    yield {"part": writer.finish(-1, skipped, last=True)}


class _PartWriter:
    def __init__(self, job: Job, unit: int, folder: Path, tokenizer: Tokenizer, number: int) -> None:
        self._job, self._unit, self._folder, self._tokenizer = job, unit, folder, tokenizer
        self._dtype = shards.DTYPES[shards.dtype_for(tokenizer.vocab_size)]
        self._end = np.array([tokenizer.end_of_text], self._dtype).tobytes()
        self._number = number
        self._hash = hashlib.blake2b(digest_size=8)
        self._signatures = Signatures(job.permutations) if job.permutations else None
        self._train_tokens = self._bytes = 0
        self._stop: int | None = None
        self._begin()

    def _begin(self) -> None:
        self._file: Any = None
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._waiting: list[tuple[str, str, int, int | None]] = []
        self._chars = self._batch = 0

    @property
    def is_full(self) -> bool:
        return self._chars >= self._job.part_chars

    @property
    def has_enough(self) -> bool:
        """Whether the rest can be of no use."""
        return self._stop is not None and self._bytes >= self._stop

    def take(self, split: str, piece: Piece, *, encode: bool) -> None:
        content = piece.text.encode()
        self._hash.update(content)
        if self._signatures is not None:
            self._signatures.update(piece.text)
        ended = None
        if piece.ends:
            ended = int.from_bytes(self._hash.digest(), "little", signed=True)
            self._hash = hashlib.blake2b(digest_size=8)
            if self._signatures is not None:
                self._signatures.close(keep=encode)
        if not encode:
            return
        self._waiting.append((split, piece.text, len(content), ended))
        self._chars += len(piece.text)
        self._batch += len(piece.text) + 1
        if self._batch >= self._job.batch_chars:
            self._flush()

    def finish(self, pieces: int, skipped: Skipped, *, last: bool) -> int:
        """Put the part in place; returns its number."""
        self._flush()
        stem = _stem(self._folder, self._unit, self._number)
        self._open().close()
        os.replace(self._temporary(".bin"), stem.with_suffix(".bin"))
        self._save(".npy", np.array(self._rows, dtype=np.int64).reshape(-1, 5))
        if self._signatures is not None:
            self._save(".sig.npy", self._signatures.take())
        sync(stem.with_suffix(".bin"))
        about = {"pieces": pieces, "last": last, "skipped": dataclasses.asdict(skipped)}
        write_text(stem.with_suffix(".json"), json.dumps(about))
        self._begin()
        self._number += 1
        return self._number - 1

    def _open(self) -> Any:
        if self._file is None:
            self._file = self._temporary(".bin").open("wb")
        return self._file

    def _flush(self) -> None:
        batch = self._tokenizer.encode_batch([text for _, text, _, _ in self._waiting])
        file = self._open()
        for (split, _, size, ended), ids in zip(self._waiting, batch, strict=True):
            shards.refuse_wrapping(ids, self._dtype)
            file.write(ids.astype(self._dtype).tobytes())
            count = len(ids)
            if ended is not None:
                file.write(self._end)
                count += 1
            row = shards.SPLITS.index(split), count, size, int(ended is not None), ended or 0
            self._rows.append(row)
            self._train_tokens += count if split == "train" else 0
            self._bytes += size
        enough = self._job.enough_tokens
        if enough is not None and self._stop is None and self._train_tokens >= enough:
            self._stop = self._bytes + MARGIN
        self._waiting.clear()
        self._batch = 0

    def _save(self, ending: str, values: np.ndarray) -> None:
        temporary, target = (
            self._temporary(ending),
            _stem(self._folder, self._unit, self._number).with_suffix(ending),
        )
        with temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def _temporary(self, ending: str) -> Path:
        # Of this process: one that should be dead by now may still write.
        return self._folder / f"writing-{os.getpid()}-{self._unit:06d}-{self._number:04d}{ending}"


def _stem(folder: Path, unit: int, number: int) -> Path:
    return folder / f"{unit:06d}-{number:04d}"


def load_tokenizer(folder: Path, end_of_text: int) -> Tokenizer:
    """The job's tokenizer."""
    return Tokenizer.load(folder / FILE_NAME, end_of_text)
