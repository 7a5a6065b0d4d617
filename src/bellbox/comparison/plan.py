"""Plan of a grid: the runs that it still wants, as a pure function of the results that are there.

First every cell's learning rates on its first seed, then, cell by cell at its best rate, the second seed, the third,
and so on: whenever one looks, what is there compares fairly. Since nothing is remembered but results, a grid goes on
after a kill as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bellbox.comparison.grid import Cell, Grid
from bellbox.comparison.results import Result, Results, identity
from bellbox.errors import BellboxError
from bellbox.runs.build import pick_device
from bellbox.runs.config import TrainConfig
from bellbox.runs.resolve import resolve
from bellbox.training.arithmetic import ON_INTEGERS, integers_pay
from bellbox.training.check import check_trainable
from bellbox.training.tasks import data_checksum, make_task, open_data
from bellbox.utils.processor import Precision, choose_precision

if TYPE_CHECKING:
    from bellbox.data.images import ImageDataset
    from bellbox.data.shards import TokenDataset


@dataclass(frozen=True)
class Wanted:
    """One run of a cell."""

    cell: Cell
    lr: float
    seed: int
    config: TrainConfig
    """As the grid asks for it, and as it is recorded: a result is found again by what was asked for."""
    data: str
    """Checksum of its tokens or images."""
    key: str
    """Its `identity`."""


def best_lr(scores: dict[float, float]) -> float | None:
    """The learning rate of the lowest loss; None where all are infinite."""
    finite = {lr: score for lr, score in scores.items() if math.isfinite(score)}
    return min(finite, key=lambda lr: finite[lr]) if finite else None


def _place(config: TrainConfig) -> str:
    return f"{config.task} {config.data.name} {config.vision.image_size}"


def _says_integers(cell: Cell) -> bool:
    return (cell.values.get("quantization") or {}).get("integer_forward") is not None


class Plan:
    """A grid against its results.

    Args:
        grid: what is asked for.
        results: what is there.

    Raises:
        BellboxError: data that cannot be opened.
    """

    def __init__(self, grid: Grid, results: Results):
        self.grid, self.results = grid, results
        self._data: dict[str, str] = {}
        self._opened: dict[str, TokenDataset | ImageDataset] = {}
        self._wanted: dict[tuple[str, float | None, float, int], Wanted] = {}

    def wanted(self, cell: Cell, lr: float, seed: int) -> Wanted:
        """The run of a cell."""
        place = (cell.row, cell.bits, lr, seed)
        if place not in self._wanted:
            config = cell.config(lr, seed)
            if config.precision == "auto":
                config = dataclasses.replace(config, precision=self._precision(config.device))
            section = config.quantization
            if section.integer_forward is None and section.recipe is None:
                section = dataclasses.replace(section, integer_forward=self._integers(config))
                config = dataclasses.replace(config, quantization=section)
            tokens = self._tokens(config)
            key = identity(config.to_dict(), tokens)
            self._wanted[place] = Wanted(cell, lr, seed, config, tokens, key)
        return self._wanted[place]

    def _precision(self, device: str) -> Precision:
        """What `auto` means in this study: as its last run was trained, wherever that was; else what is fast here.

        One for all rows, so that they compare, and so that a study goes on with what it has on any machine.
        """
        cells = {cell.row for cell in self.grid.cells if cell.values.get("precision", "auto") == "auto"}
        for result in reversed(self.results.all):
            if result.study == self.grid.study and result.row in cells:
                return result.config.get("precision", "bf16")
        return choose_precision(pick_device(device))[0]

    def _integers(self, config: TrainConfig) -> bool:
        """What `quantization.integer_forward: null` means in this study, for the same reasons as with precision."""
        if not integers_pay(config):
            return False
        said = {cell.row for cell in self.grid.cells if _says_integers(cell)}
        for result in reversed(self.results.all):
            section = result.config.get("quantization") or {}
            other = result.study != self.grid.study or section.get("method", "bbq") not in ON_INTEGERS
            if not other and result.row not in said:
                return bool(section.get("integer_forward"))
        return True

    def _tokens(self, config: TrainConfig) -> str:
        place = _place(config)
        if place not in self._data:
            self._data[place] = data_checksum(self._dataset(config))
        return self._data[place]

    def _dataset(self, config: TrainConfig) -> TokenDataset | ImageDataset:
        place = _place(config)
        if place not in self._opened:
            self._opened[place] = open_data(config)
        return self._opened[place]

    def check(self) -> None:
        """Refuse what could not be trained or compared, before anything runs. Rows that want no run are left alone.

        Raises:
            BellboxError: naming the row.
        """
        cells = self.grid.cells
        first = self.wanted(cells[0], cells[0].lrs[0], cells[0].seeds[0])
        for cell in cells:
            if self.wanted(cell, cell.lrs[0], cell.seeds[0]).data != first.data:
                raise BellboxError(
                    f"row '{cell.row}' has other data than row '{first.cell.row}', so they do not compare; give both "
                    "the same, or make two grids"
                )
        for run in {id(run.cell): run for run in self.missing()}.values():
            try:
                dataset = self._dataset(run.config)
                config = resolve(run.config, dataset)
                make_task(config, dataset)
                check_trainable(config)
                if "__main__" in config.methods_from:
                    raise BellboxError(
                        "its method is defined in the script that runs, where its process cannot find it; move the "
                        "class into a module"
                    )
            except BellboxError as error:
                raise BellboxError(f"row '{run.cell.row}': {error}") from None
        self._opened.clear()

    def runs(self) -> Iterator[Wanted]:
        """All runs that are known to be wanted by now, done or not, in their order."""
        for cell in self.grid.cells:
            for lr in cell.lrs:
                yield self.wanted(cell, lr, cell.seeds[0])
        for number in range(1, max(len(cell.seeds) for cell in self.grid.cells)):
            for cell in self.grid.cells:
                lr = self._best(cell)
                if number < len(cell.seeds) and lr is not None:
                    yield self.wanted(cell, lr, cell.seeds[number])

    def missing(self) -> list[Wanted]:
        """Those of `runs` that have no result in this study yet."""
        return [run for run in self.runs() if self.result(run) is None]

    def result(self, run: Wanted) -> Result | None:
        """The run's line in this study."""
        mine = (self.grid.study, run.cell.row, run.cell.bits)
        found = (one for one in self.results.find(run.key) if (one.study, one.row, one.bits) == mine)
        return next(found, None)

    def elsewhere(self, run: Wanted) -> Result | None:
        """The same run's line under another study or name; it need not be run again."""
        found = (one for one in self.results.find(run.key) if one.error is None)
        return next((one for one in found if not run.cell.is_nested or one.bits == run.cell.bits), None)

    def widths(self, run: Wanted) -> list[Wanted]:
        """The run at each of its widths, where it has several: one process brings the results of all."""
        if not run.cell.is_nested:
            return [run]
        cells = (cell for cell in self.grid.cells if cell.row == run.cell.row)
        return [self.wanted(cell, run.lr, run.seed) for cell in cells]

    def is_hopeless(self, cell: Cell) -> bool:
        """Whether all its learning rates have been tried and failed."""
        found = [self.result(self.wanted(cell, lr, cell.seeds[0])) for lr in cell.lrs]
        return all(result is not None and math.isinf(result.score) for result in found)

    def _best(self, cell: Cell) -> float | None:
        """None until all its learning rates have been tried, and where all of them failed."""
        found = {lr: self.result(self.wanted(cell, lr, cell.seeds[0])) for lr in cell.lrs}
        scores = {lr: result.score for lr, result in found.items() if result is not None}
        return best_lr(scores) if len(scores) == len(cell.lrs) else None
