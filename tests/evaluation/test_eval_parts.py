"""Losses document by document: every token once, in its document, and together the split's loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bellbox.data.prepare import prepare
from bellbox.data.shards import TokenSplit
from bellbox.evaluation import perplexity
from bellbox.evaluation.accuracy import accuracy
from bellbox.evaluation.parts import MOST, PartLosses, TokenParts, image_losses

WORDS = list("etaoin shrdlu")


class Bigram(nn.Module):
    """Logits from the last token alone, so that a loss does not depend on the window."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Parameter(
            torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


def split_of(folder: Path, documents: int) -> TokenSplit:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, generator.integers(5, 40))) for _ in range(documents)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "valid.jsonl").write_text(lines, encoding="utf-8")
    (folder / "train.txt").write_text(" ".join(WORDS * 40), encoding="utf-8")
    source = [folder / "train.txt"]
    return prepare(source, folder / "tokens", vocab_size=270, valid=[folder / "valid.jsonl"]).valid


@pytest.mark.parametrize(("documents", "together"), [(20, 1), (256, 1), (300, 2), (700, 3)])
def test_a_part_is_a_document_or_some_neighbours(tmp_path: Path, documents: int, together: int) -> None:
    split = split_of(tmp_path, documents)
    parts = TokenParts(split)
    tokens = split.read(0, len(split))
    ends = np.flatnonzero(tokens == split.dataset.end_of_text) + 1
    assert len(ends) == documents
    assert parts.unit == "documents"
    assert len(parts.ends) == -(-documents // together) <= MOST
    assert parts.ends.tolist() == [*ends[together - 1 :: together][: len(parts.ends) - 1], len(split)]


def test_losses_are_those_of_their_documents_in_any_batches(tmp_path: Path) -> None:
    split = split_of(tmp_path, 30)
    model = Bigram(270)
    tokens = torch.from_numpy(split.read(0, len(split)))
    with torch.no_grad():
        nats = nn.functional.cross_entropy(model(tokens[:-1]), tokens[1:], reduction="none").double().numpy()
    parts = TokenParts(split)
    starts = np.concatenate([[1], parts.ends[:-1]])
    expected = [nats[start - 1 : end - 1].mean() for start, end in zip(starts, parts.ends, strict=True)]
    for context, stride, batch in ((16, None, 3), (32, 8, 5)):
        sums = parts.losses()
        found = perplexity(model, split, context, stride=stride, batch_size=batch, each=sums.add)
        record = sums.record()
        assert record is not None
        assert record["unit"] == "documents"
        assert record["sizes"] == (parts.ends - starts).tolist()
        assert record["losses"] == pytest.approx(expected, rel=1e-5)
        assert np.average(record["losses"], weights=record["sizes"]) == pytest.approx(found.loss, rel=1e-5)
        assert found == perplexity(model, split, context, stride=stride, batch_size=batch)
        assert "right" not in record


def test_a_single_text_is_cut_into_blocks(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(WORDS * 300), encoding="utf-8")
    split = prepare([tmp_path / "book.txt"], tmp_path / "tokens", vocab_size=270, valid_fraction=0.5).valid
    parts = TokenParts(split)
    assert parts.unit == "blocks of tokens"
    lengths = np.diff(parts.ends, prepend=0)
    assert 2 < len(lengths) <= MOST
    assert lengths.min() >= 64
    assert lengths.max() - lengths.min() <= 1
    assert parts.ends[-1] == len(split)


def test_images_are_dealt_out_and_judged() -> None:
    labels = np.arange(600) % 3

    class Split:
        where = "here"

        def __init__(self) -> None:
            self.labels = labels

        def __len__(self) -> int:
            return 600

        def read(self, places: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(places % 255).reshape(-1, 1, 1, 1)

    class Sees(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([images.flatten(), torch.full((len(images),), 0.5), 1 - images.flatten()], 1)

    sums = image_losses(600)
    found = accuracy(Sees(), Split(), batch_size=70, each=sums.add)  # pyright: ignore[reportArgumentType]
    record = sums.record()
    assert record is not None
    assert record["unit"] == "images"
    assert len(record["sizes"]) == MOST
    assert sorted(set(record["sizes"])) == [2, 3]
    assert sum(record["right"]) / 600 == found.accuracy
    assert np.average(record["losses"], weights=record["sizes"]) == pytest.approx(found.loss, rel=1e-5)


def test_parts_without_tokens_are_left_out_and_infinite_losses_are_no_record() -> None:
    sums = PartLosses("documents", 3, lambda at: at % 2 * 2)
    sums.add(0, np.array([1.0, 2.0, 3.0]))
    assert sums.record() == {"unit": "documents", "sizes": [2, 1], "losses": [2.0, 2.0]}
    sums.add(3, np.array([np.inf]))
    assert sums.record() is None
