from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bellbox.data import Batches, TokenDataset, TokenSplit
from bellbox.data.batches import Permutation
from bellbox.data.shards import SplitEntry
from bellbox.errors import BellboxError


def counting(length: int, shards: int = 1) -> TokenSplit:
    """A split whose token at place i is i."""
    parts = np.array_split(np.arange(length, dtype=np.uint32), shards)
    entry = SplitEntry(tokens=length, documents=1, bytes=length, shards=[])
    return TokenSplit("train", entry, parts, dataset=None)  # type: ignore[arg-type]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 5000), st.integers(-3, 2**70), st.integers(0, 1000))
def test_the_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)(np.arange(size))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [64, 65, 4096, 4097])
def test_the_permutation_is_a_bijection_at_the_edges_of_its_network(size: int) -> None:
    assert len(set(Permutation(size, 5)(np.arange(size)).tolist())) == size


def test_the_permutation_looks_random() -> None:
    size, keys = 100, 2000
    table = np.stack([Permutation(size, key)(np.arange(size)) for key in range(keys)])
    # Where position 7 goes, and how far apart neighbours land, against chance (sd of a count: 4.4).
    landed = np.bincount(table[:, 7], minlength=size)
    assert abs(landed - keys / size).max() < 6 * (keys / size) ** 0.5
    steps = np.bincount((table[:, 1] - table[:, 0]) % size, minlength=size)
    assert steps[0] == 0
    assert abs(steps[1:] - keys / (size - 1)).max() < 6 * (keys / size) ** 0.5
    fixed = (table == np.arange(size)).sum(axis=1)
    assert abs(fixed.mean() - 1) < 0.15


def test_any_place_among_billions_is_found_at_once() -> None:
    order = Permutation(40_000_000_000, 1, 2)
    tracemalloc.start()
    places = order(np.arange(39_999_990_000, 40_000_000_000))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert len(set(places.tolist())) == 10_000
    assert 0 <= places.min() < 1e9
    assert 39e9 < places.max() < 40e9


def test_targets_are_the_successors_of_the_inputs() -> None:
    inputs, targets = Batches(counting(10_000, shards=7), 32, 6, seed=1).at(3)
    assert inputs.shape == targets.shape == (6, 32)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(32))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, two = (Batches(counting(5000), 16, 4, seed=9) for _ in range(2))
    forwards = [one.at(step) for step in range(200)]
    for step in (150, 3, 199, 0, 80):
        for first, second in zip(forwards[step], two.at(step), strict=True):
            assert torch.equal(first, second)
    other = Batches(counting(5000), 16, 4, seed=10)
    assert not torch.equal(other.at(0)[0], forwards[0][0])


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_share_out_the_same_step(world_size: int) -> None:
    alone = Batches(counting(3000), 8, 6, seed=4)
    ranks = [Batches(counting(3000), 8, 6, seed=4, rank=r, world_size=world_size) for r in range(world_size)]
    for step in (0, 61, 62, 500):
        together = torch.cat([rank.at(step)[0] for rank in ranks])
        assert torch.equal(together, alone.at(step)[0])


@pytest.mark.parametrize(
    ("length", "context", "sequences"), [(1000, 7, 5), (97, 8, 3), (33, 16, 4), (17, 16, 2)]
)
def test_an_epoch_visits_every_window_once_and_flows_into_the_next(
    length: int, context: int, sequences: int
) -> None:
    batches = Batches(counting(length), context, sequences, seed=0)
    count = batches.windows_per_epoch
    assert length - 2 * context < count * context + 1 <= length
    steps = 4 * count // sequences + 1
    starts = [start for step in range(steps) for start in batches.starts(step)]
    for epoch in range(4):
        mine = starts[epoch * count : (epoch + 1) * count]
        targets = Counter(token for start in mine for token in range(start + 1, start + context + 1))
        assert set(targets.values()) == {1}, "no token is a target twice in an epoch"
        assert sorted(mine) == list(range(min(mine), min(mine) + count * context, context))
    assert max(starts) + context < length


def test_epochs_differ_in_order_and_in_phase() -> None:
    batches = Batches(counting(4000), 20, 1, seed=3)
    count = batches.windows_per_epoch
    epochs = [[batches.starts(epoch * count + i)[0] for i in range(count)] for epoch in range(12)]
    assert len({min(epoch) for epoch in epochs}) > 6
    assert len({tuple(start - min(epoch) for start in epoch) for epoch in epochs}) == 12


def test_the_epoch_of_a_step_is_that_of_its_first_sequence() -> None:
    batches = Batches(counting(105), 10, 4, seed=0)  # 9 windows
    assert [batches.epoch_of(step) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 3]


def test_a_prepared_split_feeds_batches(dataset: TokenDataset) -> None:
    batches = Batches(dataset.train, 24, 3, seed=0)
    inputs, targets = batches.at(5)
    for row, start in enumerate(batches.starts(5)):
        window = torch.from_numpy(dataset.train.read(start, start + 25))
        assert torch.equal(inputs[row], window[:-1])
        assert torch.equal(targets[row], window[1:])


def test_sizes_that_do_not_fit_are_refused() -> None:
    split = counting(17)
    for arguments, message in [
        ((17, 1, 0), "holds 17 tokens, one window of context 17 needs 18; shorten the context"),
        ((0, 1, 0), "both must be at least 1"),
        ((4, 0, 0), "both must be at least 1"),
        ((4, 3, 0, 0, 2), "3 sequences a step do not divide among 2 processes"),
        ((4, 4, 0, 2, 2), "rank 2 of 2 processes"),
    ]:
        with pytest.raises(BellboxError, match=message):
            Batches(split, *arguments)
    with pytest.raises(BellboxError, match="step -1"):
        Batches(split, 16, 1, 0).at(-1)
