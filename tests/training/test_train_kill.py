"""Processes that are really killed, each a child of a fork server (tiny_run.py), so that ten are quick."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_run
import torch

from bellbox.runs.config import CewtSection, OptimizerSection, PhasesSection
from bellbox.runs.metrics import WALL_CLOCK, read_records
from bellbox.training import TrainConfig, load_run, save_config
from waiting import wait_for

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

Tiny = Callable[..., TrainConfig]


class Server:
    """Trains one configuration after another, each in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, tiny_run.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, config_file: Path) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{config_file}\n")
        self._process.stdin.flush()
        return int(self._answer().removeprefix("started "))

    def end(self) -> int:
        return int(self._answer().removeprefix("ended "))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def write_config(config: TrainConfig) -> Path:
    file = Path(config.folder).with_suffix(".yaml")
    save_config(config, file)
    return file


def caught_saving(pid: int, checkpoints: Path) -> bool:
    """Stop the process; leave it so if it is in the middle of a save, else let it go on."""
    os.kill(pid, signal.SIGSTOP)
    if any(checkpoints.glob(".saving-*")):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def without_clock(config: TrainConfig) -> list[dict[str, object]]:
    found = read_records(Path(config.folder) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in WALL_CLOCK} for record in found]


@pytest.mark.parametrize("times", [5, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_often_it_ends_bit_identical(server: Server, tiny: Tiny, times: int) -> None:
    # A checkpoint after every step: most of the time goes into saving, so most kills hit a save.
    phases = PhasesSection(quantized=0.8, bits_before=[3])
    optimizer = OptimizerSection(cewt=CewtSection(every=2))
    settings = {
        "steps": 150, "checkpoint_every": 1, "eval_every": 10, "phases": phases, "optimizer": optimizer,
    }  # fmt: skip
    whole, killed = tiny("whole", **settings), tiny("killed", **settings)
    server.start(write_config(whole))
    assert server.end() == 0

    draw = random.Random(7)
    file, checkpoints = write_config(killed), Path(killed.folder) / "checkpoints"
    during_save = 0
    for attempt in range(times):
        reached = set(checkpoints.glob("step-*"))
        pid = server.start(file)
        if attempt % 5 == 4:
            time.sleep(draw.uniform(0, 0.15))  # perhaps before it has begun
        else:
            wait_for(
                lambda old=reached: bool(set(checkpoints.glob("step-*")) - old), "a new checkpoint", pid, 5e-4
            )
            time.sleep(draw.uniform(0, 0.05))
        if attempt % 2:
            wait_for(lambda pid=pid: caught_saving(pid, checkpoints), "a save to be caught", pid, 5e-4)
        os.kill(pid, signal.SIGKILL)
        assert server.end() == -signal.SIGKILL
        during_save += any(checkpoints.glob(".saving-*"))
    assert during_save >= times // 2 - 1
    assert load_run(killed.folder).step < 150

    server.start(file)
    assert server.end() == 0
    assert without_clock(killed) == without_clock(whole)
    ours, theirs = load_run(killed.folder), load_run(whole.folder)
    assert ours.step == theirs.step == 150
    state, other = ours.model.state_dict(), theirs.model.state_dict()
    for name in other:
        assert torch.equal(state[name], other[name]), name
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == sorted(path.name for path in (Path(whole.folder) / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_and_leaves(server: Server, tiny: Tiny, number: signal.Signals) -> None:
    config = tiny(steps=100000, eval_every=100000, checkpoint_every=100000, log_every=1)
    metrics = Path(config.folder) / "metrics.jsonl"
    pid = server.start(write_config(config))
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 3, "some steps", pid)
    os.kill(pid, number)
    assert server.end() == 128 + number
    run = load_run(config.folder)
    assert run.step >= 3
    assert [record["step"] for record in without_clock(config)][-1] == run.step

    # And from there it goes on as if nothing had been: the next step is the next one.
    pid = server.start(write_config(dataclasses.replace(config)))
    wait_for(lambda: metrics.read_bytes().count(b"\n") > run.step + 3, "further steps", pid)
    os.kill(pid, signal.SIGKILL)
    assert server.end() == -signal.SIGKILL
    steps = [record["step"] for record in without_clock(config)]
    assert steps == list(range(1, len(steps) + 1))
