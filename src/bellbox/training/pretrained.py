"""The weights that a run begins with in place of random ones: `model.from`, a Hugging Face folder or another run.

They are loaded before the layers are prepared, so that scales and codebooks are set from them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from bellbox.convert import unprepare
from bellbox.errors import BellboxError
from bellbox.formats.auto import open_data_for, open_model
from bellbox.runs.config import ResolvedConfig

if TYPE_CHECKING:
    from collections.abc import Callable

# How long a sequence may be and how random weights are drawn do not change what given weights compute.
_FREE = ("max_position_embeddings", "initializer_range")


def pretrained_weights(config: ResolvedConfig) -> Callable[[nn.Module], None]:
    """What puts the weights of `model.from` into a model that is not prepared yet.

    Raises:
        BellboxError: no model there, one of codes, or one of another tokenizer than the data.
    """
    source = config.model.pretrained
    assert source is not None
    try:
        opened = open_model(source)
        if opened.kind not in ("run", "huggingface"):
            raise BellboxError(
                f"{source}: is a {opened.kind} model, whose weights are codes; name the run it was made of"
            )
        if config.task == "language":
            open_data_for(opened, config.data.sources[0])
        elif not opened.is_vision:
            raise BellboxError(f"{source}: is a language model, the task is vision")
    except BellboxError as error:
        raise BellboxError(f"model.from: {error}") from None
    given = unprepare(opened.model) if opened.run is not None else opened.model

    def load(model: nn.Module) -> None:
        _refuse_other_shapes(source, given, model)
        _refuse_other_network(source, given, model)
        model.load_state_dict(given.state_dict())

    return load


def _refuse_other_shapes(source: str, given: nn.Module, model: nn.Module) -> None:
    there, here = given.state_dict(), model.state_dict()
    for name, value in here.items():
        if name not in there:
            raise BellboxError(f"model.from: {source} has no tensor '{name}', which model.preset has")
        if there[name].shape != value.shape:
            raise BellboxError(
                f"model.from: tensor '{name}' of {source} is {tuple(there[name].shape)}, that of model.preset with its "
                f"overrides {tuple(value.shape)}; make them agree by model.preset and model.overrides"
            )
    unknown = sorted(set(there) - set(here))
    if unknown:
        raise BellboxError(
            f"model.from: {source} has a tensor '{unknown[0]}', which model.preset does not have"
        )


def _refuse_other_network(source: str, given: nn.Module, model: nn.Module) -> None:
    """Tensors of equal shapes may still be another function: other heads, another epsilon."""
    there, here = _fields(given), _fields(model)
    for name, value in here.items():
        other = there.get(name)
        # None is derived from the others, and shows in the shapes.
        if name not in _FREE and other is not None and value is not None and other != value:
            raise BellboxError(
                f"model.from: {name} of {source} is {other}, that of model.preset with its overrides {value}; "
                f"write model.overrides.{name}: {other}"
            )


def _fields(model: nn.Module) -> dict[str, Any]:
    return dataclasses.asdict(model.config)  # pyright: ignore[reportArgumentType]
