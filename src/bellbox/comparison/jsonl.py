"""Files of JSON lines that are only ever added to: half a line that a kill left is cut away by the next one."""

from __future__ import annotations

import os
from pathlib import Path

from bellbox.errors import BellboxError
from bellbox.utils.files import named, read_bytes

_MOST_BYTES = 1 << 30


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
