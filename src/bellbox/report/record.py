"""Record of a run as it wrote it: metrics, configuration, environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bellbox.errors import BellboxError
from bellbox.runs.metrics import read_records
from bellbox.utils.files import JSON_LIMIT, read_json, read_text


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True)


class _ByLayer(_Fields):
    mean: float | None
    layers: dict[str, float]


class _Shares(_Fields):
    mean: float | None
    layers: dict[str, float | None]
    """None where no code was counted."""


class _Training(_Fields):
    """What a page reads of a training record."""

    tokens: int
    loss: float | None
    lr: float | None = None
    grad_norm: float | None = None
    seconds: float


class _Validation(_Fields):
    """Of an evaluation record, whatever the task."""

    tokens: int
    loss: float | None
    bits_per_byte: float | None = None
    weight_entropy: _ByLayer | None = None
    activation_entropy: _ByLayer | None = None
    saturated: dict[Literal["weight", "activation"], _Shares] = {}
    feature_spectrum: list[float] | None = None


class _Width(_Fields):
    """Of one width of a nested model."""

    loss: float | None
    weight_entropy: _ByLayer | None = None


class _TextWidth(_Width):
    perplexity: float | None


class _ImagesWidth(_Width):
    accuracy: float


_Bits = Annotated[str, Field(pattern="^[1-7]$")]


class _OfText(_Validation):
    perplexity: float | None
    widths: dict[_Bits, _TextWidth] | None = None


class _OfImages(_Validation):
    accuracy: float
    widths: dict[_Bits, _ImagesWidth] | None = None


@dataclass(frozen=True)
class RunRecord:
    """The record of one run; the records' fields are those of `bellbox.runs.metrics`."""

    name: str
    """Name of the run folder."""
    train: list[dict[str, Any]]
    """Training records, in order."""
    evals: list[dict[str, Any]]
    """Validation records, in order."""
    config: str
    """The resolved configuration, YAML, as it lies in the folder."""
    environment: dict[str, Any]
    """Versions, processor, git revision; empty where none was recorded."""

    @property
    def is_vision(self) -> bool:
        """Whether it is a vision task's: judged by accuracy, counted in images."""
        return any("accuracy" in record for record in self.evals)

    @property
    def unit(self) -> str:
        """What its `tokens` are."""
        return "images" if self.is_vision else "tokens"

    def at(self, step: int | None) -> dict[str, Any] | None:
        """The validation record of a step; the last one where it has none or no step is asked for."""
        exact = [record for record in self.evals if record["step"] == step]
        return (exact or self.evals or [None])[-1]


def read_record(folder: str | os.PathLike[str]) -> RunRecord:
    """Read a run folder's record.

    Raises:
        BellboxError: no run there, damaged files, a record without the fields of its kind, or nothing recorded yet.
    """
    root = Path(folder)
    if not (root / "config.yaml").exists():
        raise BellboxError(f"{root}: no run here, there is no config.yaml")
    config = read_text(root / "config.yaml", JSON_LIMIT)
    records = read_records(root / "metrics.jsonl")
    if not records:
        raise BellboxError(f"{root / 'metrics.jsonl'}: nothing is recorded yet; train the run first")
    environment = root / "environment.json"
    found = RunRecord(
        name=root.resolve().name,
        train=[record for record in records if record["kind"] == "train"],
        evals=[record for record in records if record["kind"] == "eval"],
        config=config,
        environment=read_json(environment) if environment.is_file() else {},
    )
    fields = {"train": _Training, "eval": _OfImages if found.is_vision else _OfText}
    for record in records:
        try:
            fields[record["kind"]].model_validate(record)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BellboxError(
                f"{root / 'metrics.jsonl'}: {record['kind']} record of step {record['step']}: field {where!r}: "
                f"{first['msg']}; remove the line"
            ) from None
    return found
