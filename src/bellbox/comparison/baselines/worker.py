"""Worker: one row in its own process, so that packages that patch, crash or log do so alone.

    python -m bellbox.comparison.baselines.worker JOB.json ROW TASK FOLDER OUT.json

What came out stands in OUT.json: the numbers, or `skipped` or `error` with the reason.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bellbox.comparison.baselines.baseline import Baseline
from bellbox.comparison.baselines.job import load_job
from bellbox.comparison.baselines.measure import quality, speed
from bellbox.comparison.baselines.registry import baseline_of
from bellbox.utils.files import one_line, write_text

MADE = ".made.json"
"""Beside a made model: it is whole, and took so many seconds."""


def main(argv: list[str]) -> None:
    """Make the row's model where it is not made yet, then measure it."""
    file, name, task, folder, out = argv
    job = load_job(Path(file))
    row = baseline_of(name, job)
    found = _imported(row)
    if not found:
        try:
            seconds = _made(row, Path(folder), job)
            found = {"found": (quality if task == "quality" else speed)(row, Path(folder), job)}
            if task == "quality":
                found["found"]["made_seconds"] = seconds
        except Exception as error:
            traceback.print_exc()
            found = {"error": one_line(error) or type(error).__name__}
    write_text(out, json.dumps(found, allow_nan=False) + "\n")


def _imported(row: Baseline) -> dict[str, Any]:
    """Nothing, or why the package cannot be imported."""
    try:
        if row.module is not None:
            __import__(row.module)
    except Exception as error:
        traceback.print_exc()
        return {"skipped": f"{row.module} cannot be imported here: {one_line(error, 200)}"}
    return {}


def _made(row: Baseline, folder: Path, job: Any) -> float | None:
    """Seconds that making the model took; None where it is given."""
    mark = folder.with_name(folder.name + MADE)
    if row.made is not None or folder == job.checkpoint:
        return None
    if not mark.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        row.make(job, folder)
        write_text(mark, json.dumps(time.monotonic() - begun) + "\n")
    return float(json.loads(mark.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
