"""Timing contenders against each other on a machine that is never quite still."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_LEAST = 1e-9
"""Seconds that a call counts at least."""


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """Of at least two measurements."""
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, low, high)


def take_turns(
    contenders: Mapping[str, Callable[[int], object]], seconds: float, least: int = 5
) -> dict[str, Spread]:
    """Time contenders round by round, each once a round, so that a drift of the machine meets all of them.

    The order is drawn anew for each round, and each contender runs once untimed before it is timed: otherwise one that
    comes after a large one finds the caches full of that one's data and code.

    With one thread, time is what the processor spends on this process: others that have it in between cost no more
    than the caches that they spoil. With more threads it is the wall's.

    Args:
        contenders: called with numbers that rise, so that a contender can change its weights from call to call.
        seconds: how long, all together.
        least: rounds at least, however long they take.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(0)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    deadline = time.perf_counter() + seconds
    turn, order, shuffle = 0, list(contenders.items()), random.Random(0).shuffle
    while turn < least or time.perf_counter() < deadline:
        shuffle(order)
        for name, run in order:
            run(2 * turn)
            begun = clock()
            run(2 * turn + 1)
            times[name].append(max(clock() - begun, _LEAST))  # a clock may stand still over so short a call
        turn += 1
    return {name: Spread.of(values) for name, values in times.items()}
