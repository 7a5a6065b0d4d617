"""Processes that are started once and do what tests ask of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Ranks:
    """Up to four processes that are started once and do one job after the other."""

    def __init__(self, folder: Path, count: int = 4) -> None:
        self.folder, self.jobs = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.errors = [(folder / f"stderr-{rank}").open("w+") for rank in range(count)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors[rank],
                text=True,
                env=environment,
            )
            for rank in range(count)
        ]

    def do(self, size: int, job: str, **arguments: Any) -> list[Any]:
        """The results of a job, by rank; an error of any is raised here, as the text that it answered."""
        self.jobs += 1
        order = {"job": job, "size": size, "store": str(self.folder / f"store-{self.jobs}"), **arguments}
        chosen = self.processes[:size]
        gone = {rank: process.poll() for rank, process in enumerate(chosen) if process.poll() is not None}
        assert not gone, f"workers have died: {gone}"
        for process in chosen:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline().strip() for process in chosen]  # pyright: ignore[reportOptionalMemberAccess]
        for rank, answer in enumerate(answers):
            if not answer.startswith("ok "):
                self.errors[rank].flush()
                raise RuntimeError(
                    f"rank {rank}: {answer or 'died'}\n{(self.folder / f'stderr-{rank}').read_text()[-3000:]}"
                )
        return [json.loads(answer[3:]) for answer in answers]

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
