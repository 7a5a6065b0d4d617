"""What commands share in talking to the user: files that are written whole or refused in one line, and help."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from bellbox.errors import BellboxError
from bellbox.runs.folder import write_text


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


def refuse_flags(command: Any, names: tuple[str, ...], what: str) -> None:
    """Refuse flags that would be ignored.

    Args:
        command: the parsed command, a dataclass whose fields have defaults.
        names: of the fields that do not apply.
        what: does not take them, for the message.

    Raises:
        BellboxError: one of them is not at its default.
    """
    for field in fields(command):
        if field.name in names and getattr(command, field.name) != field.default:
            raise BellboxError(f"--{field.name.replace('_', '-')} does not apply to {what}; leave it out")


def help_text(docstring: str | None) -> str:
    """A command's docstring for its --help, with each example on a line of its own (tyro joins lines)."""
    return "\n\n".join(line for line in (docstring or "").splitlines() if line)
