"""Tokens on disk: flat files of integers that are mapped, not read, so a corpus costs no memory.

A dataset is a folder:

    tokenizer.json        the tokenizer, byte for byte
    manifest.json         everything needed to check and to open the rest
    train-00000.bin ...   token ids, little-endian uint16 (vocabulary up to 65,536) or uint32, nothing else
    valid-00000.bin ...

One end-of-text token stands after each document; shards are cut anywhere, and a split reads as one sequence.
The manifest holds per split the number of tokens, documents and UTF-8 bytes of text (for bits per byte), and
per shard its tokens and SHA-256, and closes with a SHA-256 of itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bellbox.errors import BellboxError
from bellbox.utils.files import JSON_LIMIT, TOKENIZER_LIMIT, read_bytes, read_text, sha256_file

if TYPE_CHECKING:
    from bellbox.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT = "bellbox-tokens"
VERSION = 1
SPLITS = ("train", "valid")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardEntry(_Strict):
    """One file of tokens."""

    file: str
    tokens: int = Field(ge=0)
    sha256: str


class SplitEntry(_Strict):
    """One split of the dataset."""

    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    bytes: int = Field(ge=0)
    """UTF-8 bytes of the documents, end-of-text tokens not counted."""
    shards: list[ShardEntry]


class Manifest(_Strict):
    """The contents of `manifest.json`."""

    format: Literal["bellbox-tokens"] = FORMAT
    version: int = VERSION
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1)
    end_of_text: int = Field(ge=0)
    tokenizer_sha256: str
    sources: list[str]
    splits: dict[str, SplitEntry]

    def checksum(self) -> str:
        """SHA-256 over the fields in a fixed spelling."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def content_checksum(self) -> str:
        """SHA-256 of tokenizer and tokens alone: equal wherever the sources lay when they were prepared."""
        content = self.model_dump(include={"tokenizer_sha256", "splits"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest stored type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def refuse_wrapping(ids: np.ndarray, dtype: np.dtype) -> None:
    """Refuse ids that would come back as other ones.

    Raises:
        BellboxError: one is beyond what the stored type holds.
    """
    if ids.dtype != dtype and len(ids):
        low, high, most = int(ids.min()), int(ids.max()), int(np.iinfo(dtype).max)
        if low < 0 or high > most:
            raise BellboxError(
                f"token id {high if high > most else low} does not fit into {dtype.name}, which holds 0 to {most}; "
                "the tokenizer has more entries than it says"
            )


class ShardWriter:
    """Appends tokens of one split to a folder, a new file every `shard_tokens`; memory stays constant.

    Args:
        folder: for the files.
        split: its name.
        dtype: stored type.
        shard_tokens: tokens a file.
        saved: where another writer stood (`save`): this one goes on from there, whatever was written after.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, shard_tokens: int, saved: dict[str, Any] | None = None
    ) -> None:
        if shard_tokens < 1:
            raise BellboxError(f"shards of {shard_tokens} tokens: a shard holds at least 1")
        self._folder, self._split, self._dtype, self._limit = folder, split, DTYPES[dtype], shard_tokens
        self._file: Any = None
        self._hash: Any = None
        self._room = 0
        self._shards: list[ShardEntry] = []
        self.tokens = self.documents = self.bytes = 0
        if saved is not None:
            self._restore(saved)

    def save(self) -> dict[str, Any]:
        """Have everything so far on the disk; what is returned finds the way back to here."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        entry = SplitEntry(
            tokens=self.tokens, documents=self.documents, bytes=self.bytes, shards=list(self._shards)
        )
        return entry.model_dump()

    def _restore(self, saved: dict[str, Any]) -> None:
        entry = SplitEntry.model_validate(saved)
        self._shards = list(entry.shards)
        self.tokens, self.documents, self.bytes = entry.tokens, entry.documents, entry.bytes
        whole = {shard.file for shard in entry.shards}
        begun = self.tokens - sum(shard.tokens for shard in entry.shards)
        for file in self._folder.glob(f"{self._split}-*.bin"):
            if file.name not in whole and (not begun or file.name != self._name()):
                file.unlink()
        if begun:
            self._file = (self._folder / self._name()).open("r+b")
            self._file.truncate(begun * self._dtype.itemsize)
            self._hash = hashlib.file_digest(self._file, "sha256")
            self._room = self._limit - begun

    def append(self, ids: np.ndarray, source_bytes: int) -> None:
        """Append token ids (any integer dtype, 1-D) that stand for so many bytes of text.

        Raises:
            BellboxError: an id that the stored type does not hold.
        """
        refuse_wrapping(ids, self._dtype)
        self.bytes += source_bytes
        while len(ids):
            if not self._room:
                self._next()
            part, ids = ids[: self._room], ids[self._room :]
            data = part.astype(self._dtype).tobytes()
            self._file.write(data)
            self._hash.update(data)
            self._room -= len(part)
            self.tokens += len(part)

    def close(self) -> SplitEntry:
        """Finish the last file and describe the split."""
        self._finish()
        return SplitEntry(
            tokens=self.tokens, documents=self.documents, bytes=self.bytes, shards=list(self._shards)
        )

    def abandon(self) -> None:
        """Close the file without describing anything, after an error."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next(self) -> None:
        self._finish()
        self._file = (self._folder / self._name()).open("xb")
        self._hash = hashlib.sha256()
        self._room = self._limit

    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.bin"

    def _finish(self) -> None:
        if self._file is None:
            return
        name = Path(self._file.name).name
        self._file.close()
        self._file = None
        tokens = self._limit - self._room
        self._shards.append(ShardEntry(file=name, tokens=tokens, sha256=self._hash.hexdigest()))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` with its checksum."""
    fields = manifest.model_dump() | {"sha256": manifest.checksum()}
    (folder / MANIFEST).write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        BellboxError: where it is missing, of another version, altered, or contradicts itself.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise BellboxError(
            f"{folder}: no such folder; make one with: bellbox data prepare INPUT --out {folder}"
        )
    if not file.exists():
        raise BellboxError(f"{folder}: no {MANIFEST} in it, so no token dataset")
    content = read_bytes(file, JSON_LIMIT)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BellboxError(f"{file}: damaged, not readable as JSON; prepare the dataset again") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise BellboxError(f"{file}: not the manifest of a token dataset")
    if fields.get("version") != VERSION:
        raise BellboxError(
            f"{file}: format version {fields.get('version')}, this Bellbox reads {VERSION}; prepare it again"
        )
    stated = fields.pop("sha256", None)
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BellboxError(f"{file}: field '{where}': {first['msg']}; prepare the dataset again") from error
    if stated != manifest.checksum():
        raise BellboxError(
            f"{file}: damaged or edited, its checksum does not match; prepare the dataset again"
        )
    if manifest.dtype != dtype_for(manifest.vocab_size):
        raise BellboxError(
            f"{file}: says {manifest.dtype} for {manifest.vocab_size} tokens, which are stored as "
            f"{dtype_for(manifest.vocab_size)}; prepare the dataset again"
        )
    for name, split in manifest.splits.items():
        if split.tokens != sum(shard.tokens for shard in split.shards):
            raise BellboxError(f"{file}: split '{name}' does not add up; prepare the dataset again")
        for shard in split.shards:
            # A name from a file must not lead out of the folder.
            if not re.fullmatch(r"[A-Za-z0-9_-]+\.bin", shard.file):
                raise BellboxError(f"{file}: '{shard.file}' is no name of a shard")
    return manifest


class TokenSplit:
    """One split as one long sequence of tokens, mapped from its shards."""

    def __init__(self, name: str, entry: SplitEntry, shards: list[np.ndarray], dataset: TokenDataset) -> None:
        self.name = name
        self.documents = entry.documents
        self.bytes = entry.bytes
        """UTF-8 bytes of the split's documents."""
        self.dataset = dataset
        self.shards = shards
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])

    def __len__(self) -> int:
        """Number of tokens, end-of-text tokens included."""
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` (inclusive) to `stop` (exclusive) as int64 `[stop - start]`, over shard borders.

        Raises:
            IndexError: where the range leaves the split.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}..{stop} of a split of {len(self)}")
        out = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < len(out):
            begin = start + filled - int(self._starts[shard])
            part = self.shards[shard][begin : begin + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return out

    def __repr__(self) -> str:
        return f"TokenSplit({self.name!r}, tokens={len(self):,}, documents={self.documents:,})"


class TokenDataset:
    """A prepared folder, opened for reading; see the module's docstring for its layout."""

    def __init__(self, path: Path, manifest: Manifest, splits: dict[str, list[np.ndarray]]) -> None:
        self.path = path
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.end_of_text = manifest.end_of_text
        self.splits = {
            name: TokenSplit(name, manifest.splits[name], shards, self) for name, shards in splits.items()
        }

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> TokenDataset:
        """Open a dataset that `prepare` wrote. The sizes of all files are always checked.

        Args:
            path: the folder.
            verify: read everything once and compare the checksums and the range of the ids too.

        Raises:
            BellboxError: for a folder, manifest, tokenizer or shard that is missing, cut short or altered.
        """
        path = Path(path)
        manifest = read_manifest(path)
        tokenizer = path / "tokenizer.json"
        if not tokenizer.is_file():
            raise BellboxError(f"{tokenizer}: missing; prepare the dataset again")
        if sha256_file(tokenizer) != manifest.tokenizer_sha256:
            raise BellboxError(f"{tokenizer}: not the tokenizer that the shards were made with")
        dtype = DTYPES[manifest.dtype]
        splits = {
            name: [_map(path, shard, dtype) for shard in entry.shards]
            for name, entry in manifest.splits.items()
        }
        if verify:
            for name, entry in manifest.splits.items():
                for shard, tokens in zip(entry.shards, splits[name], strict=True):
                    _verify(path / shard.file, shard, tokens, manifest.vocab_size)
        return cls(path, manifest, splits)

    def split(self, name: str) -> TokenSplit:
        """The split `train` or `valid`.

        Raises:
            BellboxError: for a name that the dataset lacks.
        """
        if name not in self.splits:
            raise BellboxError(f"{self.path}: no split '{name}'; there are: {', '.join(self.splits)}")
        return self.splits[name]

    def file_of(self, shard: str) -> Path:
        """Where a shard lies, by its name in the manifest."""
        return self.path / shard

    def checksum(self) -> str:
        """Says of two datasets whether they are equal, names of sources included."""
        return self.manifest.checksum()

    def content_checksum(self) -> str:
        """Likewise of tokenizer and tokens alone, wherever the sources lay."""
        return self.manifest.content_checksum()

    def largest_id(self) -> int:
        """The largest token id that occurs, -1 where nothing does; reads all shards once."""
        shards = (shard for split in self.splits.values() for shard in split.shards if len(shard))
        return max((int(shard.max()) for shard in shards), default=-1)

    @property
    def train(self) -> TokenSplit:
        """The split `train`."""
        return self.split("train")

    @property
    def valid(self) -> TokenSplit:
        """The split `valid`."""
        return self.split("valid")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards (needs the `tokenizers` library)."""
        from bellbox.data.tokenizer import Tokenizer

        return Tokenizer.load(self.path / "tokenizer.json", self.end_of_text)

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each token id stands for, int64 `[vocab_size]`; needs no `tokenizers` library.

        Raises:
            BellboxError: for a tokenizer whose tokens have no definite bytes.
        """
        from bellbox.data.tokenizer import token_bytes

        table = token_bytes(read_text(self.path / "tokenizer.json", TOKENIZER_LIMIT))
        return np.array([len(one) for one in table], dtype=np.int64)

    def __repr__(self) -> str:
        return f"TokenDataset({str(self.path)!r}, vocab_size={self.vocab_size}, {list(self.splits.values())})"


def _map(path: Path, shard: ShardEntry, dtype: np.dtype) -> np.ndarray:
    file = path / shard.file
    try:
        size = file.stat().st_size
    except OSError as error:
        raise BellboxError(f"{file}: missing; prepare the dataset again") from error
    expected = shard.tokens * dtype.itemsize
    if size != expected:
        raise BellboxError(
            f"{file}: {size} bytes where the manifest says {expected}; prepare the dataset again"
        )
    if not size:
        return np.empty(0, dtype)
    try:
        return np.memmap(file, dtype=dtype, mode="r")
    except OSError as error:
        raise BellboxError(f"{file}: cannot be read: {error.strerror or error}") from error


def _verify(file: Path, shard: ShardEntry, tokens: np.ndarray, vocab_size: int) -> None:
    digest = hashlib.sha256()
    for start in range(0, len(tokens), 1 << 22):
        part = tokens[start : start + (1 << 22)]
        digest.update(part.tobytes())
        if int(part.max()) >= vocab_size:
            raise BellboxError(
                f"{file}: holds token {int(part.max())}, the vocabulary ends at {vocab_size - 1}"
            )
    if digest.hexdigest() != shard.sha256:
        raise BellboxError(f"{file}: altered, its checksum does not match; prepare the dataset again")
