"""`baselines.jsonl`: one line a measurement, complete in itself, only ever added to; the last one of a kind counts."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bellbox.comparison.jsonl import append_line, read_lines
from bellbox.errors import BellboxError

FILE = "baselines.jsonl"
Task = Literal["quality", "speed"]
TASKS: tuple[Task, ...] = ("quality", "speed")


@dataclass(frozen=True)
class Line:
    """What came out for one row: its quality and bytes, or its speed."""

    model: str
    """Name of the checkpoint."""
    row: str
    title: str
    task: Task
    key: str
    """See `key_of`."""
    bits: float | None
    package: str
    package_version: str | None
    settings: dict[str, Any]
    """What decides the numbers beside the row."""
    skipped: str | None = None
    """Why it cannot run here."""
    error: str | None = None
    """Why it failed."""
    found: dict[str, Any] = field(default_factory=dict)
    """What `measure.quality` or `measure.speed` gave; `made_seconds` with a quality."""
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    version: str = ""


class Lines:
    """The lines of a folder's `baselines.jsonl`.

    Args:
        folder: holds the file, or will.

    Raises:
        BellboxError: a line that is none.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder) / FILE
        self.all = list(read_lines(self.path, _parsed, "a measurement"))

    def find(self, key: str) -> Line | None:
        """The last line of what this `key_of` stands for."""
        return next((line for line in reversed(self.all) if line.key == key), None)

    def add(self, line: Line) -> None:
        """Append a line and have it on the disk.

        Raises:
            OSError: it cannot be written.
        """
        append_line(self.path, json.dumps(dataclasses.asdict(line), allow_nan=False))
        self.all.append(line)


_NUMBERS: dict[Task, tuple[str, ...]] = {
    "quality": ("loss", "perplexity", "bytes", "weights", "bits_per_weight"),
    "speed": ("tokens_per_second", "full_tokens_per_second", "times_full", "load"),
}


def _parsed(text: bytes) -> Line:
    from pydantic import TypeAdapter

    line = TypeAdapter(Line).validate_json(text, strict=True)
    if line.error is None and line.skipped is None:
        odd = [name for name in _NUMBERS[line.task] if not isinstance(line.found.get(name), int | float)]
        if odd:
            raise BellboxError(f"no number {odd[0]!r}")
    return line
