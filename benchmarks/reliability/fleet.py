"""Jobs of several processes, started quickly: each is a fork of one that has imported torch already.

    python benchmarks/reliability/fleet.py        a fork server, driven by `Fleet`

A process of a job is `bellbox train` as a launcher starts it: rank and world size in its environment, its output in
files of its own. It ends as the command ends, and can be killed, stopped and limited like any process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 240.0
"""Seconds after which a job counts as one that never ends."""


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Job:
    """The processes of one start."""

    fleet: Fleet
    pids: list[int]
    logs: list[Path]
    """What each has written to standard error."""
    outputs: list[Path] = field(default_factory=list)
    """And to standard output."""

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """A signal to some ranks, or to all; one that has ended gets none."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def ended(self, rank: int) -> bool:
        """Whether a process is over; it stays a zombie until `wait`."""
        try:
            return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    def until(self, condition: Callable[[], bool], pause: float = 1e-3) -> bool:
        """Wait for something that the job does; False where all its processes ended before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if all(map(self.ended, range(len(self.pids)))):
                return condition()
            assert time.monotonic() < deadline, "the job does nothing"
            time.sleep(pause)
        return True

    def wait(self) -> list[int]:
        """The exit codes, by rank; negative for signals. What never ends is killed, and fails."""
        deadline = time.monotonic() + PATIENCE
        while not all(map(self.ended, range(len(self.pids)))):
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                self.fleet.ask("wait", pids=self.pids)
                raise AssertionError(f"a process of {self.pids} never ended")
            time.sleep(0.01)
        return self.fleet.ask("wait", pids=self.pids)["codes"]

    def said(self) -> list[str]:
        """The lines of standard error of all ranks, those of libraries left out."""
        lines = [line for log in self.logs for line in log.read_text(errors="replace").splitlines()]
        return [line for line in lines if line.startswith("bellbox:") or "Traceback" in line]


class Fleet:
    """A fork server and its jobs.

    Args:
        folder: for what the jobs say.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def ask(self, what: str, **values: Any) -> dict[str, Any]:
        """One request to the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"what": what, **values}) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, argv: Sequence[str], size: int = 2) -> Job:
        """`bellbox` with these arguments, in so many processes."""
        self._count += 1
        names = [
            [str(self.folder / f"{self._count}-{rank}.{kind}") for kind in ("out", "err")]
            for rank in range(size)
        ]
        pids = self.ask("start", argv=list(argv), files=names, port=free_port())["pids"]
        return Job(self, pids, [Path(err) for _, err in names], [Path(out) for out, _ in names])

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def _serve() -> int:
    import torch
    import torch._dynamo  # the optimizer would import it in every child
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    import bellbox.cli.train
    from bellbox.cli.main import main

    del bellbox
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["what"] == "wait":
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in asked["pids"]]
            print(json.dumps({"codes": codes}), flush=True)
            continue
        pids = []
        for rank, files in enumerate(asked["files"]):
            pid = os.fork()
            if pid == 0:
                for number, name in zip((1, 2), files, strict=True):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                size = str(len(asked["files"]))
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(asked["port"]),
                }  # fmt: skip
                main(asked["argv"])
                return 0
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_serve())
