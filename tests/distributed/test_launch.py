"""`bellbox train` as a launcher starts it: who prints, who writes, and how each process ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from bellbox.runs.config import DistributedSection
from bellbox.runs.config_file import save_config
from bellbox.runs.metrics import read_records


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def begin(config: Path, size: int, ranks: list[int], *flags: str) -> list[subprocess.Popen[str]]:
    """Some ranks of a job, as a launcher starts them."""
    port = str(_free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-m", "bellbox", "train", "--config", str(config), *flags],
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]  # fmt: skip


def launch(config: Path, size: int, ranks: list[int], *flags: str) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of each of some ranks."""
    started = begin(config, size, ranks, *flags)
    found = [process.communicate(timeout=550) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, found, strict=True)]


@pytest.fixture
def written(tokens: Path, tmp_path: Path) -> Any:
    def write(**changes: Any) -> Path:
        wanted = dataclasses.replace(tiny_run.config(tokens, tmp_path / "run"), steps=2, **changes)
        save_config(wanted, tmp_path / "wanted.yaml")
        return tmp_path / "wanted.yaml"

    return write


def test_the_first_process_alone_writes_and_prints(written: Any, tmp_path: Path) -> None:
    (first, out, err), (second, silent, nothing) = launch(written(), 2, [0, 1])
    assert (first, second) == (0, 0), err + nothing
    assert "2 processes (ddp)" in out
    assert "the run is in" in out
    assert silent == ""
    assert nothing == ""
    assert [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 2]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--batch.tokens", "48", "--batch.micro-sequences", "1"],
            "3 sequences a step do not divide among 2",
        ),
        pytest.param(["--distributed.mode", "none"], "2 processes were started", marks=pytest.mark.slow),
        pytest.param(["--steps", "0"], "steps is 0", marks=pytest.mark.slow),
        pytest.param(["--data.source", "nowhere"], "nowhere", marks=pytest.mark.slow),
    ],
    ids=["batch", "mode", "value", "data"],
)
def test_bad_input_is_one_line_of_the_first_process(
    written: Any, tmp_path: Path, flags: list[str], expected: str
) -> None:
    (first, _, said), (second, _, silent) = launch(written(), 2, [0, 1], *flags)
    assert (first, second) == (2, 2)
    lines = said.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bellbox: error: ")
    assert expected in lines[0]
    assert silent == ""
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "named"),
    [(0, "rank 1 of 2 did not come"), pytest.param(1, "rank 0 is missing", marks=pytest.mark.slow)],
)
def test_a_missing_process_is_named_in_bounded_time(written: Any, there: int, named: str) -> None:
    begun = time.monotonic()
    section = DistributedSection(timeout=3)
    ((code, _, said),) = launch(written(distributed=section), 2, [there])
    assert code == 2
    assert named in said
    assert len(said.strip().splitlines()) == 1, said
    assert time.monotonic() - begun < 200  # imports and three seconds, on a machine with other work


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(written: Any, tmp_path: Path) -> None:
    started = begin(written(), 2, [0, 1], "--steps", "100000", "--eval-every", "100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert all(process.poll() is None for process in started), [p.communicate() for p in started]
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    (out, _), (silent, _) = (process.communicate(timeout=550) for process in started)
    assert [process.returncode for process in started] == [143, 143]
    assert "saved; go on with" in out
    assert silent == ""
    step = max(record["step"] for record in read_records(metrics))
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()


@pytest.mark.slow
def test_torchrun_starts_the_program_itself(written: Any, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "bellbox"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--no-python", str(program), "train", "--config", str(written()),
         "--distributed.mode", "fsdp"],
        capture_output=True, text=True, timeout=550, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes (fsdp)") == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_a_mode_without_a_launcher_says_how_to_start_it(written: Any) -> None:
    without = {key: value for key, value in os.environ.items() if key != "RANK"}
    done = subprocess.run(
        [sys.executable, "-m", "bellbox", "train", "--config", str(written()), "--distributed.mode", "ddp"],
        capture_output=True, text=True, timeout=550, env=without,
    )  # fmt: skip
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2 -m bellbox train" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
