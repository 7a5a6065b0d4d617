"""Mixtures: shares, order and place by arithmetic; and batches that are read ahead."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_prose import sentences

from bellbox import data
from bellbox.data import TokenDataset
from bellbox.data.mixture import ROUND, MixedBatches, MixedDataset, shares_of
from bellbox.data.prefetch import Prefetched
from bellbox.data.prepare import prepare
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Three corpora of different sizes and one tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    known = Tokenizer.train([sentences(200)], 300)
    made = []
    for number, size in enumerate((400, 60, 120)):
        file = folder / f"{number}.txt"
        file.write_text(sentences(size, 1000 * number))
        made.append(prepare([file], folder / f"set{number}", tokenizer=known, valid_fraction=0.1))
    return made


def batches_of(mixed: MixedDataset, **options: int) -> MixedBatches:
    made = data.batches_of(mixed, **{"context": 16, "sequences_per_step": 8, "seed": 5, **options})
    assert isinstance(made, MixedBatches)
    return made


def test_each_round_has_exactly_the_shares(corpora: list[TokenDataset]) -> None:
    mixed = MixedDataset(list(zip(corpora, (0.5, 0.3, 0.2), strict=True)))
    weights = [
        {c.path: w for c, w in zip(corpora, (0.5, 0.3, 0.2), strict=True)}[part.path] for part in mixed.parts
    ]
    assert mixed.shares == [round(ROUND * weight) for weight in weights]
    batches = batches_of(mixed)
    for number in (0, 7):
        corpus, _ = batches.places(np.arange(number * ROUND, (number + 1) * ROUND))
        assert Counter(corpus.tolist()) == dict(enumerate(mixed.shares))
        # And is well mixed: the first half of a round has half of each, give or take.
        first = Counter(corpus[: ROUND // 2].tolist())
        assert all(abs(first[k] - share / 2) < 120 for k, share in enumerate(mixed.shares))


def test_each_corpus_is_gone_through_without_gap_or_repetition(corpora: list[TokenDataset]) -> None:
    mixed = MixedDataset(list(zip(corpora, (5, 3, 2), strict=True)))
    batches = batches_of(mixed)
    corpus, places = batches.places(np.arange(3 * ROUND))
    for number, share in enumerate(mixed.shares):
        assert sorted(places[corpus == number].tolist()) == list(range(3 * share))


def test_a_sample_is_the_window_of_its_corpus(corpora: list[TokenDataset]) -> None:
    mixed = MixedDataset(list(zip(corpora, (5, 3, 2), strict=True)))
    batches = batches_of(mixed)
    inputs, targets = batches.at(40)
    samples = batches.samples(40)
    corpus, places = batches.places(samples)
    assert len(set(corpus.tolist())) > 1
    for row, (number, place) in enumerate(zip(corpus.tolist(), places.tolist(), strict=True)):
        start = int(batches.walks[number].starts(np.array([place]))[0])
        wanted = mixed.parts[number].train.read(start, start + 17)
        assert inputs[row].tolist() == wanted[:-1].tolist()
        assert targets[row].tolist() == wanted[1:].tolist()


def test_the_order_depends_neither_on_ranks_nor_on_how_the_mixture_is_written(
    corpora: list[TokenDataset],
) -> None:
    pairs = list(zip(corpora, (5.0, 3.0, 2.0), strict=True))
    mixed, again = MixedDataset(pairs), MixedDataset([(one, 10 * weight) for one, weight in reversed(pairs)])
    assert mixed.checksum() == again.checksum()
    assert (
        mixed.checksum() != MixedDataset([(corpora[0], 5.0), (corpora[1], 4.0), (corpora[2], 1.0)]).checksum()
    )
    for step in (0, 511, 600):  # over the border of a round
        whole = batches_of(mixed).at(step)[0]
        assert batches_of(again).at(step)[0].equal(whole)
        ranks = [batches_of(mixed, rank=rank, world_size=4) for rank in range(4)]
        assert [row for each in ranks for row in each.at(step)[0].tolist()] == whole.tolist()
        assert {each.checksum(step) for each in ranks} == {batches_of(mixed).checksum(step)}
    assert not batches_of(mixed, seed=6).at(0)[0].equal(batches_of(mixed).at(0)[0])
    assert batches_of(mixed).checksum(0) != batches_of(mixed).checksum(1)


def test_validation_is_on_all_of_them(corpora: list[TokenDataset]) -> None:
    mixed = MixedDataset([(one, 1.0) for one in corpora])
    assert len(mixed.valid) == sum(len(one.valid) for one in corpora)
    assert mixed.valid.documents == 3
    parts = [part.valid.read(0, len(part.valid)) for part in mixed.parts]
    assert (mixed.valid.read(0, len(mixed.valid)) == np.concatenate(parts)).all()
    for name in (shard.file for entry in mixed.manifest.splits.values() for shard in entry.shards):
        assert mixed.file_of(name).is_file()


@pytest.mark.parametrize("weights", [[1.0], [1, 1, 1], [0.7, 0.2999, 0.0001 + 1 / ROUND], [3] * 7])
def test_shares_are_the_nearest(weights: list[float]) -> None:
    shares = shares_of(weights)
    assert sum(shares) == ROUND
    assert all(abs(s - ROUND * w / sum(weights)) <= 1 for s, w in zip(shares, weights, strict=True))


def test_what_cannot_be_mixed_is_one_line(corpora: list[TokenDataset], tmp_path: Path) -> None:
    paths = [str(one.path) for one in corpora]
    for weights, says in [
        ({paths[0]: 0.0}, "must be above 0 and finite"),
        ({paths[0]: float("nan"), paths[1]: 1.0}, "must be above 0 and finite"),
        ({paths[0]: 1.0, paths[1]: 1e-5}, "the smallest share is 1 in 4,096"),
        ({}, "a mixture of no datasets"),
        ({paths[0]: 1.0, f"{paths[0]}/../{corpora[0].path.name}": 1.0}, "hold the same"),
        ({str(tmp_path / "none"): 1.0}, "no such folder"),
    ]:
        with pytest.raises(BellboxError, match=says):
            data.open_mixture(weights)
    other = tmp_path / "other.txt"
    other.write_text(sentences(100, 77))
    made = prepare([other], tmp_path / "made", vocab_size=280)
    with pytest.raises(
        BellboxError, match="different tokenizers; prepare one of them again with --tokenizer"
    ):
        data.open_mixture({paths[0]: 1.0, str(made.path): 1.0})


def test_what_is_read_ahead_is_what_would_be_read() -> None:
    seen: list[tuple[int, str]] = []

    def read(step: int) -> int:
        seen.append((step, threading.current_thread().name))
        if step == 12:
            raise BellboxError("a bad step")
        return step * step

    ahead = Prefetched(read)
    assert [ahead.at(step) for step in (0, 1, 2, 3, 7, 8, 3, 10)] == [0, 1, 4, 9, 49, 64, 9, 100]
    assert all(name != threading.current_thread().name for _, name in seen)
    assert [step for step, _ in seen].count(2) == 1  # it was there when it was asked for
    assert ahead.at(11) == 121
    with pytest.raises(BellboxError, match="a bad step"):
        ahead.at(12)
    assert ahead.at(13) == 169
