"""A model in training form, saved by `save_pretrained` with all of its quantizers' state, and loaded again.

Its section of `config.json` holds the recipe. transformers loads every tensor of the file; what belongs to a prepared
layer, embedding or module of experts lies in `Stored` meanwhile. Then the model is prepared by the recipe, and takes
its state as any state dict is taken: records compared, nothing missing, nothing left over.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.convert import prepare
from bellbox.errors import BellboxError
from bellbox.formats.description import CONFIG, SECTION, TENSORS, seal
from bellbox.formats.guard import guards_in
from bellbox.interop.transformers.stored import Stored, below, pass_over, plain_dtype, tie_on_meta, untie
from bellbox.nn import quantized_layers, replace_layer
from bellbox.nn.quantized import ROTATED
from bellbox.nn.tools import unique_tensors
from bellbox.recipe import Recipe
from bellbox.utils.files import listed_file, read_json, read_tensors


@dataclass
class Prepared:
    """What is to be put into a model once it is loaded."""

    root: Path
    recipe: Recipe
    owners: dict[str, nn.Module]
    """The owner's modules that will be prepared, by name."""
    memory: dict[int, str]
    """Name of each parameter of the model by its identity before it had memory, for ties."""
    names: frozenset[str]
    """All tensors of the file."""

    def put_into(self, model: Any) -> None:
        """Prepare the model and give it its state.

        Raises:
            BellboxError: a state of another recipe.
        """
        state: dict[str, Tensor] = {}
        for name in self.owners:
            place = model.get_submodule(name)
            assert isinstance(place, Stored)
            state |= {f"{name}.{key}": value for key, value in place.tensors().items()}
        dtype = model.dtype
        made: dict[int, nn.Parameter] = {}
        for name, owner in self.owners.items():
            for module in owner.modules():
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[leaf] = self._with_memory(model, parameter, made, dtype)
            replace_layer(model, model.get_submodule(name), owner)
        model.tie_weights()
        model.eval()  # as transformers has the rest by now
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what stays whole: said when the model was first prepared
            prepare(model, self.recipe)
        self._take(model, state)

    def _with_memory(
        self, model: nn.Module, empty: nn.Parameter, made: dict[int, nn.Parameter], dtype: torch.dtype
    ) -> nn.Parameter:
        """A parameter of ones in place of one without memory; of a tied one, the other that is loaded already."""
        if not empty.is_meta:
            return empty
        if id(empty) not in made:
            twin = _parameter(model, self.memory.get(id(empty), ""))
            fresh = nn.Parameter(torch.ones(empty.shape, dtype=dtype), requires_grad=empty.requires_grad)
            made[id(empty)] = fresh if twin is None else twin
        return made[id(empty)]

    def _take(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        found = {name for name, _ in quantized_layers(model)}
        try:
            result = model.load_state_dict(state, strict=False)
        except BellboxError as error:
            raise BellboxError(f"{self.root}: {error}") from None
        except RuntimeError as error:
            raise BellboxError(f"{self.root / TENSORS}: {' '.join(str(error).split())}") from None
        first = set(unique_tensors(model))
        missing = sorted((set(result.missing_keys) & first) - self.names)
        if missing:
            raise BellboxError(
                f"{self.root / TENSORS}: tensor {missing[0]!r} is missing: the model was saved with another recipe"
            )
        if result.unexpected_keys or not found:
            odd = sorted(result.unexpected_keys)[:1] or ["nothing"]
            raise BellboxError(f"{self.root / TENSORS}: {odd[0]!r} is not in a model of this recipe")


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    try:
        found = model.get_parameter(name) if name else None
    except AttributeError:
        return None
    return None if found is None or found.is_meta else found


def read_section(root: Path) -> dict[str, Any]:
    """The section of a folder with a prepared model, its checksum compared.

    Raises:
        BellboxError: damaged.
    """
    config = read_json(root / CONFIG)
    section = config.get(SECTION)
    if not isinstance(section, dict) or section.get("sha256") != seal(config):
        raise BellboxError(f"{root / CONFIG}: damaged, its checksum does not match; save the model again")
    files = section.get("files")
    stated = files.get(TENSORS) if isinstance(files, dict) else None
    if not isinstance(stated, dict) or not isinstance(stated.get("sha256"), str) or "bytes" not in stated:
        raise BellboxError(
            f"{root / CONFIG}: does not say size and checksum of {TENSORS}; save the model again"
        )
    return section


def plan(model: Any, root: Path, recipe: Recipe) -> Prepared:
    """Look at a folder, and have a model without memory ready for transformers to load it.

    Raises:
        BellboxError: a damaged file, or one that does not fit the model.
    """
    tensors = read_tensors(listed_file(root, read_section(root)["files"], TENSORS, CONFIG))
    guards = guards_in(tensors, [name.removesuffix(f".{ROTATED}") for name in tensors], {})
    tensors = {name: value for name, value in tensors.items() if name not in guards}
    pass_over(model, guards)
    body = model.base_model_prefix
    if body and not hasattr(model, body) and any(name.startswith(f"{body}.") for name in tensors):
        raise BellboxError(
            f"{root}: a prepared model is loaded by the class that it was saved from; its body alone is no such model"
        )
    with plain_dtype():
        tie_on_meta(model)
        plain = unique_tensors(model)
        owners = _owners(root, model, plain, tensors)
        memory = {id(value): name for name, value in model.named_parameters()}
        kept = {name: model.get_submodule(name) for name in owners}
        for name, module in kept.items():
            replace_layer(model, module, Stored(below(tensors, name), module))
        untie(model, kept)
    return Prepared(root, recipe, kept, memory, frozenset(tensors))


def _owners(
    root: Path, model: nn.Module, plain: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> set[str]:
    """The modules below which the file has other tensors than the plain model, outermost only."""
    places = dict(model.named_modules())
    owners: set[str] = set()
    for name in tensors.keys() - plain.keys():
        place = name.rpartition(".")[0]
        while place and place not in places:
            place = place.rpartition(".")[0]
        if not place:
            raise BellboxError(f"{root / TENSORS}: tensor {name!r} is not in the model")
        owners.add(place)
    inside = tuple(f"{name}." for name in owners)
    lost = sorted(name for name in plain.keys() - tensors.keys() if not name.startswith(inside))
    if lost:
        raise BellboxError(f"{root / TENSORS}: tensor {lost[0]!r} is missing")
    for name, value in plain.items():
        if name in tensors and not name.startswith(inside) and tensors[name].shape != value.shape:
            found, wanted = tuple(tensors[name].shape), tuple(value.shape)
            raise BellboxError(f"{root / TENSORS}: tensor {name!r} is {found}, the model needs {wanted}")
    return {name for name in owners if not name.startswith(inside)}
