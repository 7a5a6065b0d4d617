"""What binds a run together, and what a checkpoint must not be taken for."""

from __future__ import annotations

import dataclasses
import errno
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import yaml

from bellbox.errors import BellboxError
from bellbox.runs import checkpoint as checkpoints
from bellbox.runs.checkpoint import CheckpointWarning
from bellbox.runs.config import DataSection, PhasesSection
from bellbox.training import TrainConfig, Trainer, load_config, load_run, train

Tiny = Callable[..., TrainConfig]


def edit(file: Path, section: str | None, key: str, value: object) -> None:
    content = yaml.safe_load(file.read_text())
    (content if section is None else content[section])[key] = value
    file.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("quantization", "bits", 3, "quantization.bits is 2 there, 3 here"),
        ("optimizer", "eps", 1e-3, "optimizer.eps is 1e-08 there, 0.001 here"),
        ("data", "context", 8, "data.context is 16 there, 8 here"),
        (None, "steps", 3, "steps is 4 there, 3 here"),
        (
            "model",
            "overrides",
            {
                "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
                "max_position_embeddings": 16, "vocab_size": 270,
            },
            "model.overrides.num_attention_heads is 2 there, 4 here",
        ),
    ],
)  # fmt: skip
def test_a_number_changed_in_the_configuration_is_refused_by_name(
    tiny: Tiny, section, key, value, says
) -> None:
    config = tiny()
    train(config, show=False)
    file = Path(config.folder) / "config.yaml"
    edit(file, section, key, value)
    if key == "context":
        edit(file, "batch", "tokens", 32)
    with pytest.raises(BellboxError, match=says) as refused:
        load_run(config.folder)
    assert "\n" not in str(refused.value)
    with pytest.raises(BellboxError, match=says):
        train(load_config(file), show=False)


def test_how_a_run_is_watched_may_change_and_older_checkpoints_still_open(tiny: Tiny) -> None:
    config = tiny()
    train(config, show=False)
    folder = Path(config.folder)
    edit(folder / "config.yaml", None, "eval_every", 3)
    assert load_run(folder).step == 4
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        content = json.loads(manifest.read_text())
        assert content.pop("run")["config"]["quantization"]["bits"] == 2
        manifest.write_text(json.dumps(content))
    edit(folder / "config.yaml", "optimizer", "eps", 1e-3)  # nothing says that it was another one
    assert load_run(folder).step == 4


def test_another_tokenizer_is_refused_by_name(tiny: Tiny) -> None:
    config = tiny(steps=1)
    train(config, show=False)
    file = Path(config.folder) / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(BellboxError, match=r"tokenizer.json: is not the tokenizer that .*step-00000001 was"):
        load_run(config.folder)


def test_a_shard_that_was_changed_between_two_starts_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    tokens = tiny_run.write_tokens(tmp_path / "tokens", 2000)
    config = tiny(steps=2, data=DataSection(source=str(tokens), context=16))
    train(config, show=False)
    longer = dataclasses.replace(config, steps=3)
    shard = sorted(tokens.glob("train-*.bin"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content)  # looks another way, and holds the same
    assert train(longer, show=False).step == 3
    ids = np.frombuffer(content, np.uint16).copy()
    ids[5] ^= 1
    shard.write_bytes(ids.tobytes())
    with pytest.raises(BellboxError, match=rf"{shard.name}: was changed since the run was begun"):
        train(dataclasses.replace(config, steps=4), show=False)


def test_a_finished_run_goes_on_with_more_steps(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny(steps=2), show=False).finished
    result = train(tiny(steps=3), show=True)
    assert (result.step, result.total_steps, result.finished) == (3, 3, True)
    assert (
        "steps: 2 before, 3 now; from here on the learning rate follows the longer" in capsys.readouterr().out
    )
    assert load_run(result.folder, 2).step == 2  # checkpoints of before still open
    assert load_config(result.folder / "config.yaml").steps == 3
    with pytest.raises(BellboxError, match="steps is 3 there, 2 here"):
        train(tiny(steps=2), show=False)


def test_a_run_with_phases_is_made_longer_in_its_last_one_and_the_older_checkpoint_opens(tiny: Tiny) -> None:
    phases = PhasesSection(quantized=0.5)
    train(tiny(steps=4, phases=phases), show=False)
    train(tiny(steps=6, phases=phases), show=False)
    assert [load_run(tiny().folder, step).phase.start for step in (4, 6)] == [2, 2]
    with pytest.raises(BellboxError, match=r"phases\.quantized is 0\.66\d+ there, 0\.9 here"):
        train(tiny(steps=6, phases=PhasesSection(quantized=0.9)), show=False)


def test_a_newer_format_is_refused_and_never_trained_over(tiny: Tiny) -> None:
    config = tiny()
    train(config, show=False)
    last = Path(config.folder) / "checkpoints" / "step-00000004"
    content = json.loads((last / "manifest.json").read_text())
    (last / "manifest.json").write_text(json.dumps({**content, "format_version": 7}))
    before = sorted(path.name for path in last.parent.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for act in (lambda: load_run(config.folder), lambda: train(config, show=False)):
            with pytest.raises(
                BellboxError, match=r"step-00000004: checkpoint format 7 is of a newer bellbox"
            ):
                act()
    assert sorted(path.name for path in last.parent.iterdir()) == before
    assert load_run(config.folder, 2).step == 2


def test_a_folder_that_is_named_for_another_step_is_refused_by_name(tiny: Tiny) -> None:
    config = tiny()
    train(config, show=False)
    places = Path(config.folder) / "checkpoints"
    (places / "step-00000004").rename(places / "step-00000009")
    for act in (lambda: load_run(config.folder), lambda: train(config, show=False)):
        with pytest.raises(BellboxError, match="step-00000009: holds the checkpoint of step 4"):
            act()
    (places / "step-00000009").rename(places / "step-00000004")
    assert load_run(config.folder).step == 4


def test_what_is_taken_in_place_of_a_damaged_checkpoint_is_said(tiny: Tiny) -> None:
    config = tiny()
    train(config, show=False)
    damaged = Path(config.folder) / "checkpoints" / "step-00000004" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.warns(
        CheckpointWarning, match=r"step-00000004.*damaged.*; .*step-00000002 is taken in its place"
    ):
        assert load_run(config.folder).step == 2


def test_a_full_disk_names_the_file_and_leaves_the_last_checkpoint(tiny: Tiny, monkeypatch) -> None:
    trainer = Trainer(tiny(steps=4), show=False)
    whole = checkpoints.sync

    def full(path: Path) -> None:
        if "step-00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path)

    monkeypatch.setattr(checkpoints, "sync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        trainer.run()
    assert str(caught.value.filename).endswith("step-00000004")
    places = trainer.folder / "checkpoints"
    assert sorted(path.name for path in places.iterdir()) == ["step-00000002"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_records_that_cannot_be_written_name_their_file(tiny: Tiny, monkeypatch) -> None:
    trainer = Trainer(tiny(steps=2), show=False)
    opened = trainer._open_folder

    def on_a_full_disk() -> None:
        opened()
        trainer.metrics._file.close()
        trainer.metrics._file = open("/dev/full", "w")  # noqa: SIM115

    monkeypatch.setattr(trainer, "_open_folder", on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device") as caught:
        trainer.run()
    assert str(caught.value.filename).endswith("metrics.jsonl")
