"""Tables of text, a document a row: JSON lines, JSON, CSV and Parquet, read as streams of rows.

Each reader gives rows with the place that a message names.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bellbox.data.pieces import Piece, split_into_pieces
from bellbox.errors import BellboxError, require
from bellbox.utils.files import open_regular, parsing

_LARGEST_CELL = 1 << 28


@dataclass
class Skipped:
    """Rows of tables that gave no document."""

    blank: int = 0
    """Rows whose text is empty or white."""
    null: int = 0
    """Rows without a text."""


@dataclass(frozen=True)
class Rows:
    """How the rows of a table are read."""

    column: str = "text"
    """The field that holds the text."""
    skip_null: bool = False
    """Whether to pass over rows whose text is null, in place of refusing them."""
    skipped: Skipped = field(default_factory=Skipped)
    """Counted on the way."""

    def pieces(self, row: object, where: str) -> Iterator[Piece]:
        """The document of a row; none for one that is blank, or null and passed over.

        Raises:
            BellboxError: no such field, or no text in it.
        """
        text = _field(row, self.column, where)
        if text is None:
            if not self.skip_null:
                raise BellboxError(
                    f"{where}: field '{self.column}' is null; pass over such rows with --skip-null"
                )
            self.skipped.null += 1
        elif not text or text.isspace():
            self.skipped.blank += 1
        else:
            yield from split_into_pieces(text)


def jsonl_rows(path: Path, chunks: Iterable[bytes]) -> Iterator[tuple[object, str]]:
    """A row for each line that is not blank."""
    for number, line in enumerate(_lines(chunks), 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise BellboxError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
        except (ValueError, RecursionError) as error:
            raise BellboxError(f"{where}: not a line of JSON ({error})") from error
        yield row, where


def json_rows(path: Path, chunks: Iterator[str]) -> Iterator[tuple[object, str]]:
    """The objects of one array, or objects that follow each other, each over any number of lines."""
    decoder, white = json.JSONDecoder(), re.compile(r"\s*")
    buffer, at, ended = "", 0, False

    def read_on() -> None:
        # At least as much again as is waiting: however often an object is tried anew, the work stays linear.
        nonlocal buffer, at, ended
        parts, length = [buffer[at:]], 0
        while length <= len(parts[0]) and not ended:
            chunk = next(chunks, None)
            ended = chunk is None
            parts.append(chunk or "")
            length += len(parts[-1])
        buffer, at = "".join(parts), 0

    def peek() -> str:
        """The next character that is not white; none at the end."""
        nonlocal at
        while True:
            match = white.match(buffer, at)
            at = at if match is None else match.end()
            if at < len(buffer) or ended:
                return buffer[at : at + 1]
            read_on()

    in_array = peek() == "["
    at += in_array
    for number in itertools.count():
        where = f"{path}, row {number}"
        char = peek()
        if in_array and char == "]":
            at += 1
            if peek():
                raise BellboxError(
                    f"{where}: there is more behind the end of the array; name JSON lines .jsonl"
                )
            return
        if not char:
            if in_array:
                raise BellboxError(f"{where}: the array has no end: the file is truncated; fetch it again")
            return
        if in_array and number and char != ",":
            raise BellboxError(f"{where}: no comma before it, so this is no JSON")
        at += in_array and number > 0
        peek()
        while True:
            try:
                row, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
                if ended or not unfinished or len(buffer) - at > _LARGEST_CELL:
                    raise BellboxError(f"{where}: not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise BellboxError(f"{where}: not JSON ({error})") from error
            else:
                if end < len(buffer) or ended:  # else it might be a number that goes on
                    break
            read_on()
        at = end
        yield row, where


def csv_rows(path: Path, chunks: Iterable[str], delimiter: str) -> Iterator[tuple[object, str]]:
    """Rows below a line of names; quoted cells may hold line breaks."""
    reader = csv.reader(_text_lines(chunks), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        before = csv.field_size_limit(_LARGEST_CELL)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise BellboxError(
                f"{where}: not a row of a table ({error}); quote cells that hold quotes"
            ) from None
        finally:
            csv.field_size_limit(before)  # it is the whole process's
        if cells is None:
            return
        if not cells:
            continue  # an empty line
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise BellboxError(f"{where}: two columns have the same name ({', '.join(names)})")
        elif len(cells) != len(names):
            raise BellboxError(
                f"{where}: {len(cells)} cells below {len(names)} names; quote cells that hold {delimiter!r}"
            )
        else:
            yield dict(zip(names, cells, strict=True)), where


def parquet_rows(
    path: Path, column: str, on_read: Callable[[int], None] | None
) -> Iterator[tuple[object, str]]:
    """Rows with the one column; nothing else of the file is read."""
    parquet = require("pyarrow.parquet", "text")
    with open_regular(path) as raw:
        size, told, number = os.fstat(raw.fileno()).st_size, 0, 0
        with parsing(path, "a Parquet file"):
            table = parquet.ParquetFile(raw)
            names, total = table.schema_arrow.names, table.metadata.num_rows
            batches = table.iter_batches(batch_size=256, columns=[column] if column in names else [])
        if column not in names:
            raise BellboxError(_no_field(str(path), column, names))
        while True:
            with parsing(path, "a Parquet file"):
                batch = next(batches, None)
                values = [] if batch is None else batch.column(0).to_pylist()
            if batch is None:
                return
            for value in values:
                yield {column: value}, f"{path}, row {number}"
                number += 1
            if on_read is not None:  # columns are read here and there: the share of the rows it is
                read = size * number // max(1, total)
                on_read(read - told)
                told = read


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # joined once a line, so a long line over many chunks stays linear
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        for line in rest:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


def _text_lines(chunks: Iterable[str]) -> Iterator[str]:
    """Lines with their ends; of several chunks each is joined once."""
    parts: list[str] = []
    for chunk in chunks:
        *whole, rest = chunk.split("\n")  # and at no other character that Python takes for the end of a line
        for line in whole:
            yield "".join((*parts, line, "\n"))
            parts = []
        parts.append(rest)
    if any(parts):
        yield "".join(parts)


def _field(row: object, field: str, where: str) -> str | None:
    if not isinstance(row, dict):
        raise BellboxError(f"{where}: not a JSON object but {type(row).__name__}")
    if field not in row:
        raise BellboxError(_no_field(where, field, map(str, row)))
    text = row[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise BellboxError(f"{where}: field '{field}' is not text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BellboxError(
            f"{where}: field '{field}' holds half a surrogate pair, which no text can"
        ) from error
    return text


def _no_field(where: str, field: str, present: Iterable[str]) -> str:
    names = ", ".join(present)
    names = f"{names[:300]} ..." if len(names) > 300 else names or "none"
    return f"{where}: no field '{field}' (fields: {names}); name the right one with --text-field"
