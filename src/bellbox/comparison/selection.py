"""Selection for a table: for each of its rows, the runs that the grid asks for.

`results.jsonl` remembers all that ever ran, also rows that were edited since, and rates and seeds that nobody asks
for any more. So the grid as it was last run is kept beside it, resolved, in `grids/STUDY.json`: the configuration of
each row, the checksum of its data, its rates and its seeds. Where no grid is kept, the last results say.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bellbox.comparison.plan import Plan
from bellbox.comparison.results import Result, check_config, complete, frame, settings
from bellbox.errors import BellboxError
from bellbox.quantizers.spec import with_present_names
from bellbox.utils.files import read_json, write_text

FOLDER = "grids"


@dataclass(frozen=True)
class Asked:
    """A row at one bit width, as a grid asks for it."""

    row: str
    bits: float | None
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    """The first one chooses the rate."""
    config: dict[str, Any]
    """The whole training configuration, of any of the rates and seeds."""
    data: str
    """Checksum of the tokens or images."""

    def runs(self, results: Sequence[Result]) -> dict[tuple[float, int], Result]:
        """Rate and seed -> the result of it, in the order of `results`; of equal runs the first, as in a plan."""
        definition = definition_of(self.config)
        found: dict[tuple[float, int], Result] = {}
        for result in results:
            mine = (result.row, result.bits, result.data) == (self.row, self.bits, self.data)
            asked = mine and result.lr in self.lrs and result.seed in self.seeds
            if asked and definition_of(result.config) == definition:
                found.setdefault((result.lr, result.seed), result)
        return found


@dataclass(frozen=True)
class AskedGrid:
    """A grid as it was last run."""

    rows: tuple[Asked, ...]
    against: str | None = None
    """Row that differences are to; None where the grid does not say."""


def definition_of(config: dict[str, Any]) -> str:
    """Equal for configurations that differ in learning rate and seed only."""
    rest = settings(config)
    rest["seed"] = rest["data"]["seed"] = rest["optimizer"]["lr"] = None
    return json.dumps(rest, sort_keys=True)


def keep(folder: Path, plan: Plan) -> None:
    """Write down what a plan's grid asks for."""
    cells: list[dict[str, Any]] = []
    for cell in plan.grid.cells:
        run = plan.wanted(cell, cell.lrs[0], cell.seeds[0])
        config = run.config.to_dict()
        config.pop("folder")
        one = Asked(cell.row, cell.bits, cell.lrs, cell.seeds, config, run.data)
        cells.append(dataclasses.asdict(one))
    (folder / FOLDER).mkdir(exist_ok=True)
    lines = ",\n".join(map(json.dumps, cells))
    against = "" if plan.grid.against is None else f'"against": {json.dumps(plan.grid.against)}, '
    write_text(folder / FOLDER / f"{plan.grid.study}.json", f'{{{against}"cells": [\n{lines}\n]}}\n')


def kept(folder: Path) -> dict[str, AskedGrid]:
    """Study -> its grid as it was last run; studies without a kept grid are not in it.

    Raises:
        BellboxError: a file that is not what `keep` writes.
    """
    found: dict[str, AskedGrid] = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            found[path.stem] = _asked_grid(read_json(path))
        except (
            KeyError,
            TypeError,
            AttributeError,
            ValueError,
            RecursionError,
        ):  # pydantic's is a ValueError
            raise BellboxError(f"{path}: damaged; remove it, or run its grid again") from None
    return found


def _asked_grid(said: dict[str, Any]) -> AskedGrid:
    """What a kept grid says.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is not what `keep` writes.
    """
    rows, against = tuple(_asked(cell) for cell in said["cells"]), said.get("against")
    if not rows or against not in (None, *(one.row for one in rows)):
        raise ValueError("no rows, or none that others are compared with")
    return AskedGrid(rows, against)


def _asked(cell: dict[str, Any]) -> Asked:
    """What a kept grid says of one row.

    Raises:
        ValueError: it is not what `keep` writes.
    """
    asked: Asked = TypeAdapter(Asked).validate_json(json.dumps(with_present_names(cell)), strict=True)
    if not asked.lrs or not asked.seeds:
        raise ValueError("a row without rates or seeds")
    check_config(asked.config)
    return dataclasses.replace(asked, config=complete(asked.config))


def last_asked(results: Sequence[Result]) -> list[Asked]:
    """What the results of one study say where no grid is kept: rows of the last one's data, budget and context, each
    as it was defined last, with all rates and seeds that it then had."""
    last = results[-1]
    places: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        if (result.data, frame(result.config)) == (last.data, frame(last.config)):
            places.setdefault((result.row, result.bits), []).append(result)
    found: list[Asked] = []
    for (row, bits), members in places.items():
        definition = definition_of(members[-1].config)
        same = [result for result in members if definition_of(result.config) == definition]
        lrs, seeds = dict.fromkeys(r.lr for r in same), dict.fromkeys(r.seed for r in same)
        found.append(Asked(row, bits, tuple(lrs), tuple(seeds), complete(same[-1].config), last.data))
    return found
