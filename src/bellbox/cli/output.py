"""Conventions of the commands: flags, files that are written whole or refused in one line, and help."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from bellbox.errors import BellboxError, require
from bellbox.utils.files import refuse_target, write_text

_REFUSED = 2
"""Exit code of tyro for arguments that it cannot read."""


def parse_flags(kind: Any, argv: list[str], prog: str, docstring: str | None, **settings: Any) -> Any:
    """A command's arguments as a dataclass.

    A flag of many values (`--rows 1 2`, `--model.overrides a=1 b=2`) that is given twice adds up; another one given
    twice is refused, since the parser would drop the first without a word.

    Args:
        kind: the dataclass, or a union of one for each subcommand.
        argv: the arguments.
        prog: the command's name.
        docstring: of the command's module, for --help.
        settings: further ones of `tyro.cli`.

    Raises:
        BellboxError: a flag that does not exist, cannot be read or is repeated.
        SystemExit: 0 after --help.
    """
    tyro = require("tyro", "cli")
    said = io.StringIO()
    arguments = _gathered(argv, set(_flags_of_many(kind)))
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=prog, description=help_text(docstring), **settings)
    except SystemExit as exit:
        if exit.code != _REFUSED:  # after --help, or a signal that came in between
            raise
    raise BellboxError(f"{_first_section(said.getvalue())}; see {prog} --help")


def _first_section(box: str) -> str:
    """What a message of tyro says, without the frame around it and the help below."""
    rows = [line.strip("│|╭╮╰╯ ") for line in box.splitlines()[1:-1]]
    sections = [part.strip() for part in re.split("[─-]{10,}", " ".join(rows))]
    told = [
        part for part in sections if part and not part.startswith(("For full helptext", "Argument helptext"))
    ]
    text = " ".join("; ".join(told).split()).split(" Got errors:")[0]
    return text.rstrip(".") or "arguments that cannot be read"


def _flags_of_many(kind: Any, prefix: str = "--") -> Iterator[str]:
    """The flags that take any number of values."""
    if get_origin(kind) is Annotated:
        yield from _flags_of_many(get_args(kind)[0], prefix)
    elif get_origin(kind) in (Union, UnionType):
        for each in get_args(kind):
            yield from _flags_of_many(each, prefix)
    elif dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        for field in fields(kind):
            flag, inside = prefix + field.name.replace("_", "-"), hints[field.name]
            if dataclasses.is_dataclass(inside):
                yield from _flags_of_many(inside, flag + ".")
            elif get_origin(inside) in (list, dict) or get_args(inside)[-1:] == (Ellipsis,):
                yield flag


def _gathered(argv: list[str], many: set[str]) -> list[str]:
    """The arguments with the values of repeated flags put together."""
    groups: dict[str, list[str]] = {"": []}
    words = groups[""]
    for place, word in enumerate(argv):
        if word == "--":
            words += argv[place:]
            break
        if not word.startswith("--"):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = re.sub(r"(^--|\.)no-", r"\1", flag.replace("_", "-"))  # --no-check is --check
        if name not in groups:
            words = groups[name] = [flag, value] if equals else [flag]
        elif name in many:
            words = groups[name]
            words += [value] if equals else []
        else:
            raise BellboxError(f"{flag} is given twice; leave one of them out")
    return [word for group in groups.values() for word in group]


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before hours of work are spent on what shall go into it.

    Raises:
        BellboxError: it is a folder, a device, a pipe or a dead link, or its folder cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_target(path)
        tempfile.TemporaryFile(dir=Path(os.path.realpath(path)).parent).close()
    except OSError as error:
        raise BellboxError(f"{path}: cannot be written ({error.strerror})") from None


# What names a file of another program, so that a folder of that name would be taken for one.
_FILES = (
    ".onnx", ".gguf", ".ggml", ".safetensors", ".pt", ".pth", ".pte", ".ckpt", ".bin", ".pkl", ".h5", ".tflite", ".npz",
    ".npy", ".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".parquet", ".zip", ".tar", ".gz", ".html",
)  # fmt: skip


def refuse_file_name(folder: Path) -> None:
    """Refuse a name for a folder that speaks of a file.

    Raises:
        BellboxError: it ends so, and no such folder is there.
    """
    if folder.suffix.lower() in _FILES and not folder.is_dir():
        raise BellboxError(
            f"{folder}: a folder is made, and {folder.suffix} is the name of a file; name it {folder.with_suffix('')}, "
            "or end it otherwise"
        )


def refuse_same_folder(model: str, out: Path) -> None:
    """Refuse to write over the model that is read.

    Raises:
        BellboxError: both are one folder, by whatever names.
    """
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise BellboxError(f"{out}: is the model itself, which would be replaced; name another folder")


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
