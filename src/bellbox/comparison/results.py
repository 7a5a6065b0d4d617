"""`results.jsonl`: one line a finished run, complete in itself, only ever added to.

A line says which study, row, bits, seed and learning rate it belongs to, the whole configuration, the checksum of
the tokens, what came out, and on which machine, when, with which version. So the file can be committed, and whoever
goes on with the study adds to it. A run is looked up by its configuration and its tokens: keys that the
configuration did not have when a line was written count as their present defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from bellbox.comparison.jsonl import append_line, read_lines
from bellbox.errors import BellboxError
from bellbox.quantizers.spec import with_present_names
from bellbox.runs.config import CEWT_RATES, DEFAULT_STEPS, TrainConfig, rule_of
from bellbox.runs.config_file import WITHOUT_EFFECT, with_field_names
from bellbox.utils.files import one_line

FILE = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """One run. Perplexity or accuracy is that of the last validation; null numbers were not finite."""

    study: str
    row: str
    bits: float | None
    lr: float
    seed: int
    overrides: dict[str, Any]
    """What the row laid over the grid's base."""
    config: dict[str, Any]
    """The whole training configuration, without its folder."""
    data: str
    """Checksum of tokens and tokenizer."""
    error: str | None = None
    """Why it did not finish; then there is nothing below but where it ran."""
    steps: int = 0
    tokens: int = 0
    """Images of a vision task."""
    loss: float | None = None
    """Nats per token or image."""
    perplexity: float | None = None
    """Of a language model."""
    accuracy: float | None = None
    """Share of the images, of a vision task."""
    weight_entropy: float | None = None
    """Bits per code, mean of the layers."""
    lowest_weight_entropy: float | None = None
    activation_entropy: float | None = None
    step_seconds: float | None = None
    """Of the quickest logged stretch of steps, so that a busy moment of the machine does not count."""
    block_bytes: int | None = None
    """Linear layers of the blocks: packed where they are quantized, bf16 where not."""
    not_packed: str | None = None
    """Why the model cannot be packed into integers; its bytes are then those of its codes and scales."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """step, tokens, loss, weight_entropy, activation_entropy of each validation."""
    gamma: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind of layer -> low, high, counts: histogram of the learned row scales over the blocks."""
    feature_spectrum: list[float] = field(default_factory=list)
    """Of the last validation: see `bellbox.runs.metrics`."""
    parts: dict[str, Any] | None = None
    """Of the last validation, document by document: see `bellbox.evaluation.parts`. None in results from before."""
    seconds: float | None = None
    """Training and validation, wall clock."""
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    version: str = ""

    @property
    def score(self) -> float:
        """Loss to choose by: infinite where the run failed or diverged."""
        return math.inf if self.error is not None or self.loss is None else self.loss

    @property
    def metric(self) -> float | None:
        """What the task is judged by: perplexity, or accuracy; None where the run failed or diverged."""
        if self.score == math.inf:
            return None
        return self.accuracy if is_vision(self.config) else self.perplexity


def is_vision(config: dict[str, Any]) -> bool:
    """Whether a configuration is one of a vision task; older ones do not say."""
    return config.get("task", "language") == "vision"


def is_full_precision(config: dict[str, Any]) -> bool:
    """Whether nothing is quantized, embeddings neither."""
    section = config["quantization"]
    return (
        section["method"] == "none"
        and section.get("recipe") is None
        and section.get("embedding_bits") in (None, 32)
    )


def per_step(config: dict[str, Any]) -> int:
    """Tokens or images in a step, of `settings` or of a whole configuration."""
    return config["vision"]["batch"] if is_vision(config) else config["batch"]["tokens"]


FRAME = ("task", "context", "budget", "vision.valid_images")


def frame(config: dict[str, Any]) -> tuple[str, int | None, int, int | None]:
    """What runs over the same data must share to be compared: task, tokens of context, the tokens or images that are
    asked for (before they are rounded up to whole steps), and what they are validated on. None where it is not the
    task's. Missing keys count as in `complete`."""
    config = complete(config)
    steps = DEFAULT_STEPS if config["steps"] is None else config["steps"]
    budget = steps * per_step(config) if config["tokens"] is None else config["tokens"]
    if is_vision(config):
        return "vision", None, budget, config["vision"]["valid_images"]
    return "language", config["data"]["context"], budget, None


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a line holds it, with the present defaults of the keys that it does not have (`precision` as
    bf16, the default before `auto`)."""
    return _filled(config, TrainConfig(precision="bf16").to_dict())


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What decides a run's numbers besides its text: a configuration with defaults filled in, the rest left out.

    Args:
        config: a configuration as `TrainConfig.to_dict` gives it; missing keys count as in `complete`.
    """
    full = complete(config)
    if full["tokens"] is not None:
        full["steps"], full["tokens"] = -(-full["tokens"] // per_step(full)), None
    for key in WITHOUT_EFFECT:
        full.pop(key, None)
    cewt, section = full["optimizer"]["cewt"], full["quantization"]
    if cewt["lr"] is None:  # a number, before it could be left open
        cewt["lr"] = CEWT_RATES[rule_of(cewt["rule"], section["method"], section["recipe"])]
    if full["phases"]["bits_before"] is None:  # likewise
        full["phases"]["bits_before"] = []
    full["data"] = {key: value for key, value in full["data"].items() if key != "source"}
    if full["quantization"]["integer_forward"] is None:  # lines of before there was a choice
        full["quantization"]["integer_forward"] = False
    if is_full_precision(full):
        full["quantization"] = None  # nothing is quantized, whatever the other keys say
    for section in ("batch", "distill") if is_vision(full) else ("task", "vision"):
        full.pop(section)
    return full


def identity(config: dict[str, Any], data: str) -> str:
    """Hex digest that two runs share exactly if they compute the same.

    Args:
        config: see `settings`.
        data: checksum of the tokens.
    """
    text = json.dumps([settings(config), data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# They become names of files, and stand in tables: no separators of paths, no line breaks.
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff/\\]{1,200}")


class _Point(BaseModel):
    """What is read of an entry of `Result.history`."""

    model_config = ConfigDict(strict=True)
    step: int
    tokens: int
    loss: float | None
    weight_entropy: float | None = None
    activation_entropy: float | None = None


class _Histogram(BaseModel):
    """What is read of an entry of `Result.gamma`."""

    model_config = ConfigDict(strict=True)
    low: float
    high: float
    counts: Annotated[list[int], Field(max_length=10_000)]


_MOST_PARTS = 1024


class _Parts(BaseModel):
    """What is read of `Result.parts`."""

    model_config = ConfigDict(strict=True)
    unit: Literal["documents", "blocks of tokens", "images"]
    sizes: Annotated[list[Annotated[int, Field(ge=1, le=1 << 53)]], Field(max_length=_MOST_PARTS)]
    losses: Annotated[list[FiniteFloat], Field(max_length=_MOST_PARTS)]
    right: Annotated[list[Annotated[int, Field(ge=0, le=1 << 53)]], Field(max_length=_MOST_PARTS)] | None = (
        None
    )

    @model_validator(mode="after")
    def _of_equal_length(self) -> _Parts:
        lengths = {len(self.sizes), len(self.losses), len(self.sizes if self.right is None else self.right)}
        if len(lengths) > 1:
            raise ValueError("sizes, losses and right have different lengths")
        return self


@functools.cache
def _adapters() -> tuple[TypeAdapter[Any], ...]:
    kinds: tuple[Any, ...] = (Result, list[_Point], dict[str, _Histogram], _Parts | None)
    return tuple(TypeAdapter(kind) for kind in kinds)


@functools.cache
def _config_adapter() -> TypeAdapter[TrainConfig]:
    return TypeAdapter(TrainConfig)


def check_config(config: dict[str, Any]) -> None:
    """Hold a stored configuration against the keys and types of one; ranges are not looked at.

    Raises:
        ValidationError: naming what is of another kind.
    """
    _config_adapter().validate_python(with_field_names(complete(config)))


def _parsed(line: bytes) -> Result:
    """A line's result, every value of the kind that it must be.

    Raises:
        BellboxError, ValidationError: why it is none.
    """
    result_of, history_of, gamma_of, parts_of = _adapters()
    try:
        values = with_present_names(json.loads(line, parse_constant=_refuse_constant))
        if unknown := set(values) - {each.name for each in dataclasses.fields(Result)}:
            raise BellboxError(f"unknown key {min(unknown)!r}")
        result: Result = result_of.validate_json(json.dumps(values), strict=True)
        check_config(result.config)
        history_of.validate_python(result.history)
        gamma_of.validate_python(result.gamma)
        parts_of.validate_python(result.parts)
    except (BellboxError, ValidationError):
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BellboxError(one_line(error, 80)) from None
    for name, value in (("study", result.study), ("row", result.row)):
        if not _NAME.fullmatch(value) or value.startswith("."):
            raise BellboxError(f"{name} {value[:50]!r} is no name")
    return result


def _refuse_constant(text: str) -> float:
    raise BellboxError(f"{text} is no number of JSON")


def _filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    result = defaults | given
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(given.get(key), dict):
            result[key] = _filled(given[key], default)
    return result


class Results:
    """The lines of a folder's `results.jsonl`.

    Args:
        folder: holds the file, or will.

    Raises:
        BellboxError: a line that is not a result.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder) / FILE
        self.all: list[Result] = []
        self._keys: list[str] = []
        for result in read_lines(self.path, _parsed, "a result"):
            self._remember(result)

    def find(self, key: str) -> list[Result]:
        """The results of the run with this `identity`, in the order of the file."""
        return [result for result, known in zip(self.all, self._keys, strict=True) if known == key]

    def add(self, result: Result) -> None:
        """Append a line and have it on the disk.

        Raises:
            OSError: it cannot be written, such as on a full disk; half a line is cut away by the next one.
        """
        append_line(self.path, json.dumps(dataclasses.asdict(result), allow_nan=False))
        self._remember(result)

    def drop_failed(self, keys: set[str]) -> int:
        """Forget failed runs with these identities, so that they are tried again; returns how many."""
        from bellbox.utils.files import write_text

        pairs = zip(self.all, self._keys, strict=True)
        kept = [(result, key) for result, key in pairs if result.error is None or key not in keys]
        dropped = len(self.all) - len(kept)
        if dropped:
            write_text(self.path, "".join(json.dumps(dataclasses.asdict(one)) + "\n" for one, _ in kept))
            self.all, self._keys = [one for one, _ in kept], [key for _, key in kept]
        return dropped

    def _remember(self, result: Result) -> None:
        self.all.append(result)
        self._keys.append(identity(result.config, result.data))
