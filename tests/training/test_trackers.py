"""Trackers show what metrics.jsonl says, from rank 0 alone, and stop no run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bellbox.errors import BellboxError
from bellbox.runs import trackers
from bellbox.runs.metrics import MetricsWriter, read_records
from bellbox.runs.trackers import Tracker


def write(folder: Path, name: str, steps: range, start: int = 0) -> None:
    """A run, or one that goes on from a step."""
    writer = MetricsWriter(folder, start, start, False, [name], {"model": {"preset": "tiny"}, "seed": 3})
    for step in steps:
        writer.write({"kind": "train", "step": step, "loss": 1.0 / step, "lr": float("nan")})
    writer.sync()
    writer.close()


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, "wandb", range(1, 4))
    write(tmp_path, "wandb", range(4, 6), start=3)
    assert capsys.readouterr().err == ""
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # both are the same run
    content = b"".join(file.read_bytes() for file in files)
    assert b"train/loss" in content
    assert b"train/lr" not in content


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write(tmp_path, "mlflow", range(1, 4))
    write(tmp_path, "mlflow", range(4, 6), start=3)
    assert "warning" not in capsys.readouterr().err
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bellbox")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((each.step, each.value) for each in history) == [(n, 1.0 / n) for n in range(1, 6)]
    assert run.data.params == {"model.preset": "tiny", "seed": "3"}
    assert run.info.status == "FINISHED"


def test_aim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    aim = pytest.importorskip("aim")
    monkeypatch.delenv("AIM_REPO", raising=False)
    write(tmp_path, "aim", range(1, 4))
    write(tmp_path, "aim", range(4, 6), start=3)
    assert "warning" not in capsys.readouterr().err
    # To be read by others, Aim's own server has to index it first; a run that is opened to go on sees what it has.
    kept = json.loads((tmp_path / "trackers.json").read_text())["aim"]
    run = aim.Run(kept, repo=str(tmp_path), system_tracking_interval=None, capture_terminal_logs=False)
    (metric,) = [each for each in run.metrics() if each.name == "train/loss"]
    assert sorted(metric.values.sparse_list()[1]) == pytest.approx([1.0 / n for n in range(5, 0, -1)])
    assert run["config"]["seed"] == 3
    run.close()


class _Failing(Tracker):
    name = "failing"

    def __init__(self, *_: object) -> None:
        self.calls = 0

    def log(self, values, step: int) -> None:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("no\nnetwork")

    def close(self) -> None:
        raise AssertionError("it is out by now")


def test_a_tracker_that_fails_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(trackers._OTHERS, "failing", _Failing)
    monkeypatch.setattr(trackers, "require", lambda module, extra: None)
    write(tmp_path, "failing", range(1, 5))
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "failing failed and is left out from here on" in error
    assert "ConnectionError: no network" in error
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_one_that_cannot_even_begin_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers, "TensorBoard", refuse)
    writer = MetricsWriter(tmp_path, 0, 0, tensorboard=True)
    writer.write({"kind": "train", "step": 1, "loss": 1.0})
    writer.close()
    assert capsys.readouterr().err.count("tensorboard failed and is left out") == 1
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    MetricsWriter(tmp_path, 0, 0, tensorboard=True, trackers=["wandb"]).close()
    assert not (tmp_path / "tensorboard").exists()
    assert not (tmp_path / "trackers.json").exists()


def test_what_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        BellboxError, match=r"wandb is not installed; install it with: pip install 'bellbox\[wandb\]'"
    ):
        MetricsWriter(tmp_path, 0, 0, tensorboard=False, trackers=["wandb"])
    with pytest.raises(BellboxError, match="no tracker 'comet'; there are: wandb, mlflow, aim"):
        MetricsWriter(tmp_path, 0, 0, tensorboard=False, trackers=["comet"])
