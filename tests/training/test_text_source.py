"""Text as `data.source` of a run: prepared once, into the run's folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_run import config as tiny

from bellbox import data
from bellbox.data.prepare import prepare
from bellbox.errors import BellboxError
from bellbox.runs.resolve import load_resolved
from bellbox.training import Trainer


def write_text(path: Path, documents: int = 40) -> Path:
    words = [
        "the",
        "bell",
        "rings",
        "and",
        "a",
        "box",
        "of",
        "sand",
        "falls",
        "on",
        "every",
        "hill",
        "by",
        "night",
    ]
    texts = [" ".join(words[(i * j + j) % len(words)] for j in range(1, 60)) for i in range(1, documents)]
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


def run_of(text: Path, folder: Path, **section: object):
    config = tiny(text, folder)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, vocab_size=300, **section))


def test_a_run_prepares_its_text_once_and_goes_on_without_it(tmp_path):
    text, folder = write_text(tmp_path / "book.txt"), tmp_path / "run"
    config = run_of(text, folder)
    first = Trainer(config, show=False).run()
    assert first.finished
    saved = load_resolved(folder / "config.yaml")
    assert saved.data.source == str(folder / "data")
    dataset = data.open(folder / "data")
    assert dataset.vocab_size == 300
    text.unlink()
    assert Trainer(saved, show=False).run().step == first.step  # the run's own file needs the text no more


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"vocab_size": 300}, "data.vocab_size is for text that is prepared first"),
        ({"tokenizer": "somewhere"}, "data.tokenizer is for text"),
        ({"valid": ["x.txt"]}, "data.valid is for text"),
    ],
)
def test_options_for_text_beside_tokens_are_refused(tmp_path, section, says):
    tokens = tmp_path / "tokens"
    prepare([write_text(tmp_path / "book.txt")], tokens, vocab_size=300)
    config = tiny(tokens, tmp_path / "run")
    with pytest.raises(BellboxError, match=says):
        Trainer(dataclasses.replace(config, data=dataclasses.replace(config.data, **section)), show=False)


def test_reading_stops_soon_after_the_limit(tmp_path):
    text, valid = write_text(tmp_path / "book.txt", 12000), [write_text(tmp_path / "valid.txt", 30)]
    whole = prepare([text], tmp_path / "whole", vocab_size=300, valid=valid)
    known = tmp_path / "whole" / "tokenizer.json"
    part = prepare([text], tmp_path / "part", tokenizer=known, valid=valid, max_tokens=100_000)
    assert 100_000 <= len(part.train) < len(whole.train)
    kept = len(part.train)
    assert (part.train.read(0, kept) == whole.train.read(0, kept)).all()
    with pytest.raises(BellboxError, match="at most 0 tokens"):
        prepare([text], tmp_path / "none", max_tokens=0)
