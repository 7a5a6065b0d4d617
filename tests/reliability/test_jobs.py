"""A short run of `benchmarks/reliability/jobs.py`, and one job under torchrun itself, which starts it again."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from waiting import finish, wait_for

FOLDER = Path(__file__).parents[2] / "benchmarks" / "reliability"
COUNTS = {
    "killed": 2, "one killed": 1, "stopped": 1, "terminated": 1, "cut off": 1, "damaged": 2, "clock back": 1,
    "two jobs": 1,
}  # fmt: skip
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")


@pytest.fixture(scope="module")
def jobs() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("jobs")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def bench(jobs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("bench")
    fleet = jobs.Fleet(folder / "said")
    yield jobs.Bench(folder, fleet)
    fleet.close()


OFTEN = ("killed", "damaged")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in COUNTS]
)
def test_a_job_of_two_survives_and_loses_nothing(name: str, jobs: ModuleType, bench: Any) -> None:
    bench.injected = bench.survived = bench.lost = 0
    jobs.FAULTS[name](bench, COUNTS[name], jobs.random.Random(3))
    assert bench.injected > 0
    assert (bench.survived, bench.lost) == (bench.injected, 0)


@pytest.mark.slow
def test_it_goes_on_with_other_numbers_of_ranks(jobs: ModuleType, bench: Any) -> None:
    """Of two, then one, then four: the records of all steps are there, and losses are those of two but for rounding."""
    for size, steps in ((2, 4), (1, 8), (4, bench.steps)):
        job = bench.start("sizes", size)
        job.until(lambda steps=steps: max(bench.steps_of("sizes"), default=0) >= steps)
        job.send(signal.SIGTERM)
        assert set(job.wait()) <= {0, 143}, job.said()
    ours, theirs = (jobs.records(bench.run(name)) for name in ("sizes", "whole"))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert all(abs(a["loss"] - b["loss"]) < 1e-3 for a, b in zip(ours, theirs, strict=True))


def _ranks_of(torchrun: int) -> list[int]:
    """The processes that train: the children of torchrun with a rank."""
    found = []
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(each.startswith(b"LOCAL_RANK=") for each in environment):
            found.append(int(child))
    return found


@pytest.mark.slow
def test_torchrun_starts_a_job_again_that_was_killed_while_it_saved(jobs: ModuleType, bench: Any) -> None:
    folder = bench.run("again")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
        "--monitor-interval", "0.1", "--standalone", "-m", "bellbox", "train",
        "--config", str(bench.folder / "config.yaml"), "--folder", str(folder),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    def caught() -> bool:
        """A rank stopped in the middle of a save that is not the first."""
        running = _ranks_of(process.pid)
        if len(bench.steps_of("again")) < 1 or len(running) < 2:
            return False
        os.kill(running[1], signal.SIGSTOP)
        if any((folder / "checkpoints").glob(".saving-*")):
            os.kill(running[1], signal.SIGKILL)
            return True
        os.kill(running[1], signal.SIGCONT)
        return False

    wait_for(caught, "a save to be caught", process.pid, pause=3e-3)
    reached = max(bench.steps_of("again"))
    _, said = finish(process)
    assert process.returncode == 0, said[-3000:]
    ours, theirs = bench.checkpoints("again").last(), bench.checkpoints("whole").last()
    assert reached < ours.step == theirs.step
    assert jobs.differing(ours, theirs) == 0
    assert jobs.records(folder) == jobs.records(bench.run("whole"))
