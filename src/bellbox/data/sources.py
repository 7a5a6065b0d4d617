"""Text comes from anywhere and may be larger than memory, so every source is read as a stream of pieces.

A document without end (a whole encyclopedia in one file) must cost no more memory than a page. So a source
yields `Piece`s of bounded length; the one that closes a document says so. A piece is cut before a space,
where every usual pre-tokenizer cuts too, so tokens do not depend on where the pieces end.

Sources: text files (plain, `.gz`, `.xz`, `.zst`), tables (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, compressed
likewise, and `.parquet`), folders of them, and `hf:NAME[:CONFIG][:SPLIT]`, a dataset of the Hugging Face hub or a local
folder, streamed by `datasets`. In a text file the documents are separated by a line `<|endoftext|>`; without one the
file is one document. In a table every row is one, its text in one field. What looks like another kind of file than its
name says is refused: a model trained on braces and keys, or on the bytes of an archive, would never tell.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bellbox.errors import BellboxError, require
from bellbox.utils.files import open_regular, parsing

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 1 << 18
_CHUNK_BYTES = 1 << 18
_SEPARATOR = re.compile(r"(?:\A|\r?\n)<\|endoftext\|>(?:\r?\n|\Z)")
# What a separator not yet read to its end may occupy at the end of the buffer.
_HOLD = len("\r\n" + END_OF_TEXT + "\r\n")
_COMPRESSED = (".gz", ".xz", ".zst")
_TABLES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
# How files begin that hold no text, whatever they are called.
_FOREIGN = (
    (b"PAR1", "a Parquet file; call it .parquet"),
    (b"ARROW1", "an Arrow file; write it as .parquet or .jsonl"),
    (b"FEA1", "a Feather file; write it as .parquet or .jsonl"),
    (b"%PDF-", "a PDF document; write its text to a .txt file"),
    (b"PK\x03\x04", "a zip archive (or an office document); unpack it"),
    (b"BZh", "a bzip2 file; unpack it, or pack it as .gz, .xz or .zst"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"SQLite format 3", "a database; write its text as .jsonl"),
    (b"{\\rtf", "a document in RTF; write its text to a .txt file"),
)
_COMPRESSED_MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_LARGEST_CELL = 1 << 28


class Piece(NamedTuple):
    """A part of one document, at most `PIECE_CHARS` characters."""

    text: str
    """Empty at most where the piece only closes its document."""
    ends: bool
    """Whether the document ends here."""


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
            found = _hub_rows(self.name, self.shard)
        elif self.kind == "parquet":
            found = _parquet_rows(self.path, rows.column, on_read)
        else:
            chunks = _as_named(self.path, self.kind, _chunks(self.path, on_read))
            if self.kind == "text":
                yield from _text_pieces(_decoded(self.path, chunks))
                return
            if self.kind in ("csv", "tsv"):
                found = _csv_rows(self.path, _decoded(self.path, chunks), "," if self.kind == "csv" else "\t")
            else:
                found = (
                    _jsonl_rows(self.path, chunks)
                    if self.kind == "jsonl"
                    else _json_rows(self.path, _decoded(self.path, chunks))
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
            _hub_parts(text)
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
    count = _open_hub(source.name).num_shards
    return [replace(source, shard=(number, count)) for number in range(count)] if count > 1 else [source]


def identity(source: Source) -> str:
    """A string that is equal for two sources exactly when they are the same file or dataset."""
    return source.name if source.path is None else str(source.path.resolve())


def split_into_pieces(text: str) -> Iterator[Piece]:
    """Cut a whole document that is in memory already; nothing for one that is blank."""
    if text.isspace() or not text:
        return
    while len(text) > PIECE_CHARS:
        cut = cut_point(text, PIECE_CHARS)
        yield Piece(text[:cut], False)
        text = text[cut:]
    yield Piece(text, True)


def cut_point(text: str, limit: int) -> int:
    """The last place up to `limit` where the text may be cut without changing its tokens.

    That is between a character that is not white and a space (or, for want of one, other white space): no
    pre-tokenizer in use joins these two. A text without any such place is cut at `limit`.
    """
    for white in (" ", "\n"):
        at = text.rfind(white, 1, limit + 1)
        while at > 0 and text[at - 1].isspace():
            at = text.rfind(white, 1, at)
        if at > 0:
            return at
    return limit


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


def _chunks(path: Path, on_read: Callable[[int], None] | None) -> Iterator[bytes]:
    """Decompressed bytes of a file, a bounded number at a time."""
    import gzip
    import lzma

    ending = path.suffix.lower()
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    if ending == ".zst":
        errors = (*errors, require("zstandard", "text").ZstdError)
    told = 0
    try:
        with open_regular(path) as raw:
            if ending == ".gz":
                stream = _read_all(gzip.GzipFile(fileobj=raw))
            elif ending == ".xz":
                stream = _read_all(lzma.LZMAFile(raw))  # noqa: SIM115 (closing raw is enough)
            elif ending == ".zst":
                stream = _zstd_chunks(raw)
            else:
                stream = _read_all(raw)
            for chunk in stream:
                if on_read is not None:
                    at = raw.tell()
                    on_read(at - told)
                    told = at
                yield chunk
    except EOFError as error:
        raise BellboxError(f"{path}: the compressed file is truncated; fetch it again") from error
    except errors as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BellboxError(f"{path}: cannot be read: {reason}") from error


def _read_all(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    # The library's own reader takes a truncated frame for a short file, so the frames are followed here.
    decompressor = require("zstandard", "text").ZstdDecompressor()
    frame = None
    while data := raw.read(1 << 14):
        while data:
            frame = frame or decompressor.decompressobj(read_across_frames=False)
            out = frame.decompress(data)
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
            if out:
                yield out
    if frame is not None:
        raise EOFError


def _decoded(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
    """Strict UTF-8; an error names the byte. A byte order row_scale at the beginning is dropped."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    first = True
    try:
        for chunk in chunks:
            text = decoder.decode(chunk)
            read += len(chunk)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The decoder keeps the bytes of an unfinished character; the error counts from the first of them.
        pending = len(decoder.getstate()[0])
        raise BellboxError(
            f"{path}: not UTF-8 at byte {read - pending + error.start}; convert the file to UTF-8 first"
        ) from error


def _text_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    buffer = ""
    at_line_start = True  # whether buffer[0] begins a line: a separator needs no newline before it there
    open_document = False  # whether a piece of the current document has gone out already

    def close(text: str) -> Iterator[Piece]:
        if open_document or (text and not text.isspace()):
            yield Piece(text, True)

    for chunk in chunks:
        buffer += chunk
        while END_OF_TEXT in buffer and (match := _separator(buffer, at_line_start, final=False)):
            yield from close(buffer[: match.start()])
            buffer, at_line_start, open_document = buffer[match.end() :], True, False
        while len(buffer) > PIECE_CHARS + _HOLD:
            cut = cut_point(buffer, PIECE_CHARS)
            yield Piece(buffer[:cut], False)
            buffer, at_line_start, open_document = buffer[cut:], False, True
    while match := _separator(buffer, at_line_start, final=True):
        yield from close(buffer[: match.start()])
        buffer, at_line_start, open_document = buffer[match.end() :], True, False
        if not buffer:
            return
    yield from close(buffer)


def _separator(buffer: str, at_line_start: bool, *, final: bool) -> re.Match[str] | None:
    """The first whole separator line; one that ends with the buffer counts only at the end of the file."""
    for match in _SEPARATOR.finditer(buffer):
        if match.start() == 0 and not at_line_start and buffer[0] == "<":
            continue
        if match.end() == len(buffer) and not final and buffer[-1] != "\n":
            return None
        return match
    return None


def _as_named(path: Path, kind: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same chunks, once the first of them have shown that the file is what its name says.

    Raises:
        BellboxError: it is something else.
    """
    head = b""
    first: list[bytes] = []
    for chunk in chunks:
        first.append(chunk)
        head += chunk
        if len(head) >= 1 << 16:
            break
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise BellboxError(f"{path}: is {what}")
    for magic, ending in _COMPRESSED_MAGIC.items():
        if head.startswith(magic):
            raise BellboxError(f"{path}: is compressed; call it {path.name}{ending}")
    if kind == "text" and _is_json_lines(head):
        raise BellboxError(
            f"{path}: looks like JSON lines; call it .jsonl (or begin the file with a line {END_OF_TEXT}, if its "
            "braces and keys shall be text)"
        )
    return itertools.chain(first, chunks)


def _is_json_lines(head: bytes) -> bool:
    """Whether a text begins with two lines that are JSON objects each, or is a single one."""
    lines = [line for line in head.split(b"\n") if line.strip()]
    if len(head) >= 1 << 16:
        lines = lines[:-1]  # perhaps not a whole one
    if not lines or not lines[0].lstrip().startswith(b"{"):
        return False
    try:
        return all(isinstance(json.loads(line), dict) for line in lines[:2])
    except (ValueError, RecursionError):
        return False


def _jsonl_rows(path: Path, chunks: Iterable[bytes]) -> Iterator[tuple[object, str]]:
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


def _json_rows(path: Path, chunks: Iterator[str]) -> Iterator[tuple[object, str]]:
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


def _csv_rows(path: Path, chunks: Iterable[str], delimiter: str) -> Iterator[tuple[object, str]]:
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


def _parquet_rows(
    path: Path, column: str, on_read: Callable[[int], None] | None
) -> Iterator[tuple[object, str]]:
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


def _hub_parts(name: str) -> tuple[str, str | None, str]:
    dataset, *rest = name.removeprefix("hf:").split(":")
    if not dataset or len(rest) > 2:
        raise BellboxError(f"{name}: a hub dataset is written hf:NAME[:CONFIG][:SPLIT]")
    config, split = [*rest, "", ""][:2]
    return dataset, config or None, split or "train"


def _open_hub(name: str) -> Any:
    """A stream of `datasets`: nothing but names of files is fetched here."""
    datasets = require("datasets", "text")
    dataset, config, split = _hub_parts(name)
    try:
        return datasets.load_dataset(dataset, config, split=split, streaming=True)
    except Exception as error:
        raise BellboxError(f"{name}: cannot be opened: {_one_line(error)}") from error


def _hub_rows(name: str, shard: tuple[int, int] | None) -> Iterator[tuple[object, str]]:
    stream = _open_hub(name)
    if shard is not None:
        number, count = shard
        stream = stream.shard(num_shards=count, index=number)
        name = f"{name} file {number} of {count}"
    rows = iter(stream)
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise BellboxError(f"{name}: stopped at row {number}: {_one_line(error)}") from error
        yield row, f"{name} row {number}"
        number += 1


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
