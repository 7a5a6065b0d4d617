"""A run in a process of its own: started, watched, stopped."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bellbox.comparison.plan import Wanted
from bellbox.comparison.worker import MEASURED
from bellbox.quantizers.own import modules_of
from bellbox.runs.config import methods_named
from bellbox.training import save_config
from bellbox.utils.files import read_json

ASKED, LOG = "asked.yaml", "log.txt"


class Process:
    """One run under way.

    Args:
        wanted: what to run.
        folder: its run folder; a checkpoint in it is gone on from.
    """

    def __init__(self, wanted: Wanted, folder: Path):
        self.wanted, self.folder = wanted, folder
        self.begun = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        save_config(dataclasses.replace(wanted.config, folder=str(folder)), folder / ASKED)
        modules = modules_of(methods_named(wanted.config.quantization))
        self.first_step = self.step
        with (folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bellbox.comparison.worker", str(folder / ASKED), *modules],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C and `timeout` signal a whole group. The run hears of it once, from the grid: at a second
                # signal it would leave without saving.
                start_new_session=True,
            )

    @property
    def step(self) -> int:
        """Steps done, as far as the record says."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - (1 << 16)))
                lines = file.read().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
        return 0

    @property
    def seconds(self) -> float:
        """Since it was started here."""
        return time.monotonic() - self.begun

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def stop(self, patience: float = 120.0) -> None:
        """Have it save and leave; after `patience` seconds, or at a second Ctrl-C, it is killed."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()

    def measured(self) -> dict[str, Any]:
        """What a finished run brought."""
        return read_json(self.folder / MEASURED)

    def complaint(self) -> str:
        """The last thing that a failed run said."""
        lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("bellbox: error: ") if lines else "it ended without a word"
