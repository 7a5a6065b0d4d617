"""Look-ups in the kept studies, for the figures that documents quote."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from bellbox.comparison import Result, Results, Summary, summarise
from bellbox.comparison.differences import Difference, difference
from bellbox.comparison.summary import Study
from bellbox.report.spectrum import effective_dimension

RESULTS = Path(__file__).parents[2] / "benchmarks" / "studies" / "results"


@functools.cache
def _results() -> dict[str, list[Result]]:
    return {path.parent.name: Results(path.parent).all for path in sorted(RESULTS.glob("*/results.jsonl"))}


@functools.cache
def _studies() -> dict[str, Study]:
    return {study.name: study for all_ in _results().values() for study in summarise(all_)}


@functools.cache
def row(study: str, name: str, bits: float | None = None) -> Summary:
    """A row of a study's table; bits where it has several."""
    found = [s for s in _studies()[study].summaries if s.row == name and bits in (None, s.bits)]
    assert len(found) == 1, f"{study}: {len(found)} rows '{name}' of {bits} bits"
    return found[0]


def mean(study: str, name: str, bits: float | None = None) -> float:
    """Perplexity, or accuracy in percent."""
    value = row(study, name, bits).mean
    assert value is not None
    return value * (100 if _studies()[study].metric == "accuracy" else 1)


def deviation(study: str, name: str, bits: float | None = None) -> float:
    value = row(study, name, bits).deviation
    assert value is not None
    return value * (100 if _studies()[study].metric == "accuracy" else 1)


def at(study: str, name: str, lr: float, bits: float | None = None) -> float:
    """Perplexity at a rate, on the first seed."""
    value = row(study, name, bits).tried[lr]
    assert value is not None
    return value


def on(study: str, name: str, seed: int, bits: float | None = None) -> float:
    """Perplexity on a seed, at the best rate."""
    return row(study, name, bits).values[seed]


def perplexity_of(study: str, name: str, bits: float, lr: float, seed: int) -> float:
    """Of a single run."""
    asked = (study, name, bits, lr, seed)
    runs = (run for all_ in _results().values() for run in all_)
    found = {run.perplexity for run in runs if (run.study, run.row, run.bits, run.lr, run.seed) == asked}
    assert len(found) == 1
    (value,) = found
    assert value is not None
    return value


def entropy(study: str, name: str, bits: float | None = None) -> float:
    value = row(study, name, bits).weight_entropy
    assert value is not None
    return value


def inputs(study: str, name: str, bits: float | None = None) -> float:
    value = row(study, name, bits).activation_entropy
    assert value is not None
    return value


def lowest(study: str, name: str, bits: float | None = None) -> float:
    value = row(study, name, bits).lowest_weight_entropy
    assert value is not None
    return value


def apart(study: str, ours: tuple[str, float | None], theirs: tuple[str, float | None]) -> Difference:
    """Ours less theirs, paired."""
    runs = [{one.seed: one for one in row(study, *which).results} for which in (ours, theirs)]
    found = difference(*runs)
    assert found is not None
    return found


def interval(found: Difference, factor: float = 1) -> tuple[float, float, float]:
    assert found.low is not None
    assert found.high is not None
    return factor * found.value, factor * found.low, factor * found.high


def distinct() -> Iterator[Result]:
    """Each run once: what a study takes over from another has the same configuration, data and seconds."""
    seen: set[tuple[str, str, float | None]] = set()
    for result in (one for all_ in _results().values() for one in all_):
        key = (repr(sorted(result.config.items(), key=lambda item: item[0])), result.data, result.seconds)
        if key not in seen:
            seen.add(key)
            yield result


def hours() -> float:
    """Of training and validation of all runs, on one thread each."""
    assert {run.machine["threads"] for run in distinct()} == {1}
    return sum(run.seconds or 0 for run in distinct()) / 3600


def minutes(*studies: str) -> float:
    """Of a run of these studies, mean of the distinct ones."""
    return statistics.fmean((run.seconds or 0) / 60 for run in distinct() if run.study in studies)


MEC = [(method, bits) for bits in ("W2A4", "W2A2", "W4A4") for method in ("LSQ", "PACT", "BBQ")]


def mec(name: str) -> Difference:
    """What the entropy term adds to a row, share of the images."""
    return apart("mec", (f"{name}, MEC", None), (name, None))


def mec_pooled(*methods: str) -> tuple[float, float]:
    """Mean gain in points over the pairs of low-bit runs of these methods, and its standard error."""
    gains = [100 * x for method, bits in MEC if method in methods for x in mec(f"{method}, {bits}").by_seed]
    return statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))


def dimension(name: str) -> float:
    """Effective dimension of the features of a row of `mec`, mean over the seeds."""
    return statistics.fmean(effective_dimension(run.feature_spectrum) for run in row("mec", name).results)
