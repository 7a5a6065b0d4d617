from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bellbox.errors import BellboxError
from bellbox.runs.metrics import MetricsWriter, perplexity_of, read_records


def record(step: int, kind: str = "train", loss: float = 1.0) -> dict[str, object]:
    return {"kind": kind, "step": step, "loss": loss}


def test_every_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, 0, tensorboard=False)
    writer.write(record(1))
    assert read_records(tmp_path / "metrics.jsonl") == [record(1)]
    writer.close()


def test_going_on_cuts_away_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    lines = [record(1), record(2), record(2, "eval"), record(3), record(4), record(4, "eval"), record(5)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train", "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    writer = MetricsWriter(tmp_path, 4, 4, tensorboard=False)
    assert writer.last_evaluation == record(4, "eval")
    writer.write(record(5, loss=9.0))
    writer.close()
    assert read_records(tmp_path / "metrics.jsonl") == [*lines[:6], record(5, loss=9.0)]


def test_an_evaluation_that_the_checkpoint_does_not_know_is_cut_away(tmp_path: Path) -> None:
    lines = [record(3), record(4), record(4, "eval")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsWriter(tmp_path, 4, 2, tensorboard=False).close()
    assert read_records(tmp_path / "metrics.jsonl") == lines[:2]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, 0, tensorboard=False)
    writer.write({**record(1), "loss": math.inf, "gamma": {"a": math.nan}})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"kind": "train", "step": 1, "loss": None, "gamma": {"a": None}}


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nhello\n')
    with pytest.raises(BellboxError, match="line 2 is not a record"):
        read_records(tmp_path / "metrics.jsonl")


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, 0, 0, tensorboard=True)
    writer.write({**record(3, "eval", 2.5), "weight_entropy": {"mean": 1.5, "layers": {"a": 1.5}}})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(3, 2.5)]
    assert [e.value for e in events.Scalars("eval/weight_entropy/layers/a")] == [1.5]


def test_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert perplexity_of(1e6) == math.inf
    assert perplexity_of(0.0) == 1.0
