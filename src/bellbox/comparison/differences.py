"""Difference between two methods, with an interval over seeds and documents.

A seed gives two methods the same initial weights and the same order of text, and all are judged on the same
documents. So each seed, and each document, is compared with itself: what is hard for both does not count.

The interval is for other seeds and other documents of the same kind. Its half width squared is (t SE)^2 over seeds
plus (t SE)^2 over documents, the seeds as they are. SE is the bootstrap's standard error (`scipy.stats.bootstrap`,
paired) over sqrt((n - 1) / n), by which a bootstrap of n is too narrow (Hesterberg 2015, "What Teachers Should Know
About the Bootstrap", section 4), and t is Student's quantile with n - 1 degrees of freedom. What a seed does to a
single document is in both, and the two ends are not reached together: the interval is rather too wide. (In
simulations it holds the truth 95 to 99 times in a hundred, `tests/comparison/test_compare_differences.py`; one t with
Satterthwaite's degrees of freedom does 88 times with two seeds.) Percentiles would not do: those of three seeds end at
the smallest and the largest of them, which hold the truth between them three times in four.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bellbox.comparison.results import Result, is_vision
from bellbox.errors import require

CONFIDENCE = 0.95
RESAMPLES = 4999
"""The standard error is then known to 1 %."""
FEWEST_PARTS = 8
"""Fewer documents say nothing about others."""
_MOST_NATS = 700.0  # their exp is still a number
_AT_ONCE = 250  # resamples: some megabytes


@dataclass(frozen=True)
class Difference:
    """How much one method's metric is above another's, over the seeds that both have."""

    by_seed: tuple[float, ...]
    """In the unit of `Result.metric`."""
    low: float | None
    """The interval's ends; None for a single seed without documents."""
    high: float | None
    parts: int
    """Documents that the interval is over too; 0 where the results do not say."""
    unit: str | None
    """What the parts are, as `Result.parts` says."""

    @property
    def value(self) -> float:
        """The mean."""
        return statistics.fmean(self.by_seed)

    @property
    def seeds(self) -> int:
        """How many there are in common."""
        return len(self.by_seed)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for a single one."""
        return statistics.stdev(self.by_seed) if self.seeds > 1 else None

    @property
    def holds_zero(self) -> bool:
        """Whether there is an interval and zero lies in it: the two are not told apart."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


def difference(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> Difference | None:
    """The difference of `Result.metric`, ours less theirs.

    Args:
        ours: seed -> run.
        theirs: seed -> run of what it is compared with, on the same data.

    Returns:
        None where no seed has a metric in both.

    Raises:
        BellboxError: scipy is needed and not installed.
    """
    seeds = [seed for seed in ours if seed in theirs and None not in (ours[seed].metric, theirs[seed].metric)]
    if not seeds:
        return None
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    values = np.array([[run.metric for run in pair] for pair in pairs], float)
    by_seed = tuple(float(value) for value in values[:, 0] - values[:, 1])
    halves = [_over_seeds(values)] if len(seeds) > 1 else []
    parts = _parts_of(pairs)
    if parts is not None:
        halves.append(_over_parts(pairs, parts["sizes"]))
    half = math.hypot(*halves) if halves else None
    middle = statistics.fmean(by_seed)
    return Difference(
        by_seed,
        low=None if half is None else middle - half,
        high=None if half is None else middle + half,
        parts=0 if parts is None else len(parts["sizes"]),
        unit=None if parts is None else parts["unit"],
    )


def pooled_deviation(found: Sequence[Difference]) -> tuple[float, int] | None:
    """Standard deviation over seeds of a difference, of several differences together, and its degrees of freedom.

    None where none of them has several seeds.
    """
    several = [one for one in found if one.seeds > 1]
    freedom = sum(one.seeds - 1 for one in several)
    if not freedom:
        return None
    squares = sum((one.seeds - 1) * statistics.variance(one.by_seed) for one in several)
    return math.sqrt(squares / freedom), freedom


def reach(deviation: float, freedom: int) -> float:
    """How far from zero a single difference of this standard deviation comes by chance, at `CONFIDENCE`."""
    return deviation * float(_stats().t.ppf((1 + CONFIDENCE) / 2, freedom))


def _over_seeds(values: np.ndarray) -> float:
    """Half width of the interval of the mean difference between the columns of `[seeds, 2]`."""
    return _bootstrap((values[:, 0], values[:, 1]), lambda a, b, axis: (a - b).mean(axis))


def _over_parts(pairs: Sequence[tuple[Result, Result]], sizes: Sequence[int]) -> float:
    """Half width of the interval of the mean difference between the pairs, for other documents."""
    sums = [_sums(run) for pair in pairs for run in pair]
    of_total = (lambda mean: mean) if is_vision(pairs[0][0].config) else np.exp

    def statistic(sizes: np.ndarray, *sums: np.ndarray, axis: int) -> np.ndarray:
        total = sizes.sum(axis)
        metrics = [of_total(one.sum(axis) / total) for one in sums]
        return np.mean(metrics[::2], axis=0) - np.mean(metrics[1::2], axis=0)

    return _bootstrap((np.array(sizes, float), *sums), statistic)


def _sums(run: Result) -> np.ndarray:
    """Nats of each part, or images rightly named, float64 `[parts]`."""
    parts = run.parts or {}
    if is_vision(run.config):
        return np.array(parts["right"], float)
    return np.array(parts["losses"], float) * np.array(parts["sizes"], float)


def _parts_of(pairs: Sequence[tuple[Result, Result]]) -> dict[str, Any] | None:
    """The parts that all runs share; None where they are not recorded, too few, not the same, or beyond floats."""
    found = [run.parts for pair in pairs for run in pair]
    first = found[0]
    if first is None or len(first["sizes"]) < FEWEST_PARTS:
        return None
    shared = all(
        one is not None and one["sizes"] == first["sizes"] and max(one["losses"]) < _MOST_NATS
        for one in found
    )
    judged = not is_vision(pairs[0][0].config) or all(one and one.get("right") for one in found)
    return first if shared and judged else None


def _bootstrap(samples: Sequence[np.ndarray], statistic: Any) -> float:
    """Half width of the interval of a statistic of samples that are resampled together."""
    count = len(samples[0])
    found = _stats().bootstrap(
        samples, statistic, paired=True, vectorized=True, method="percentile", n_resamples=RESAMPLES,
        batch=_AT_ONCE, rng=np.random.default_rng(0),
    )  # fmt: skip
    return reach(float(found.standard_error) * math.sqrt(count / (count - 1)), count - 1)


def _stats() -> Any:
    return require("scipy.stats", "cli")
