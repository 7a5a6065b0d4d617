"""Grid of a comparison: a YAML file of rows, bit widths, seeds and learning rates.

```yaml
about: 2-bit methods at 1M tokens
base: {model: {preset: tiny}, data: {source: data/wiki, context: 256}, tokens: 1000000}   # or: base: base.yaml
lr: [1.0e-3, 2.0e-3, 4.0e-3]
seeds: [0, 1, 2]
bits: [1, 2, 3, 4]
rows:
  full precision: {quantization: {method: none}}
  BBQ: {quantization: {method: bbq}}
  BBQ, kept ends: {quantization: {method: bbq, block: 64}, bits: [2], lr: [2.0e-3]}
```

A row holds any keys of a training configuration, laid over `base`; its own `lr`, `bits` and `seeds` go before the
grid's. Where nobody says `lr`, the `optimizer.lr` of `base` counts. Rows that fix their levels themselves (full
precision, `bits` or `levels` of the quantization, a whole `recipe`) ignore the grid's `bits`; where nobody says any,
those of `base` count. A seed decides the initial weights and the order of the text, alike for every row. All rows must
ask for the same budget and context: where batches differ, say `tokens`, not `steps`. The first row in full precision is
the one that the others are compared with; without any it is the first row. `against: ROW` names another, and
`bellbox compare --against ROW` goes before that.

A row of `quantization.nested` widths is one run, and a line of the table for each width. It has one learning rate: its
widths could not be given different ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bellbox.comparison.results import FRAME, frame
from bellbox.errors import BellboxError
from bellbox.runs.build import check_quantization
from bellbox.runs.config import QuantizationSection, TrainConfig, hyperball_rate, methods_named, rule_of
from bellbox.runs.config_file import config_from_dict, merged, read_layers
from bellbox.runs.open_phases import with_phases
from bellbox.utils.yaml import read_yaml

KEYS = ("about", "base", "lr", "seeds", "bits", "rows", "against")
ROW_KEYS = ("lr", "seeds", "bits")


@dataclass(frozen=True)
class Cell:
    """One row at one bit width: what gets its learning rate tuned, and its seeds."""

    row: str
    bits: float | None
    """Bits of a code: log2 of the levels; None in full precision, or where a recipe decides layer by layer."""
    values: dict[str, Any]
    """The whole training configuration, but for the learning rate and the seeds."""
    overrides: dict[str, Any]
    """What the row lays over the grid's base."""
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def is_nested(self) -> bool:
        """Whether it is one width of a run that has several: the row's other cells are of the same run."""
        return bool((self.values.get("quantization") or {}).get("nested"))

    def config(self, lr: float, seed: int) -> TrainConfig:
        """The training configuration of one run; `folder` is still to be set."""
        changes = {"optimizer": {"lr": lr}, "data": {"seed": seed}, "seed": seed}
        found = with_phases(config_from_dict(merged(self.values, changes), f"row '{self.row}'"))
        cewt = found.optimizer.cewt
        if cewt.lr is not None:
            return found
        # Written out as the phases are, so that a line keeps what it was run with whatever the rule will be.
        section = found.quantization
        rate = hyperball_rate(rule_of(cewt.rule, section.method, section.recipe), found.total_steps)
        written = dataclasses.replace(cewt, lr=rate)
        return dataclasses.replace(found, optimizer=dataclasses.replace(found.optimizer, cewt=written))

    @property
    def label(self) -> str:
        """`BBQ, 2 bits`."""
        return self.row if self.bits is None else f"{self.row}, {bits_text(self.bits)} bits"


@dataclass(frozen=True)
class Grid:
    """Everything that one file asks for."""

    study: str
    """Name of the file without its ending."""
    about: str
    cells: tuple[Cell, ...]
    against: str | None = None
    """Row that the tables' differences are to; None for the first in full precision, or the first of all."""

    @property
    def runs(self) -> int:
        """How many runs there are if none fails: learning rates on the first seed, then the other seeds."""
        return sum(len(cell.lrs) + len(cell.seeds) - 1 for cell in self.cells)

    def cell(self, label: str) -> Cell:
        """The row of this name and width, as `Cell.label` has it.

        Raises:
            BellboxError: none is called so.
        """
        labels = [cell.label for cell in self.cells]
        if label in labels:
            return self.cells[labels.index(label)]
        near = difflib.get_close_matches(label, labels, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {'; '.join(labels)}"
        raise BellboxError(f"{self.study}: no row '{label}'; {hint}")

    @property
    def methods(self) -> set[str]:
        """The quantizers' methods in it."""
        configs = (cell.config(cell.lrs[0], cell.seeds[0]) for cell in self.cells)
        return {method for config in configs for method in methods_named(config.quantization)}


def bits_text(bits: float) -> str:
    """2, 1.58."""
    return f"{bits:.3g}"


def is_grid(path: str | os.PathLike[str]) -> bool:
    """Whether a YAML file is a grid, not the configuration of one run.

    Raises:
        BellboxError: it cannot be read.
    """
    data = read_yaml(path)
    return isinstance(data, dict) and "rows" in data


def load_grid(path: str | os.PathLike[str]) -> Grid:
    """Read a grid and check every configuration in it, as far as that needs no data.

    Raises:
        BellboxError: an unreadable file, an unknown or repeated key, a row that cannot be trained, or rows that
            cannot stand in one table, by name.
    """
    file = Path(path)
    data = _read_mapping(file)
    unknown = sorted(set(map(str, data)) - set(KEYS))
    if unknown:
        raise BellboxError(f"{file}: unknown key '{unknown[0]}'; there are: {', '.join(KEYS)}")
    base = data.get("base", {})
    if isinstance(base, str):
        base = read_layers(file.parent / base)
    rows = data.get("rows")
    if not isinstance(base, dict):
        raise BellboxError(f"{file}: base must be a mapping of training keys, or the name of a YAML file")
    if not isinstance(rows, dict) or not rows:
        raise BellboxError(
            f"{file}: rows must map names to training keys, such as BBQ: {{quantization: ...}}"
        )
    common = {key: data[key] for key in ROW_KEYS if key in data}
    if "lr" in common or any(isinstance(row, dict) and "lr" in row for row in rows.values()):
        _refuse_overruled(f"{file}: base", base)
    else:
        common["lr"], base = _taken_rate(base)
        _refuse_overruled(f"{file}: base", base)
    cells: list[Cell] = []
    for name, row in rows.items():
        if not isinstance(row, dict):
            raise BellboxError(f"{file}: row '{name}' must be a mapping of training keys")
        cells += _cells(file, str(name), base, common, row)
    _refuse_unequal(file, cells)
    return Grid(file.stem, str(data.get("about", "")), tuple(cells), _against(file, data, cells))


def _against(file: Path, data: dict[str, Any], cells: list[Cell]) -> str | None:
    """The row that the others are compared with, where the grid names one."""
    if (said := data.get("against")) is None:
        return None
    names = dict.fromkeys(cell.row for cell in cells)
    if str(said) not in names:  # YAML reads a name such as 4 as a number
        raise BellboxError(f"{file}: against names no row '{said}'; there are: {', '.join(names)}")
    return str(said)


def _cells(
    file: Path, name: str, base: dict[str, Any], common: dict[str, Any], row: dict[str, Any]
) -> list[Cell]:
    where, said = f"{file}: row '{name}'", common | row
    lrs = _numbers(file, name, "lr", said.get("lr"), float)
    seeds = _numbers(file, name, "seeds", said.get("seeds", [0]), int)
    overrides = {key: value for key, value in row.items() if key not in ROW_KEYS}
    values = merged(base, overrides)
    quantization = config_from_dict(values, where).quantization
    _refuse_overruled(where, overrides)
    given = _section(overrides, "quantization")
    _refuse_unheard_bits(where, quantization, given, common, row)
    widths = _numbers(file, name, "bits", said.get("bits", quantization.bits or 2), int)
    if quantization.recipe is not None or quantization.method == "none":
        choices: list[tuple[float | None, dict[str, Any]]] = [(None, {})]
    elif quantization.nested:
        choices = [(float(bits), {}) for bits in quantization.nested]
        if len(lrs) > 1:
            raise BellboxError(
                f"{where} has nested widths, which one run trains at one learning rate; give one lr, or a row for each"
            )
    elif quantization.levels is not None:
        choices = [(math.log2(quantization.levels), {})]
    elif given.get("bits") is not None:
        choices = [(float(given["bits"]), {})]
    else:
        choices = [(float(bits), {"quantization": {"bits": bits}}) for bits in widths]
    cells = [
        Cell(name, bits, merged(values, change), merged(overrides, change), lrs, seeds)
        for bits, change in choices
    ]
    for cell in cells:
        try:
            configs = [cell.config(lr, seeds[0]) for lr in lrs]
        except BellboxError as error:
            raise BellboxError(f"{file}: {error}") from None
        try:
            check_quantization(configs[0], configs[0].quantization)
        except BellboxError as error:
            raise BellboxError(f"{where}: {error}") from None
    return cells


def _taken_rate(base: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The learning rate of a base, and the rest of it."""
    optimizer = dict(_section(base, "optimizer"))
    lr = optimizer.pop("lr", None)
    return lr, {**base, "optimizer": optimizer} if lr is not None else base


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _refuse_overruled(where: str, values: dict[str, Any]) -> None:
    """Rates and seeds are the grid's, so those of a configuration would be passed over."""
    for dotted, there, own in (
        ("optimizer.lr", "lr" in _section(values, "optimizer"), "lr"),
        ("data.seed", "seed" in _section(values, "data"), "seeds"),
        ("seed", "seed" in values, "seeds"),
    ):
        if there:
            raise BellboxError(
                f"{where}: {dotted} says nothing here, '{own}' of the row or of the grid decides; write {own}: [...] "
                "there in place of it"
            )


def _refuse_unheard_bits(
    where: str,
    quantization: QuantizationSection,
    given: dict[str, Any],
    common: dict[str, Any],
    row: dict[str, Any],
) -> None:
    """Bits that something else overrules. Those of the grid are not meant for rows that fix their levels."""
    own = [key for key in ("bits", "levels", "recipe", "nested") if given.get(key)]
    if "bits" in row and own:
        raise BellboxError(f"{where} says twice how many bits; leave one of them out")
    fixed = next(
        (key for key in ("recipe", "levels", "nested") if getattr(quantization, key) not in (None, [])), None
    )
    if fixed is None and quantization.method == "none":
        if "bits" in row:
            raise BellboxError(f"{where} is in full precision, so its bits say nothing; leave them out")
    elif fixed is not None and fixed not in own and ("bits" in common or "bits" in row or own):
        raise BellboxError(
            f"{where}: quantization.{fixed} of the base goes before all bits that grid and row say; leave it or "
            f"those out, or write quantization: {{{fixed}: {'[]' if fixed == 'nested' else 'null'}}} in the row"
        )


def _refuse_unequal(file: Path, cells: list[Cell]) -> None:
    """Rows of another task, budget, context or validation do not compare."""
    configs = [cell.config(cell.lrs[0], cell.seeds[0]).to_dict() for cell in cells]
    first = frame(configs[0])
    for cell, config in zip(cells, configs, strict=True):
        for what, here, there in zip(FRAME, frame(config), first, strict=True):
            if here != there:
                raise BellboxError(
                    f"{file}: row '{cell.row}' has a {what} of {here}, row '{cells[0].row}' of {there}: such rows do "
                    "not compare; give all the same (tokens in place of steps, where their batches differ), or make "
                    "two grids"
                )


def _numbers(file: Path, row: str, key: str, value: Any, kind: type) -> tuple[Any, ...]:
    """A list of different numbers; a single one may stand without brackets."""
    entries: list[Any] = value if isinstance(value, list) else [value]
    if kind is float:  # YAML reads 1e-3, without a point, as text
        entries = [_float(entry) if isinstance(entry, str) else entry for entry in entries]
    allowed = (int,) if kind is int else (int, float)
    if not entries or any(isinstance(x, bool) or not isinstance(x, allowed) for x in entries):
        raise BellboxError(f"{file}: row '{row}': {key} must be a list of numbers, such as {key}: [1, 2]")
    if len(set(entries)) < len(entries):
        raise BellboxError(f"{file}: row '{row}': {key} names a number twice")
    return tuple(kind(x) for x in entries)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read_mapping(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise BellboxError(f"{path}: must be a mapping of keys to values")
    return data
