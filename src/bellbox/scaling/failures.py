"""How often to save on machines that fail: the formulas of Young and Daly beside a simulation.

A job of n GPUs fails n times as often as one of them. Saving seldom loses work at each failure, saving often loses
time at each checkpoint; the best interval lies where both are equal.
"""

from __future__ import annotations

import math

import numpy as np

from bellbox.errors import BellboxError

HOURS_A_GPU = 50_000.0
"""Hours between failures of one GPU, its share of node and network included: 419 unexpected interruptions in 54 days of
16,384 GPUs (arXiv 2407.21783, section 3.3.4) are 50,700."""


def young(cost: float, between: float) -> float:
    """Best seconds of work between checkpoints, to first order: sqrt(2 cost between) (Young 1974).

    Args:
        cost: seconds that a checkpoint holds up the work.
        between: mean seconds between failures of the whole job.
    """
    _check(cost, between)
    return math.sqrt(2 * cost * between)


def daly(cost: float, between: float) -> float:
    """Likewise to higher order (Daly 2006, equation 37); `between` itself where saving takes more than twice that."""
    _check(cost, between)
    if cost >= 2 * between:
        return between
    root = math.sqrt(cost / (2 * between))
    return young(cost, between) * (1 + root / 3 + root**2 / 9) - cost


def expected(work: float, interval: float, cost: float, restart: float, between: float) -> float:
    """Seconds that so much work takes on average, with failures at random moments (Daly 2006, equation 20).

    Args:
        work: seconds without failures and checkpoints.
        interval: seconds of work between checkpoints.
        cost: seconds of a checkpoint.
        restart: seconds from a failure to work again.
        between: mean seconds between failures.
    """
    _check(cost, between, interval, restart)
    exponent = (interval + cost) / between
    if exponent > 700:
        return math.inf
    return between * math.exp(restart / between) * math.expm1(exponent) * work / interval


def simulated(
    work: float, interval: float, cost: float, restart: float, between: float, runs: int = 200, seed: int = 0
) -> float:
    """The same by drawing the failures of `runs` jobs: what goes on between them is counted, nothing is averaged.

    A failure may strike work, a checkpoint or a restart; work since the last whole checkpoint is done again.
    """
    _check(cost, between, interval, restart)
    draw = np.random.default_rng(seed)
    total = 0.0
    for _ in range(runs):
        done = elapsed = 0.0
        next_failure = draw.exponential(between)
        while True:
            left = work - done
            end = elapsed + left + math.ceil(left / interval) * cost
            if end <= next_failure:
                elapsed = end
                break
            # Whole intervals that were saved before it failed; what follows the last of them is lost.
            saved = min(int((next_failure - elapsed) // (interval + cost)), int(left // interval))
            done += saved * interval
            elapsed = next_failure
            next_failure = elapsed + draw.exponential(between)
            while elapsed + restart > next_failure:  # it failed while it was coming up
                elapsed = next_failure
                next_failure = elapsed + draw.exponential(between)
            elapsed += restart
        total += elapsed
    return total / runs


def best_simulated(
    work: float, cost: float, restart: float, between: float, runs: int = 200, seed: int = 0
) -> float:
    """The interval of the least simulated time, among 25 from an eighth to eight times Young's."""
    around = young(cost, between)
    candidates = [around * 2 ** (k / 4) for k in range(-12, 13)]
    return min(candidates, key=lambda one: simulated(work, one, cost, restart, between, runs, seed))


def _check(cost: float, between: float, interval: float = 1.0, restart: float = 0.0) -> None:
    for name, value, low in (
        ("seconds of a checkpoint", cost, 0.0),
        ("seconds between failures", between, 0.0),
        ("seconds between checkpoints", interval, 0.0),
        ("seconds of a restart", restart, -1e-300),
    ):
        if not low < value < math.inf:
            raise BellboxError(f"{name}: {value}, must be above 0 and finite")
