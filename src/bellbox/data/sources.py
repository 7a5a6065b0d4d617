"""Text comes from anywhere and may be larger than memory, so every source is read as a stream of pieces.

A document without end (a whole encyclopedia in one file) must cost no more memory than a page. So a source
yields `Piece`s of bounded length; the one that closes a document says so. A piece is cut before a space,
where every usual pre-tokenizer cuts too, so tokens do not depend on where the pieces end.

Sources: text files (plain, `.gz`, `.xz`, `.zst`), JSON lines (the same endings), folders of them, and
`hf:NAME[:CONFIG][:SPLIT]`, a dataset of the Hugging Face hub or a local folder, streamed by `datasets`.
In a text file the documents are separated by a line `<|endoftext|>`; without one the file is one document.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bellbox.errors import BellboxError, require

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 1 << 18
_CHUNK_BYTES = 1 << 18
_SEPARATOR = re.compile(r"(?:\A|\r?\n)<\|endoftext\|>(?:\r?\n|\Z)")
# What a separator not yet read to its end may occupy at the end of the buffer.
_HOLD = len("\r\n" + END_OF_TEXT + "\r\n")
_COMPRESSED = (".gz", ".xz", ".zst")


class Piece(NamedTuple):
    """A part of one document, at most `PIECE_CHARS` characters."""

    text: str
    """Empty at most where the piece only closes its document."""
    ends: bool
    """Whether the document ends here."""


@dataclass(frozen=True)
class Source:
    """One file or one streamed dataset."""

    name: str
    kind: str
    """`text`, `jsonl` or `hub`."""
    path: Path | None
    size: int | None
    """Bytes on disk, compressed as they are; None where that is not known."""

    def pieces(self, field: str = "text", on_read: Callable[[int], None] | None = None) -> Iterator[Piece]:
        """Read the source from its beginning.

        Args:
            field: which field of a JSON line or dataset row holds the text.
            on_read: called with the number of bytes read from disk since the last call.

        Raises:
            BellboxError: for a file that is unreadable, truncated, not UTF-8, or a line without the field.
        """
        if self.path is None:
            yield from _hub_pieces(self.name, field)
            return
        chunks = _chunks(self.path, on_read)
        if self.kind == "jsonl":
            yield from _jsonl_pieces(self.path, chunks, field)
        else:
            yield from _text_pieces(_decoded(self.path, chunks))


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
    kind = "jsonl" if name.endswith((".jsonl", ".ndjson")) else "text"
    return Source(str(path), kind, path, path.stat().st_size)


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
        with path.open("rb") as raw:
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


def _jsonl_pieces(path: Path, chunks: Iterable[bytes], field: str) -> Iterator[Piece]:
    for number, line in enumerate(_lines(chunks), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise BellboxError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
        except (ValueError, RecursionError) as error:
            raise BellboxError(f"{where}: not a line of JSON ({error})") from error
        yield from split_into_pieces(_field(row, field, where))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # joined once a line, so a long line over many chunks stays linear
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        parts.append(head)
        for line in rest:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


def _field(row: object, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise BellboxError(f"{where}: not a JSON object but {type(row).__name__}")
    if field not in row:
        names = ", ".join(map(str, row)) or "none"
        raise BellboxError(
            f"{where}: no field '{field}' (fields: {names}); name the right one with --text-field"
        )
    text = row[field]
    if not isinstance(text, str):
        raise BellboxError(f"{where}: field '{field}' is not text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BellboxError(
            f"{where}: field '{field}' holds half a surrogate pair, which no text can"
        ) from error
    return text


def _hub_parts(name: str) -> tuple[str, str | None, str]:
    dataset, *rest = name.removeprefix("hf:").split(":")
    if not dataset or len(rest) > 2:
        raise BellboxError(f"{name}: a hub dataset is written hf:NAME[:CONFIG][:SPLIT]")
    config, split = [*rest, "", ""][:2]
    return dataset, config or None, split or "train"


def _hub_pieces(name: str, field: str) -> Iterator[Piece]:
    datasets = require("datasets", "text")
    dataset, config, split = _hub_parts(name)
    try:
        rows = iter(datasets.load_dataset(dataset, config, split=split, streaming=True))
    except Exception as error:
        raise BellboxError(f"{name}: cannot be opened: {_one_line(error)}") from error
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise BellboxError(f"{name}: stopped at row {number}: {_one_line(error)}") from error
        yield from split_into_pieces(_field(row, field, f"{name} row {number}"))
        number += 1


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
