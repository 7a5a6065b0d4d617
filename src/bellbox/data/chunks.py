"""Files read a bounded number of bytes at a time: unpacked, held against what their name says, and decoded.

What looks like another kind of file than its name says is refused: a model trained on braces and keys, or on the bytes
of an archive, would never tell.
"""

from __future__ import annotations

import codecs
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bellbox.data.pieces import END_OF_TEXT
from bellbox.errors import BellboxError, require
from bellbox.utils.files import open_regular

_CHUNK_BYTES = 1 << 18
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


def chunks(path: Path, on_read: Callable[[int], None] | None) -> Iterator[bytes]:
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


def as_named(path: Path, kind: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
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


def decoded(path: Path, chunks: Iterable[bytes]) -> Iterator[str]:
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
