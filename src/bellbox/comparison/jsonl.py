"""Files of JSON lines that are only ever added to: half a line that a kill left is cut away by the next one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from bellbox.errors import BellboxError
from bellbox.utils.files import named, read_bytes

_MOST_BYTES = 1 << 30

T = TypeVar("T")


def read_lines(path: Path, parse: Callable[[bytes], T], what: str) -> Iterator[T]:
    """What the complete lines of a file say.

    Args:
        path: the file; one that is not there has no lines.
        parse: a line's value; a `ValidationError` or `BellboxError` of its says why it has none.
        what: a line should be, with its article.

    Raises:
        BellboxError: a line that is not, by number and with the reason; or as `whole_lines`.
    """
    for number, line in enumerate(whole_lines(path), 1):
        try:
            yield parse(line)
        except (ValidationError, BellboxError) as error:
            reason = _first_of(error) if isinstance(error, ValidationError) else error
            raise BellboxError(f"{path}: line {number} is not {what} ({reason}); remove the line") from None


def _first_of(error: ValidationError) -> str:
    """Where the first of its errors lies, and what it says."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that are complete, with their ends; none where there is no file.

    Raises:
        BellboxError: it cannot be read, or is no regular file of at most 1 GiB.
    """
    try:
        lines = read_bytes(path, _MOST_BYTES).splitlines(keepends=True) if os.path.lexists(path) else []
    except OSError as error:
        raise BellboxError(f"{path}: cannot be read ({error.strerror})") from None
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def append_line(path: Path, line: str) -> None:
    """Add a line and have it on the disk.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    whole = b"".join(whole_lines(path))
    try:
        with path.open("ab") as file:
            file.truncate(len(whole))
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise named(error, path) from None
