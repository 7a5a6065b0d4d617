"""Files that are whole or not there, and a folder that one process at a time may write to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

from bellbox.errors import BellboxError
from bellbox.utils.files import sync


def write_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old one or the new one."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def lock(folder: Path, doing: str = "training in") -> IO[bytes]:
    """Hold a folder for as long as the returned file is open; the system lets go of it when the process dies.

    Windows has no such lock; there, nobody is kept out.

    Raises:
        BellboxError: another process holds it.
    """
    file = (folder / ".lock").open("ab")
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise BellboxError(
                f"another process is {doing} '{folder}'; wait for it or choose another folder"
            ) from None
    return file
