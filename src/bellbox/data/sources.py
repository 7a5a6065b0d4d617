"""Text comes from anywhere and may be larger than memory, so every source is read as a stream of pieces.

Sources: text files (plain, `.gz`, `.xz`, `.zst`), tables (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, compressed
likewise, and `.parquet`), folders of them, and `hf:NAME[:CONFIG][:SPLIT]`. In a text file the documents are separated
by a line `<|endoftext|>`; without one the file is one document. In a table every row is one, its text in one field.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bellbox.data.chunks import as_named, chunks, decoded
from bellbox.data.hub import hub_parts, hub_rows, open_hub
from bellbox.data.pieces import Piece, text_pieces
from bellbox.data.tables import Rows, csv_rows, json_rows, jsonl_rows, parquet_rows
from bellbox.errors import BellboxError

_COMPRESSED = (".gz", ".xz", ".zst")
_TABLES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Source:
    """One file or one streamed dataset."""

    name: str
    kind: str
    """`text`, `jsonl`, `json`, `csv`, `tsv`, `parquet` or `hub`."""
    path: Path | None
    size: int | None
    """Bytes on disk, compressed as they are; None where that is not known."""
    shard: tuple[int, int] | None = None
    """Of a streamed dataset that lies in several files: which of how many this is."""

    def pieces(
        self, rows: Rows | None = None, on_read: Callable[[int], None] | None = None
    ) -> Iterator[Piece]:
        """Read the source from its beginning.

        Args:
            rows: how to read a table's rows.
            on_read: called with the number of bytes read from disk since the last call.

        Raises:
            BellboxError: for a file that is unreadable, truncated, not UTF-8 or of another kind than its name says, or
                a row without the field.
        """
        rows = rows or Rows()
        if self.path is None:
            found = hub_rows(self.name, self.shard)
        elif self.kind == "parquet":
            found = parquet_rows(self.path, rows.column, on_read)
        else:
            read = as_named(self.path, self.kind, chunks(self.path, on_read))
            if self.kind == "text":
                yield from text_pieces(decoded(self.path, read))
                return
            if self.kind in ("csv", "tsv"):
                found = csv_rows(self.path, decoded(self.path, read), "," if self.kind == "csv" else "\t")
            else:
                found = (
                    jsonl_rows(self.path, read)
                    if self.kind == "jsonl"
                    else json_rows(self.path, decoded(self.path, read))
                )
        for row, where in found:
            yield from rows.pieces(row, where)


def resolve(inputs: Sequence[str | Path]) -> list[Source]:
    """Name every source behind the given files, folders (recursive, sorted) and `hf:` names.

    Files and folders whose name begins with a dot are passed over inside a folder.

    Raises:
        BellboxError: for a path that is missing or not UTF-8, an empty folder, or a file named twice.
    """
    sources: list[Source] = []
    for item in inputs:
        text = str(item)
        if text.startswith("hf:"):
            hub_parts(text)
            sources.append(Source(text, "hub", None, None))
            continue
        path = Path(text)
        if path.is_dir():
            files = _files_below(path)
            if not files:
                raise BellboxError(f"{path}: the folder holds no file")
            sources.extend(map(_file_source, files))
        elif path.is_file():
            sources.append(_file_source(path))
        elif path.exists():
            raise BellboxError(f"{path}: neither a regular file nor a folder; write the text to a file first")
        else:
            raise BellboxError(f"{path}: no such file or folder")
    seen: set[str] = set()
    for source in sources:
        try:
            source.name.encode()
        except UnicodeEncodeError:  # a dataset could not name it
            raise BellboxError(f"{source.name!r}: the name is not UTF-8; rename the file or folder") from None
        key = identity(source)
        if key in seen:
            raise BellboxError(f"{source.name}: given twice; name it once")
        seen.add(key)
    return sources


def expand(found: Sequence[Source]) -> list[Source]:
    """The same sources, a streamed dataset of several files as one source for each of them.

    Raises:
        BellboxError: a dataset that cannot be opened.
    """
    return [each for source in found for each in _files_of(source)]


def _files_of(source: Source) -> list[Source]:
    if source.path is not None:
        return [source]
    count = open_hub(source.name).num_shards
    return [replace(source, shard=(number, count)) for number in range(count)] if count > 1 else [source]


def identity(source: Source) -> str:
    """A string that is equal for two sources exactly when they are the same file or dataset."""
    return source.name if source.path is None else str(source.path.resolve())


def _files_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _file_source(path: Path) -> Source:
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return Source(str(path), _TABLES.get(Path(name).suffix, "text"), path, path.stat().st_size)
