from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bellbox.comparison import Result
from bellbox.comparison.plan import Wanted
from bellbox.data.prepare import prepare
from bellbox.training import TrainConfig

Grid = Callable[..., Path]
Start = Callable[..., "subprocess.Popen[str]"]

SIZE = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
WORDS = "the cat sat on the mat and the dog on the log while a hen ran from a fox to its box . "


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "text.txt").write_text(WORDS * 100, encoding="utf-8")
    prepare([str(folder / "text.txt")], folder / "tokens", vocab_size=270, valid_fraction=0.2)
    return folder / "tokens"


@pytest.fixture
def grid(tokens: Path, tmp_path: Path) -> Grid:
    """`grid(rows={...}, seeds=[0])`: a grid file whose runs take a moment each; `over` is laid over its base."""

    def write(name: str = "small", steps: int = 4, over: dict[str, Any] | None = None, **keys: Any) -> Path:
        base = {
            "model": {"preset": "tiny", "overrides": SIZE},
            "data": {"source": str(tokens), "context": 16},
            "batch": {"tokens": 64, "micro_sequences": 4},
            "steps": steps, "precision": "fp32", "device": "cpu", "threads": 1,
            "eval_every": 2, "checkpoint_every": 2, "log_every": 1, "tensorboard": False,
        }  # fmt: skip
        file = tmp_path / f"{name}.yaml"
        base |= over or {}
        file.write_text(yaml.safe_dump({"base": base, "lr": [1e-2], **keys}, sort_keys=False))
        return file

    return write


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start `bellbox compare` in a process of its own."""

    def begin(*arguments: object) -> subprocess.Popen[str]:
        code = "from bellbox.cli.main import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, "compare", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "2"}, start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT}),
        )  # fmt: skip

    return begin


@pytest.fixture
def result() -> Callable[..., Result]:
    """A made-up line of results."""

    def make(
        row: str = "BBQ", bits: float | None = 2.0, lr: float = 1e-3, seed: int = 0, **changes: Any
    ) -> Result:
        config = TrainConfig().to_dict()
        config.pop("folder")
        config["optimizer"]["lr"], config["seed"], config["data"]["seed"] = lr, seed, seed
        config["quantization"]["method"] = "none" if bits is None else "bbq"
        values: dict[str, Any] = {
            "study": "s", "overrides": {}, "config": config, "data": "d", "steps": 1000, "tokens": 8_192_000,
            "loss": 3.0, "perplexity": 20.0, "machine": {"device": "cpu", "cpu": "a cpu", "threads": 1},
            "date": "2026-01-02", "version": "1",
        }  # fmt: skip
        return Result(row=row, bits=bits, lr=lr, seed=seed, **{**values, **changes})

    return make


@pytest.fixture
def finished(result: Callable[..., Result]) -> Callable[..., Result]:
    """A made-up line of a run of study `small` that a plan wants."""

    def make(run: Wanted, loss: float | None, **changes: Any) -> Result:
        config = run.config.to_dict()
        config.pop("folder")
        made = result(run.cell.row, run.cell.bits, run.lr, run.seed)
        values = {"study": "small", "config": config, "data": run.data, "loss": loss, **changes}
        return dataclasses.replace(made, **values)

    return make
