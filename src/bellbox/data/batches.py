"""Batches of tokens: a function of (seed, step, rank), so that resuming needs no stored state.

An epoch visits every window of `context + 1` tokens exactly once; windows lie at stride `context`, so that no
token is a target twice. Their order is a pseudo-random permutation computed from (seed, epoch), a Feistel
network over the window numbers: any place in the order is found in constant time and memory, for billions of
windows, with no shuffled list. Each epoch also shifts all windows by a random phase, so that the model does
not meet the same cuts again (and leaves out under two windows at the ends). The end of an epoch flows into
the next one within a batch.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import numpy as np
import torch

from bellbox.data.shards import TokenSplit
from bellbox.errors import BellboxError

_MASK = (1 << 64) - 1
_ROUNDS = 8


def _mix(value: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose output bits all depend on all input bits (the SplitMix64 finaliser)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit number from several; every part changes it."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix(state + np.uint64((part * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK))
    return int(state[0])


class Permutation:
    """A pseudo-random bijection of `0 .. size - 1`, evaluated at any place on its own.

    A Feistel network permutes the numbers of an even number of bits; those that leave the range are sent
    through again until they are back in it ("cycle walking"), fewer than four times on average.
    """

    def __init__(self, size: int, *key: int) -> None:
        """A permutation of `size` >= 1 numbers, another one for every key."""
        self.size = size
        # At least 3 bits a half: with fewer, the network knows only a handful of permutations.
        self._half = max(3, ((size - 1).bit_length() + 1) // 2)
        self._keys = [np.uint64(key_of(*key, number)) for number in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Where each position (integers, each in the range) goes, int64 of the same shape."""
        values = self._network(np.asarray(positions, dtype=np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << half) | right


class Walk:
    """The windows of one split, one after the other in an endless order of epochs.

    Args:
        split: tokens to draw from.
        context: tokens a sequence, T.
        seed: another one gives another order.

    Raises:
        BellboxError: for a split shorter than one window.
    """

    def __init__(self, split: TokenSplit, context: int, seed: int) -> None:
        if len(split) < context + 1:
            raise BellboxError(
                f"split '{split.name}' holds {len(split)} tokens, one window of context {context} needs "
                f"{context + 1}; shorten the context or prepare more text"
            )
        self.split, self.context, self.seed = split, context, seed
        # One window fewer than fit, where there are several, leaves room for every phase in every epoch.
        self.windows_per_epoch = max(1, len(split) // context - 1)
        self._phases = min(context, len(split) - self.windows_per_epoch * context)
        self._orders: dict[int, tuple[Permutation, int]] = {}

    def starts(self, places: np.ndarray) -> np.ndarray:
        """The first token of the windows at these places of the order, int64 `[n]`."""
        epochs, positions = np.divmod(np.asarray(places, dtype=np.int64), self.windows_per_epoch)
        starts = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order, phase = self._order(epoch)
            starts[here] = order(positions[here]) * self.context + phase
        return starts

    def read(self, start: int) -> np.ndarray:
        """A window and the token after it, int64 `[T + 1]`."""
        return self.split.read(start, start + self.context + 1)

    def _order(self, epoch: int) -> tuple[Permutation, int]:
        if epoch not in self._orders:
            order = Permutation(self.windows_per_epoch, self.seed, epoch, 0)
            phase = key_of(self.seed, epoch, 1) % self._phases
            self._orders = {epoch: (order, phase)}  # the last one only: steps move forward
        return self._orders[epoch]


class Steps(ABC):
    """Which samples a rank reads at a step: the S samples of step s are s S to (s + 1) S - 1, in order of ranks.

    So what a step reads does not depend on the number of ranks, and is found by arithmetic.

    Args:
        context: tokens a sequence, T.
        sequences_per_step: sequences of one optimizer step over all ranks, S.
        seed: any integer; another one gives another order.
        rank, world_size: this process and how many there are; `world_size` divides S.

    Raises:
        BellboxError: sizes that do not fit.
    """

    def __init__(
        self, context: int, sequences_per_step: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if context < 1 or sequences_per_step < 1:
            raise BellboxError(
                f"batches of {sequences_per_step} sequences of {context} tokens: both must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise BellboxError(f"rank {rank} of {world_size} processes: ranks are 0 to {world_size - 1}")
        if sequences_per_step % world_size:
            raise BellboxError(
                f"{sequences_per_step} sequences a step do not divide among {world_size} processes; "
                f"take a multiple of {world_size}"
            )
        self.context = context
        self.sequences_per_step = sequences_per_step
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    @abstractmethod
    def windows(self, samples: np.ndarray) -> list[np.ndarray]:
        """The windows of these samples (int64 `[n]`), each with the token after it, int64 `[T + 1]`."""

    def samples(self, step: int) -> np.ndarray:
        """Numbers of this rank's samples at a step, int64 `[S / world_size]`."""
        if step < 0:
            raise BellboxError(f"step {step}: steps are counted from 0")
        share = self.sequences_per_step // self.world_size
        first = step * self.sequences_per_step + self.rank * share
        return np.arange(first, first + share, dtype=np.int64)

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of this rank at a step, int64 `[S / world_size, T]` each, on the CPU.

        The targets are the inputs' successors. The same arguments give the same tensors at any time.
        """
        tokens = torch.from_numpy(np.stack(self.windows(self.samples(step))))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def checksum(self, step: int) -> str:
        """SHA-256 of what all ranks together read at a step, the same on each of them."""
        first = step * self.sequences_per_step
        digest = hashlib.sha256()
        for sample in range(first, first + self.sequences_per_step):
            (window,) = self.windows(np.array([sample]))
            digest.update(window.astype("<i8").tobytes())
        return digest.hexdigest()


class Batches(Steps):
    """The batches of a training run over one split.

    Args:
        split: tokens to draw from.
        context, sequences_per_step, seed, rank, world_size: as of `Steps`.

    Raises:
        BellboxError: for a split shorter than one window, or sizes that do not fit.
    """

    def __init__(
        self,
        split: TokenSplit,
        context: int,
        sequences_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(context, sequences_per_step, seed, rank, world_size)
        self.walk = Walk(split, context, seed)
        self.split = split
        self.windows_per_epoch = self.walk.windows_per_epoch

    def epoch_of(self, step: int) -> int:
        """The epoch that the first sequence of a step belongs to, from 0."""
        return step * self.sequences_per_step // self.windows_per_epoch

    def starts(self, step: int) -> list[int]:
        """The first token of each of this rank's windows at a step."""
        return self.walk.starts(self.samples(step)).tolist()

    def windows(self, samples: np.ndarray) -> list[np.ndarray]:
        """See `Steps`."""
        return [self.walk.read(start) for start in self.walk.starts(samples).tolist()]
