from __future__ import annotations

import math
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from bellbox.data import TokenDataset
from bellbox.data.prepare import prepare
from bellbox.errors import BellboxError
from bellbox.evaluation import perplexity, unigram
from bellbox.evaluation.unigram import counts


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder: Path = tmp_path_factory.mktemp("unigram")
    train, valid = folder / "train.txt", folder / "valid.txt"
    train.write_text("one two three two one two " * 50)
    valid.write_text("two one never seen: xyz two\n<|endoftext|>\nthree")
    return prepare([train], folder / "out", valid=[valid], vocab_size=280, shard_tokens=100)


def test_it_equals_a_plain_loop(dataset: TokenDataset) -> None:
    train, valid = (split.read(0, len(split)).tolist() for split in (dataset.train, dataset.valid))
    seen = Counter(train)
    total = len(train) + dataset.vocab_size
    nats = -sum(math.log((seen[token] + 1) / total) for token in valid[1:])
    result = unigram(dataset)
    assert result.tokens == len(valid) - 1
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)
    size = dataset.valid.bytes - len(dataset.tokenizer.token_bytes()[valid[0]])
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-12)


def test_it_scores_the_tokens_that_perplexity_scores(dataset: TokenDataset) -> None:
    class Unigram(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            log = torch.from_numpy(counts(dataset.train, dataset.vocab_size) + 1).double().log()
            return log.expand(*tokens.shape, -1)

    measured = perplexity(Unigram(), dataset.valid, 8)
    floor = unigram(dataset)
    assert measured.tokens == floor.tokens
    assert measured.loss == pytest.approx(floor.loss, rel=1e-6)
    assert measured.bits_per_byte == pytest.approx(floor.bits_per_byte, rel=1e-6)


def test_counts_cover_the_split_over_its_parts(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("bellbox.evaluation.unigram"), "_AT_ONCE", 7)
    ids = dataset.train.read(0, len(dataset.train)).tolist()
    assert counts(dataset.train, dataset.vocab_size).tolist() == [
        Counter(ids)[token] for token in range(dataset.vocab_size)
    ]


def test_a_split_that_is_not_there_is_named(dataset: TokenDataset) -> None:
    with pytest.raises(BellboxError, match="no split 'test'"):
        unigram(dataset, valid="test")


def test_where_no_scored_token_stands_for_bytes_there_are_no_bits_per_byte(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one two three " * 50)
    (tmp_path / "valid.txt").write_text("a")
    dataset = prepare(
        [tmp_path / "train.txt"], tmp_path / "out", valid=[tmp_path / "valid.txt"], vocab_size=280
    )
    result = unigram(dataset)
    assert (result.tokens, result.bits_per_byte) == (1, None)
    assert math.isfinite(result.loss)
