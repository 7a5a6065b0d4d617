"""From single runs to one line a method: the best learning rate, the mean over seeds, how far it is from another."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bellbox.comparison.differences import Difference, difference, pooled_deviation, reach
from bellbox.comparison.plan import best_lr
from bellbox.comparison.results import Result, is_full_precision, is_vision
from bellbox.comparison.selection import Asked, AskedGrid, definition_of, last_asked
from bellbox.errors import BellboxError


@dataclass(frozen=True)
class Summary:
    """A row of a study at one bit width."""

    row: str
    bits: float | None
    activation_bits: float | None
    """Of the inputs' codes: as `bits`, unless the configuration says otherwise; None where they have none."""
    weight_only: str | None
    """`float` or `int8`: what inputs are, where only weights are quantized by the method."""
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
    difference: Difference | None = None
    """To `Study.baseline`; None in its own rows, and where the two have no seed in common."""

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

    @property
    def untuned(self) -> bool:
        """Whether there was one rate only to choose from."""
        return self.lr is not None and len(self.tried) == 1


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
    """Results of the study that are of no row as it is asked for now."""
    missing: int | None
    """Runs that the grid asks for and that are not there yet; None where no grid is kept."""
    baseline: str | None = None
    """The row that differences are to."""

    @property
    def differences(self) -> list[Difference]:
        """Of those rows that have one."""
        return [summary.difference for summary in self.summaries if summary.difference is not None]

    @property
    def seed_deviation(self) -> tuple[float, int] | None:
        """What a seed does to a difference: standard deviation, pooled over the rows, and its degrees of freedom."""
        return pooled_deviation(self.differences)

    def is_open(self, found: Difference) -> bool:
        """Whether it may be chance: zero lies in its interval, or it has one seed and is within what those of the
        other rows do."""
        pooled = self.seed_deviation if found.seeds == 1 else None
        return found.holds_zero or (pooled is not None and abs(found.value) <= reach(*pooled))


def summarise(
    results: Iterable[Result],
    grids: Mapping[str, AskedGrid] | None = None,
    *,
    against: str | None = None,
) -> list[Study]:
    """One `Study` a study name.

    Args:
        results: of a folder.
        grids: study -> what its grid asks for (`bellbox.comparison.selection.kept`), which its rows are then made of.
            Of a study that is not in it the last results say (`last_asked`).
        against: the row that differences are to, at the same bits where it has several; where None, the one that the
            grid names, or the first one in full precision, or the first one of all where none is.

    Raises:
        BellboxError: no study has a row called `against`, or scipy is needed and not installed.
    """
    studies: dict[str, list[Result]] = {}
    for result in results:
        studies.setdefault(result.study, []).append(result)
    made = [_study(name, found, (grids or {}).get(name), against) for name, found in studies.items()]
    if against is not None and all(study.baseline is None for study in made):
        names = dict.fromkeys(summary.row for study in made for summary in study.summaries)
        raise BellboxError(f"against '{against}': no row has this name; there are: {', '.join(names)}")
    return made


def _study(name: str, everything: list[Result], grid: AskedGrid | None, against: str | None) -> Study:
    asked = last_asked(everything) if grid is None else grid.rows
    if against is None and grid is not None:
        against = grid.against
    rows = [_Row(one, one.runs(everything)) for one in asked]
    missing = sum(row.missing() for row in rows)
    rows = [row for row in rows if row.runs]
    floor = next((row for row in rows if is_full_precision(row.asked.config)), None)
    first = [floor or row for row in rows[:1]]
    base = first if against is None else [row for row in rows if row.asked.row == against]
    used = [result for row in rows for result in row.runs.values()]
    return Study(
        name=name,
        summaries=tuple(_summary(row, {} if floor is None else floor.best, base) for row in rows),
        metric="accuracy" if is_vision(asked[0].config) else "perplexity",
        tokens=max((result.tokens for result in used), default=0),
        context=asked[0].config["data"]["context"],
        machines=tuple(dict.fromkeys(_machine(result) for result in used)),
        dates=tuple(sorted({result.date for result in used})),
        versions=tuple(dict.fromkeys(result.version for result in used)),
        left_out=len(everything) - len(used),
        missing=None if grid is None else missing,
        baseline=base[0].asked.row if base else None,
    )


class _Row:
    """The runs of a row at one bit width, and what follows from them as it does in a `Plan`."""

    def __init__(self, asked: Asked, runs: dict[tuple[float, int], Result]) -> None:
        self.asked, self.runs = asked, runs
        self.sweep = {lr: runs[lr, asked.seeds[0]] for lr in asked.lrs if (lr, asked.seeds[0]) in runs}
        self.lr = best_lr({lr: result.score for lr, result in self.sweep.items()})
        at_best = {seed: result for (lr, seed), result in runs.items() if lr == self.lr}
        self.best = {seed: at_best[seed] for seed in asked.seeds if seed in at_best}

    def missing(self) -> int:
        """Runs that are still to come: none at other seeds where all rates failed."""
        rates = len(self.asked.lrs) - len(self.sweep)
        hopeless = rates == 0 and self.lr is None
        return rates + (0 if hopeless else len(self.asked.seeds) - max(len(self.best), 1))


def apart_from_mec(config: dict[str, Any]) -> str:
    """Equal for configurations that differ in learning rate, seed and entropy term only."""
    return definition_of({**config, "mec": {}})


def _inputs(asked: Asked) -> tuple[float | None, str | None]:
    """`Summary.activation_bits` and `Summary.weight_only`."""
    section = asked.config["quantization"]
    only, own = section.get("weight_only"), section.get("activation_bits")
    if asked.bits is None:  # full precision, or a recipe
        return None, None
    if only is not None:
        return (8.0 if only == "int8" else None), only
    return asked.bits if own is None else float(own), None


def _difference(row: _Row, base: Sequence[_Row]) -> Difference | None:
    """To the one of the baseline's rows that has its bits, or to its only one."""
    alike = base if len(base) == 1 else [one for one in base if one.asked.bits == row.asked.bits]
    return None if not alike or row in base else difference(row.best, alike[0].best)


def _summary(row: _Row, floor: dict[int, Result], base: Sequence[_Row]) -> Summary:
    asked = row.asked
    sound = {seed: result.metric for seed, result in row.best.items() if result.metric is not None}
    floors = {seed: r.metric for seed, r in floor.items() if r.metric is not None and seed in sound}
    ratio = sum(sound[seed] for seed in floors) / sum(floors.values()) if floors else None
    good = [result for result in row.best.values() if result.metric is not None]
    activation_bits, weight_only = _inputs(asked)
    return Summary(
        row=asked.row,
        bits=asked.bits,
        activation_bits=activation_bits,
        weight_only=weight_only,
        lr=row.lr,
        tried={lr: row.sweep[lr].metric for lr in sorted(row.sweep)},
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
            for result in row.runs.values()
            if result.metric is None
        ),
        results=tuple(good),
        full_precision=is_full_precision(asked.config),
        difference=_difference(row, base),
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
