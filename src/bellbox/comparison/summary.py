"""From single runs to one line a method: the best learning rate, the mean over seeds and its deviation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from bellbox.comparison.plan import best_lr
from bellbox.comparison.results import Result, is_vision, per_step, settings


@dataclass(frozen=True)
class Summary:
    """A row of a study at one bit width."""

    row: str
    bits: float | None
    activation_bits: float | None
    """As `bits`, unless the configuration gives inputs bits of their own."""
    lr: float | None
    """The best one, by the loss on the first seed; None where all failed."""
    tried: dict[float, float | None]
    """Learning rate -> `Study.metric` on the first seed; None where the run failed or diverged."""
    values: dict[int, float]
    """Seed -> `Study.metric` at the best rate; runs that failed or diverged are not in it."""
    ratio: float | None
    """To full precision, over the seeds that both have."""
    weight_entropy: float | None
    lowest_weight_entropy: float | None
    activation_entropy: float | None
    step_seconds: float | None
    block_bytes: int | None
    not_packed: str | None
    errors: tuple[str, ...]
    """What failed or diverged, and how."""
    results: tuple[Result, ...] = field(repr=False)
    """The runs at the best rate."""
    full_precision: bool = False

    @property
    def mean(self) -> float | None:
        """`Study.metric`, mean over the seeds."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for a single seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest of several tried: a better one may lie beyond."""
        return self.lr is not None and len(self.tried) > 1 and self.lr in (min(self.tried), max(self.tried))


@dataclass(frozen=True)
class Study:
    """The summaries of one grid, and what all its runs have in common."""

    name: str
    summaries: tuple[Summary, ...]
    metric: Literal["perplexity", "accuracy"]
    """What rows are judged by; accuracy is a share."""
    tokens: int
    """Training tokens, or images, of each run."""
    context: int
    machines: tuple[str, ...]
    dates: tuple[str, ...]
    versions: tuple[str, ...]
    left_out: int
    """Older runs of other data, budget or definition of their row, which do not compare."""


def summarise(results: Iterable[Result]) -> list[Study]:
    """One `Study` a study name, rows in the order in which they first appear."""
    studies: dict[str, list[Result]] = {}
    for result in results:
        studies.setdefault(result.study, []).append(result)
    return [_study(name, found) for name, found in studies.items()]


def _study(name: str, everything: list[Result]) -> Study:
    frame = _frame(everything[-1])
    cells: dict[tuple[str, float | None], list[Result]] = {}
    for result in everything:
        if _frame(result) == frame:
            cells.setdefault((result.row, result.bits), []).append(result)
    current = {place: _last_definition(found) for place, found in cells.items()}
    floors = [found for found in current.values() if _is_full_precision(found[0])]
    floor = _best_runs(floors[0]) if floors else {}
    kept = [result for found in current.values() for result in found]
    return Study(
        name=name,
        summaries=tuple(_summary(found, floor) for found in current.values()),
        metric="accuracy" if is_vision(everything[-1].config) else "perplexity",
        tokens=max((result.tokens for result in kept), default=0),
        context=frame[1],
        machines=tuple(dict.fromkeys(_machine(result) for result in kept)),
        dates=tuple(sorted({result.date for result in kept})),
        versions=tuple(dict.fromkeys(result.version for result in kept)),
        left_out=len(everything) - len(kept),
    )


def _frame(result: Result) -> tuple[str, int, int]:
    """What runs must share to be compared: the data, the context, the budget."""
    asked = settings(result.config)
    return result.data, asked["data"]["context"], (asked["steps"] or 0) * per_step(asked)


def _last_definition(found: list[Result]) -> list[Result]:
    """The runs that differ from the last one in learning rate and seed only."""
    definition = _definition(found[-1].config)
    return [result for result in found if _definition(result.config) == definition]


def _definition(config: dict[str, Any]) -> str:
    rest = settings(config)
    rest["seed"] = rest["data"]["seed"] = rest["optimizer"]["lr"] = None
    return json.dumps(rest, sort_keys=True)


def apart_from_mec(config: dict[str, Any]) -> str:
    """Equal for configurations that differ in learning rate, seed and entropy term only."""
    return _definition({**config, "mec": {}})


def _is_full_precision(result: Result) -> bool:
    section = result.config["quantization"]
    return section["method"] == "none" and section.get("recipe") is None


def _first_seed(found: list[Result]) -> dict[float, Result]:
    return {result.lr: result for result in found if result.seed == found[0].seed}


def _best_runs(found: list[Result]) -> dict[int, Result]:
    """Seed -> run at the best learning rate."""
    lr = best_lr({lr: result.score for lr, result in _first_seed(found).items()})
    return {result.seed: result for result in found if result.lr == lr}


def _summary(found: list[Result], floor: dict[int, Result]) -> Summary:
    sweep = _first_seed(found)
    runs = _best_runs(found)
    sound = {seed: result.metric for seed, result in runs.items() if result.metric is not None}
    floors = {seed: r.metric for seed, r in floor.items() if r.metric is not None and seed in sound}
    own = found[0].config["quantization"].get("activation_bits")
    ratio = sum(sound[seed] for seed in floors) / sum(floors.values()) if floors else None
    good = [result for result in runs.values() if result.metric is not None]
    return Summary(
        row=found[0].row,
        bits=found[0].bits,
        activation_bits=found[0].bits if own is None or found[0].bits is None else float(own),
        lr=best_lr({lr: result.score for lr, result in sweep.items()}),
        tried={lr: sweep[lr].metric for lr in sorted(sweep)},
        values=dict(sorted(sound.items())),
        ratio=ratio,
        weight_entropy=_mean(result.weight_entropy for result in good),
        lowest_weight_entropy=min(
            (r.lowest_weight_entropy for r in good if r.lowest_weight_entropy is not None), default=None
        ),
        activation_entropy=_mean(result.activation_entropy for result in good),
        step_seconds=_mean(result.step_seconds for result in good),
        block_bytes=good[0].block_bytes if good else None,
        not_packed=good[0].not_packed if good else None,
        errors=tuple(
            f"lr {result.lr:g}, seed {result.seed}: {result.error or 'the loss is not finite'}"
            for result in found
            if result.metric is None
        ),
        results=tuple(good),
        full_precision=_is_full_precision(found[0]),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def _machine(result: Result) -> str:
    machine = result.machine
    device = machine.get("device", "")
    where = (
        f"{machine.get('cpu', '?')}, {machine.get('threads', '?')} thread(s)" if device == "cpu" else device
    )
    return f"{where}, torch {machine.get('torch', '?')}, kernels: {machine.get('kernels', '?')}"
