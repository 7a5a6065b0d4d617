"""A run on a mixture: trained, gone on with, evaluated; another mixture is not the same data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bellbox.cli.main import main
from bellbox.data.prepare import prepare
from bellbox.errors import BellboxError
from bellbox.formats.auto import open_data_for, open_model
from bellbox.runs.config import DataSection
from bellbox.runs.config_file import config_from_dict, load_config
from bellbox.training import Trainer
from bellbox.training.tasks import open_data

SMALL = [
    "--model.preset", "tiny", "--model.overrides", "hidden_size=32", "intermediate_size=64", "num_hidden_layers=1",
    "num_attention_heads=2", "--data.context", "32", "--batch.tokens", "128", "--batch.micro-sequences", "4",
    "--no-tensorboard", "--precision", "fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer: Path | None = None
    for name, words in (("one", "a bell in a box rings "), ("two", "the tide comes and goes ")):
        (folder / f"{name}.txt").write_text("\n".join(f"{i}: {words * (3 + i % 5)}" for i in range(150)))
        made = prepare(
            [folder / f"{name}.txt"],
            folder / name,
            tokenizer=tokenizer,
            vocab_size=None if tokenizer else 300,
        )
        tokenizer = tokenizer or made.path / "tokenizer.json"
    return folder / "one", folder / "two"


def test_a_run_on_a_mixture(
    corpora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = corpora
    mixture = ["--data.mixture", f"{one}=0.75", f"{two}=0.25"]
    main(["train", "--folder", str(tmp_path / "run"), *mixture, "--steps", "2", *SMALL])
    first = capsys.readouterr().out
    assert "data: the batch of step 1 has the sha256 " in first
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert saved.data.mixture == {str(one): 0.75, str(two): 0.25}
    dataset = open_data(saved)
    assert len(dataset.valid) == sum(len(part.valid) for part in dataset.parts)
    # It goes on, with the batch that a run in one piece has there.
    main(["train", "--folder", str(tmp_path / "run"), *mixture, "--steps", "4", *SMALL])
    again = capsys.readouterr().out
    trainer = Trainer(dataclasses.replace(saved, steps=4, folder=str(tmp_path / "other")), show=False)
    assert f"data: the batch of step 3 has the sha256 {trainer.task.batch_checksum(2)[:16]}" in again
    # Its data are found again by what needs them.
    found, remark = open_data_for(open_model(tmp_path / "run"), None)
    assert remark is None
    assert len(found.valid) == len(dataset.valid)
    # Other weights are other data, wherever they are written.
    with pytest.raises(SystemExit):
        main(["train", "--folder", str(tmp_path / "run"), "--data.mixture", f"{one}=0.5", f"{two}=0.5", "--steps", "4",
              *SMALL])  # fmt: skip
    assert "data.mixture '0.5 " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"data": {"mixture": {"a": 1.0}, "source": "b"}}, "data.source is 'b' and data.mixture is given"),
        ({"data": {"mixture": {"a": -1.0}}}, "the weight of 'a' is -1.0, must be above 0"),
        ({"data": {"mixture": {"a": "much"}}}, "data.mixture.a"),
        ({"data": {"mixture": {"a": 1.0}}, "task": "vision"}, "data.mixture is for language"),
        ({"trackers": ["comet"]}, "trackers"),
    ],
)
def test_what_cannot_be_mixed_is_one_line(values, says: str) -> None:
    with pytest.raises(BellboxError, match=says) as caught:
        config_from_dict(values)
    assert "\n" not in str(caught.value)


def test_options_for_text_beside_a_mixture_are_refused(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    section = DataSection(mixture={str(corpora[0]): 1.0}, vocab_size=300)
    config = dataclasses.replace(config_from_dict({"folder": str(tmp_path / "run")}), data=section)
    with pytest.raises(
        BellboxError, match=r"data\.vocab_size is for text that is prepared first, but data\.mixture"
    ):
        Trainer(config, show=False)
