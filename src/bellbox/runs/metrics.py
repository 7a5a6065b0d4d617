"""Metrics of a run, one JSON object a line, and the same numbers for trackers (`trackers.py`).

`metrics.jsonl` is the record: append-only, flushed line by line, readable while the run goes on. When a run
is resumed from step s, the records after s are cut away first, so that the file ends as if nothing had
happened. Only the fields of `WALL_CLOCK` may differ between two equal runs.

    {"kind": "train", "step", "phase", "tokens", "loss", "perplexity", "lr", "grad_norm",
     "divergence", "tokens_per_s", "seconds"}
    {"kind": "eval", "step", "phase", "tokens", "loss", "perplexity", "bits_per_byte",
     "weight_entropy": {"mean", "layers": {name: bits}}, "activation_entropy": likewise,
     "gamma": {"weight": {name: {"mean", "std", "min", "max"}}, "activation": {name: value}},
     "saturated": {"weight": {"mean", "layers"}, "activation": likewise},
     "feature_spectrum": [shares, the largest first],
     "parts": {"unit", "sizes": [tokens], "losses": [nats a token]}, "seconds"}

A nested model's evaluation (docs/nested.md) is that at its widest width, and has the same fields of each width under
"widths": {bits: fields}; "best" is then the lowest mean of their losses.

A vision run has "accuracy", a share, in place of "perplexity" and "bits_per_byte", and none in training records; its
"tokens" and "tokens_per_s" are images.

Units: loss of the data and divergence from a teacher (only where there is one) in nats per token or image, entropy in
bits per code, saturated as a share of all codes. The spectrum is that of the pooled features that a MEC term sees
(`bellbox.objectives.spectrum`), over up to 2,048 validation samples; absent where fewer than three are known. Where
nothing is quantized, the four fields before it are absent. Parts are documents, or what `bellbox.evaluation.parts`
takes for them, at most 256; of images they also say how many are "right". A number that is not finite is written as
null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from bellbox.errors import BellboxError
from bellbox.runs.trackers import Trackers
from bellbox.utils.files import named, read_bytes, write_text

_MOST_BYTES = 1 << 30
WALL_CLOCK = ("tokens_per_s", "seconds")


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole records of a metrics file; a last line that a kill cut short is left out.

    Raises:
        BellboxError: no such file, or a line before the last is not a JSON object.
    """
    lines = read_bytes(path, _MOST_BYTES).splitlines(keepends=True)
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not _is_record(record):
            raise BellboxError(f"{path}: line {number} is not a record of this format; remove the line")
        records.append(record)
    return records


def _is_record(value: Any) -> TypeGuard[dict[str, Any]]:
    kind = isinstance(value, dict) and value.get("kind") in ("train", "eval")
    return kind and isinstance(value.get("step"), int)


class MetricsWriter:
    """Writes records to `metrics.jsonl` and, if wanted, to TensorBoard and other trackers.

    Args:
        folder: the run's folder.
        step: the step that the run goes on from; later records are cut away.
        evaluated_step: the last validated step; a later evaluation is cut away too.
        tensorboard: also write event files under `tensorboard/`.
        trackers: further ones, by name.
        config: of the run, for those that show it.

    Raises:
        BellboxError: a tracker is wanted and not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        step: int,
        evaluated_step: int,
        tensorboard: bool,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        self.path = Path(folder) / "metrics.jsonl"
        kept = _cut_after(self.path, step, evaluated_step)
        evaluations = [record for record in kept if record["kind"] == "eval"]
        self.last_evaluation: dict[str, Any] | None = evaluations[-1] if evaluations else None
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = Trackers(Path(folder), step, tensorboard, trackers, config)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and flush it to the operating system.

        Raises:
            OSError: it cannot be written, such as on a full disk.
        """
        try:
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # it tries once more to write what it holds
                self._file.close()
            raise named(error, self.path) from None
        self._trackers.log(dict(_scalars(record)), record["step"])

    def sync(self) -> None:
        """Have everything so far on the disk; called before a checkpoint that relies on it."""
        os.fsync(self._file.fileno())
        self._trackers.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._trackers.close()


def _cut_after(path: Path, step: int, evaluated_step: int) -> list[dict[str, Any]]:
    """Rewrite the file without the records of later steps; returns those that stay."""
    if not path.exists():
        return []
    limits = {"train": step, "eval": evaluated_step}
    kept = [record for record in read_records(path) if record["step"] <= limits[record["kind"]]]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(f"{prefix}/{key}", entry)
        elif isinstance(value, int | float) and math.isfinite(value):
            found.append((prefix, float(value)))

    for key, value in record.items():
        if key not in ("kind", "step"):
            walk(f"{record['kind']}/{key}", value)
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
