"""Documents in pieces of bounded length: a document without end must cost no more memory than a page.

The piece that closes a document says so. A piece is cut before a space, where every usual pre-tokenizer cuts too, so
tokens do not depend on where the pieces end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

END_OF_TEXT = "<|endoftext|>"
PIECE_CHARS = 1 << 18
_SEPARATOR = re.compile(r"(?:\A|\r?\n)<\|endoftext\|>(?:\r?\n|\Z)")
# What a separator not yet read to its end may occupy at the end of the buffer.
_HOLD = len("\r\n" + END_OF_TEXT + "\r\n")


class Piece(NamedTuple):
    """A part of one document, at most `PIECE_CHARS` characters."""

    text: str
    """Empty at most where the piece only closes its document."""
    ends: bool
    """Whether the document ends here."""


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


def text_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """The documents of a text, which lines of `END_OF_TEXT` separate."""
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
