"""Writing the files that a command was asked for: whole or not at all, and a refusal in one line."""

from __future__ import annotations

from pathlib import Path

from bellbox.errors import BellboxError
from bellbox.training.files import write_text


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before hours of work are spent on what shall go into it.

    Raises:
        BellboxError: it is a folder, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise BellboxError(f"{path}: is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = path.with_name(path.name + ".writing")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise BellboxError(f"{path}: cannot be written ({error.strerror})") from None


def write_file(path: Path, text: str) -> None:
    """Write a text file; a kill leaves the old one or the new one.

    Raises:
        BellboxError: it cannot be written.
    """
    require_writable(path)
    try:
        write_text(path, text)
    except OSError as error:
        raise BellboxError(f"{path}: cannot be written ({error.strerror})") from None
