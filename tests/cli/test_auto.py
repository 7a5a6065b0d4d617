from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bellbox.data.prepare import prepare
from bellbox.errors import BellboxError
from bellbox.formats.auto import open_data_for, open_model


def test_all_three_kinds_of_folder_open_as_models_that_run(run: Path, packed: Path, hf: Path) -> None:
    ids = torch.arange(12).reshape(1, 12)
    for folder, kind, context in ((run, "run", 32), (packed, "packed", 64), (hf, "huggingface", 48)):
        opened = open_model(folder)
        assert (opened.kind, opened.context) == (kind, context)
        assert not opened.model.training
        assert opened.model(ids).shape[:2] == (1, 12)
        assert opened.tokenizer is not None
        assert opened.load_tokenizer().vocab_size == opened.model.config.vocab_size  # type: ignore[union-attr]
        assert str(folder) in opened.description


def test_a_checkpoint_of_a_run_is_chosen_by_step(run: Path) -> None:
    assert open_model(run).run.step == 30  # type: ignore[union-attr]
    assert open_model(run, "20").run.step == 20  # type: ignore[union-attr]
    with pytest.raises(BellboxError, match="no checkpoint of step 7"):
        open_model(run, "7")
    with pytest.raises(BellboxError, match="must be last, best or a step"):
        open_model(run, "newest")


def test_a_checkpoint_is_refused_where_there_are_none(packed: Path) -> None:
    with pytest.raises(BellboxError, match="only a run has checkpoints"):
        open_model(packed, "best")


def test_what_is_no_model_is_refused_by_name(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    for command in (
        ["eval"],
        ["generate", "--prompt", "x"],
        ["report"],
        ["convert", "--out", tmp_path / "o"],
    ):
        assert "no such folder" in refused(*command, tmp_path / "missing")
        assert "no model here" in refused(*command, tmp_path / "empty")
    assert not (tmp_path / "o").exists()


def test_data_of_another_tokenizer_is_refused(run: Path, packed: Path, hf: Path, other_tokens: Path) -> None:
    for folder in (run, packed, hf):
        with pytest.raises(BellboxError, match="another tokenizer"):
            open_data_for(open_model(folder), str(other_tokens))


def test_a_model_without_tokenizer_is_checked_by_its_vocabulary(
    hf: Path, tokens: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((hf / name).read_bytes())
    opened = open_model(bare)
    dataset, remark = open_data_for(opened, str(tokens))
    assert remark is not None
    assert "no tokenizer" in remark
    assert dataset.path == tokens
    with pytest.raises(BellboxError, match="has tokens up to"):
        open_data_for(opened, "classics")
    with pytest.raises(BellboxError, match="no tokenizer lies with the model"):
        opened.load_tokenizer()


def test_a_tokenizer_may_have_entries_that_the_model_lacks_until_one_occurs(
    hf: Path, tokens: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    spec = json.loads((tokens / "tokenizer.json").read_text())
    for number in (320, 321):
        extra = {**spec["added_tokens"][0], "id": number, "content": f"word{number}", "special": False}
        spec["added_tokens"].append(extra)
    wider = shutil.copytree(hf, tmp_path / "wider")
    (wider / "tokenizer.json").write_text(json.dumps(spec))
    for name, text in (("without", "some text " * 50), ("with", "some text word321 " * 50)):
        (tmp_path / f"{name}.txt").write_text(text)
        prepare([tmp_path / f"{name}.txt"], tmp_path / name, tokenizer=wider, valid_fraction=0.2)
    dataset, remark = open_data_for(open_model(wider), str(tmp_path / "without"))
    assert (dataset.vocab_size, dataset.largest_id() < 320, remark) == (322, True, None)
    message = refused("eval", wider, "--data", tmp_path / "with")
    assert "has tokens up to 321" in message
    assert "knows 320, from 0 to 319" in message
