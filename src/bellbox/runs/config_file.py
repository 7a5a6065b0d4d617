"""Reading, writing and comparing run configurations, with messages that name the key.

Everything is refused in one line that gives the file and the full dotted key: a training run that silently
ignored `optimiser.lr` would be found out a day later.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from bellbox.errors import BellboxError, require
from bellbox.quantizers.spec import with_present_names
from bellbox.runs.config import TrainConfig
from bellbox.runs.phases import phases_of, soft_steps
from bellbox.utils.files import write_text
from bellbox.utils.yaml import read_yaml

_MOST_LAYERS = 8


def config_from_dict(data: object, where: str = "config") -> TrainConfig:
    """Build and check a `TrainConfig` from nested mappings.

    Args:
        data: what a YAML or JSON file held.
        where: the file's name, for messages.

    Raises:
        BellboxError: an unknown key, a wrong type or a value out of range, by its dotted name, in one line.
    """
    from pydantic import ValidationError

    if not isinstance(data, dict):
        raise BellboxError(f"{where}: holds {type(data).__name__}, must be a mapping of keys to values")
    try:
        config = _reader().validate_python(with_field_names(with_present_names(data)))
    except ValidationError as error:
        raise BellboxError(f"{where}: {_explain(error.errors()[0])}") from None
    try:
        return config.check()
    except BellboxError as error:
        raise BellboxError(f"{where}: {error}") from None


@functools.cache
def _reader() -> Any:
    """What reads a configuration; making it takes longer than reading with it."""
    from pydantic import TypeAdapter

    return TypeAdapter(TrainConfig)


def with_field_names(data: dict[str, Any]) -> dict[str, Any]:
    """`model.from` under the name of its field."""
    model = data.get("model")
    if not isinstance(model, dict) or "from" not in model:
        return data
    return {**data, "model": {"pretrained" if key == "from" else key: value for key, value in model.items()}}


def _explain(error: Any) -> str:
    parts = [str(part) for part in error["loc"]]
    # A union's branches (int, str, ...) follow the key in pydantic's location; the key is what the user
    # knows.
    section: Any = TrainConfig
    known: list[str] = []
    for part in parts:
        known.append(part)
        section = get_type_hints(section).get(part)
        if not dataclasses.is_dataclass(section):
            break
    if get_origin(section) is dict:
        known = parts[: len(known) + 1]
    dotted = ".".join(known).replace("model.pretrained", "model.from")
    if error["type"] == "unexpected_keyword_argument":
        owner: Any = TrainConfig
        for part in parts[:-1]:
            owner = get_type_hints(owner)[part]
        names = [entry.name for entry in dataclasses.fields(owner)]
        near = difflib.get_close_matches(parts[-1], names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "there are: " + ", ".join(names)
        return f"unknown key '{dotted}'; {hint}"
    message = (
        error["msg"].replace("Input should be", "must be").split(", unable")[0].split(" or an instance")[0]
    )
    return f"'{dotted}' is {error['input']!r}, {message}"


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a YAML file, and the one that it names as its `base`, over which it is laid.

    Raises:
        BellboxError: no such file, not YAML, a key twice, or anything that `config_from_dict` refuses.
    """
    return config_from_dict(read_layers(path), str(path))


def read_layers(path: str | os.PathLike[str]) -> Any:
    """What a YAML file holds, laid over the file that its `base` names (from the folder that it lies in), if it does.

    Raises:
        BellboxError: a file that cannot be read, or a `base` that is no name, or whose own bases never end.
    """
    return _read_layers(Path(path), _MOST_LAYERS)


def _read_layers(path: Path, layers: int) -> Any:
    data = read_yaml(path)
    if data is None:
        return {}
    if not isinstance(data, dict) or "base" not in data:
        return data
    base = data.pop("base")
    if not isinstance(base, str):
        raise BellboxError(f"{path}: base is {base!r}, must be the name of a YAML file beside this one")
    if not layers:
        raise BellboxError(
            f"{path}: more than {_MOST_LAYERS} files, each the base of the other; is it a circle?"
        )
    below = _read_layers(path.parent / base, layers - 1)
    return merged(below, data) if isinstance(below, dict) else below


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; neither is changed.

    Where it names another quantization method, the `options` beside that of the base are left out: they were its own.
    """
    result = copy.deepcopy(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            if value.get("method", below.get("method")) != below.get("method"):
                below.pop("options", None)
            result[key] = merged(below, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def save_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write a YAML file that `load_config` reads back equal. The keys keep the dataclasses' order."""
    yaml = require("yaml", "cli")
    write_text(Path(path), yaml.safe_dump(config.to_dict(), sort_keys=False, width=100))


WITHOUT_EFFECT = (
    "folder",
    "threads",
    "distributed",
    "checkpoint",
    "nonfinite",
    "eval_every",
    "checkpoint_every",
    "log_every",
    "tensorboard",
    "trackers",
    "debug",
    "methods_from",
)
"""Keys that do not decide a run's numbers: where it lives, by how many processes, how it is watched and saved."""


def differences(saved: TrainConfig, asked: TrainConfig) -> list[str]:
    """Keys that decide a run's numbers and differ: `["optimizer.lr is 0.001 there, 0.002 here"]`.

    Where a run and its data live, how often it is measured and saved, and how it is watched do not decide its numbers
    (that the data are the same is seen from their checksum). More steps are no difference either: a run may go on to
    them, in the phase that it ended in.
    """
    free = {*WITHOUT_EFFECT, "data.source", "data.mixture", "data.valid", "data.tokenizer", "data.vocab_size"}
    longer = asked.total_steps > saved.total_steps and _goes_on(saved, asked)
    found: list[str] = []

    def compare(left: dict[str, Any], right: dict[str, Any], prefix: str) -> None:
        for key, there in left.items():
            here, name = right[key], prefix + key
            if name in free or there == here:
                continue
            if longer and name in ("steps", "phases.quantized", "phases.shares", "phases.soft"):
                continue
            if name == "phases.bits_before" and not there and not here:
                continue  # null is of a run before there was a choice
            if name == "quantization.integer_forward" and not there and not here:
                continue  # null is of a run before there was a choice, which trained on floats
            if name == "quantization.embedding_bits" and {there, here} == {None, 32}:
                continue
            if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
                compare(there, here, name + ".")
            else:
                found.append(f"{name} is {there} there, {here} here")

    compare(saved.to_dict(), asked.to_dict(), "")
    return found


def _goes_on(saved: TrainConfig, asked: TrainConfig) -> bool:
    """Whether the phases of a run begin where they did; what they are is compared by itself."""
    former, now = ([phase.start for phase in phases_of(config)] for config in (saved, asked))
    return former == now and soft_steps(saved) == soft_steps(asked)
