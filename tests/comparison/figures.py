"""Look-ups in the kept studies, for the figures that documents quote."""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from bellbox.comparison import Result, Results, Summary, summarise
from bellbox.comparison.differences import Difference, difference
from bellbox.comparison.summary import Study
from bellbox.report.spectrum import effective_dimension

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "studies" / "results"

BITS, TWO, HEART, TOGETHER = "methods-bits", "methods-2bit", "heart", "heart-combined"
FULL, DEFAULT, PAPER, MUON = "full precision", "BBQ, default", "BBQ, paper", "full precision, Muon"

T = TypeVar("T")
Held = tuple[str, tuple[Any, ...]]
"""A text of a document with holes, and the figures that belong there."""


def present(value: T | None, *what: object) -> T:
    """What was looked up.

    Raises:
        LookupError: it is None; names what was asked for.
    """
    if value is None:
        raise LookupError(f"the kept results have no {', '.join(map(str, what))}")
    return value


def flat(text: str) -> str:
    """In one line."""
    return re.sub(r"\s+", " ", text)


def said(document: str) -> str:
    """What a document says, in one line."""
    return flat((ROOT / document).read_text(encoding="utf-8"))


def filled(held: list[Held]) -> list[str]:
    """The texts with their figures, each in one line."""
    return [flat(text.format(*values)) for text, values in held]


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
    value = present(row(study, name, bits).mean, "mean", study, name, bits)
    return value * (100 if _studies()[study].metric == "accuracy" else 1)


def deviation(study: str, name: str, bits: float | None = None) -> float:
    value = present(row(study, name, bits).deviation, "deviation", study, name, bits)
    return value * (100 if _studies()[study].metric == "accuracy" else 1)


def at(study: str, name: str, lr: float, bits: float | None = None) -> float:
    """Perplexity at a rate, on the first seed."""
    return present(row(study, name, bits).tried.get(lr), "perplexity", study, name, bits, lr)


def on(study: str, name: str, seed: int, bits: float | None = None) -> float:
    """Perplexity on a seed, at the best rate."""
    return row(study, name, bits).values[seed]


def perplexity_of(study: str, name: str, bits: float, lr: float, seed: int) -> float:
    """Of a single run."""
    asked = (study, name, bits, lr, seed)
    runs = (run for all_ in _results().values() for run in all_)
    found = {run.perplexity for run in runs if (run.study, run.row, run.bits, run.lr, run.seed) == asked}
    assert len(found) == 1, f"{asked}: {len(found)} perplexities"
    return present(found.pop(), "perplexity", *asked)


def entropy(study: str, name: str, bits: float | None = None) -> float:
    return present(row(study, name, bits).weight_entropy, "weight entropy", study, name, bits)


def inputs(study: str, name: str, bits: float | None = None) -> float:
    return present(row(study, name, bits).activation_entropy, "activation entropy", study, name, bits)


def lowest(study: str, name: str, bits: float | None = None) -> float:
    return present(row(study, name, bits).lowest_weight_entropy, "lowest weight entropy", study, name, bits)


def apart(study: str, ours: tuple[str, float | None], theirs: tuple[str, float | None]) -> Difference:
    """Ours less theirs, paired."""
    runs = [{one.seed: one for one in row(study, *which).results} for which in (ours, theirs)]
    return present(difference(*runs), "difference", study, ours, theirs)


def interval(found: Difference, factor: float = 1) -> tuple[float, float, float]:
    low, high = (present(end, "interval", found) for end in (found.low, found.high))
    return factor * found.value, factor * low, factor * high


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
