from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from bellbox.errors import BellboxError
from bellbox.runs.checkpoint import FILES, Checkpoints, CheckpointWarning, State


def save(checkpoints: Checkpoints, step: int, loss: float | None = None) -> Path:
    state = State(step=step, tokens=step * 10, seconds=1.5, evaluated_step=step, loss=loss, random={"a": [1]})
    return checkpoints.save(state, {"w": torch.full((3, 2), float(step))}, {"w/step": torch.tensor(step)})


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    path = save(checkpoints, 100, 2.5)
    assert path.name == "step-00000100"
    assert sorted(entry.name for entry in path.iterdir()) == sorted([*FILES, "manifest.json"])
    last = checkpoints.last()
    assert last is not None
    assert (last.step, last.state.tokens, last.state.loss, last.state.random) == (100, 1000, 2.5, {"a": [1]})
    assert torch.equal(last.model_tensors()["w"], torch.full((3, 2), 100.0))
    assert int(last.optimizer_tensors()["w/step"]) == 100


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        save(checkpoints, step, loss)
    assert checkpoints.steps() == [2, 4, 5]
    last, best = checkpoints.last(), checkpoints.best()
    assert last is not None
    assert best is not None
    assert (last.step, best.step) == (5, 2)


def test_without_a_validated_one_the_best_is_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.best() is None
    save(checkpoints, 1)
    save(checkpoints, 2)
    best = checkpoints.best()
    assert best is not None
    assert best.step == 2


@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path: Path, file: str, how: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    victim = save(checkpoints, 2) / file
    content = bytearray(victim.read_bytes())
    if how == "remove":
        victim.unlink()
    elif how == "cut":
        victim.write_bytes(content[: len(content) // 2])
    else:
        # A changed digit of a hash, a changed byte of a tensor, a changed number: all must be found.
        position = content.index(b'"sha256": "') + 12 if file == "manifest.json" else len(content) - 3
        content[position] ^= 1
        victim.write_bytes(content)
    with pytest.warns(CheckpointWarning, match="step-00000002"):
        last = checkpoints.last()
    assert last is not None
    assert last.step == 1
    with pytest.raises(BellboxError, match="step-00000002"):
        checkpoints.at(2)


def test_another_format_version_is_refused_by_number(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    manifest = save(checkpoints, 1) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 3}))
    with pytest.raises(BellboxError, match=r"format 3.*reads up to 2"):
        checkpoints.at(1)


def test_a_step_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3)
    with pytest.raises(BellboxError, match="no checkpoint of step 7; there are: 3"):
        checkpoints.at(7)


def test_leftovers_of_killed_saves_are_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    (tmp_path / ".saving-step-00000002").mkdir()
    (tmp_path / ".saving-step-00000002" / "model.safetensors").write_bytes(b"half")
    checkpoints.clean()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = save(checkpoints, 1)
    path.rename(tmp_path / ".old-step-00000001")
    checkpoints.clean()
    last = checkpoints.last()
    assert last is not None
    assert last.step == 1


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, None)
    save(checkpoints, 1, 2.0)
    assert checkpoints.at(1).state.loss == 2.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_those_found_damaged_are_set_aside_and_no_longer_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.set_aside_after(1)
    assert checkpoints.steps() == [1]
    assert (tmp_path / ".damaged-step-00000002").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.last() is not None
