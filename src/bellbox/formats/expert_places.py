"""Where the packed layers of fused experts stand in a model that has 3-D parameters there: NAME.projection.index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bellbox.errors import BellboxError
from bellbox.nn import CodedLayer, ExpertStack, PackedExperts, is_fused_experts
from bellbox.nn.adopted import become
from bellbox.nn.experts import ExpertsForward, sizes, stack_names
from bellbox.nn.quantized_experts import LAYERS


class ExpertPlace(NamedTuple):
    """The place of one matrix of one expert."""

    outputs: int
    inputs: int


def expert_places(model: nn.Module) -> dict[str, ExpertPlace]:
    """Every matrix of every expert by the name that its layer has in a packed model, whatever form the model is in."""
    found: dict[str, ExpertPlace] = {}
    for name, experts in _fused(model):
        for stack in stack_names(experts):
            weights: Any = getattr(experts, stack)
            inputs, outputs = sizes(experts, weights)
            where = f"{name}.{stack}" if name else stack
            found.update({f"{where}.{i}": ExpertPlace(outputs, inputs) for i in range(weights.shape[0])})
    return found


def _fused(model: nn.Module, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=not every_name):
        if isinstance(module, ExpertsForward) or is_fused_experts(module):
            yield name, module


class PackedProjections(dict[str, dict[str, list[CodedLayer]]]):
    """Layers of codes by the name of the experts' module and of the projection, one an expert."""

    def names(self, model: nn.Module) -> tuple[str, ...]:
        """Beginnings of the names of all tensors in a model that these layers replace."""
        places = dict(_fused(model, every_name=True))
        gone = {id(places[name]): stacks for name, stacks in self.items()}
        found: list[str] = []
        for name, module in places.items():
            prefix = f"{name}." if name else ""
            for stack in gone.get(id(module), ()):
                found += [f"{prefix}{stack}", f"{prefix}{LAYERS}."]  # its bias too
        return tuple(found)

    def put_into(self, model: nn.Module) -> None:
        """Change the class of the modules of experts, in place."""
        for name, stacks in self.items():
            module = model.get_submodule(name)
            become(module, PackedExperts.of(module, stacks))


def packed_projections(
    root: Path, model: nn.Module, layers: Mapping[str, CodedLayer], stored: Mapping[str, Any]
) -> PackedProjections:
    """The layers of experts among all layers of a folder, as its description says.

    Args:
        root: the folder, for messages.
        model: that is to be filled.
        layers: of the folder, by name.
        stored: `experts` of its description.

    Raises:
        BellboxError: experts that the model has not, or layers that are not there, or are too many.
    """
    modules = dict(_fused(model))
    found = PackedProjections()
    for name, entry in stored.items():
        module: Any = modules.get(name)
        if module is None:
            raise BellboxError(f"{root}: experts {name!r} are none in the model")
        if entry["count"] != module.num_experts:
            raise BellboxError(
                f"{root}: experts {name!r} are {entry['count']} in the file and {module.num_experts} in the model"
            )
        for stack in entry["projections"]:
            found.setdefault(name, {})[stack] = _stack(root, name, stack, entry["count"], layers)
    _require_all(root, model, layers, found)
    return found


def _require_all(
    root: Path, model: nn.Module, layers: Mapping[str, CodedLayer], found: PackedProjections
) -> None:
    """Refuse layers of experts that the description does not name, and packed experts that stay without any."""
    known = {id(layer) for stacks in found.values() for stack in stacks.values() for layer in stack}
    places = expert_places(model)
    for name, layer in layers.items():
        if name in places and id(layer) not in known:
            raise BellboxError(f"{root}: layer {name!r} is one of experts that the file does not describe")
    for name, module in _fused(model):
        lost = [s for s in stack_names(module) if _is_packed(module, s) and s not in found.get(name, {})]
        if lost:
            raise BellboxError(
                f"{root}: {lost[0]} of experts {name!r} is packed in the model, not in the file"
            )


def _stack(
    root: Path, name: str, stack: str, count: int, layers: Mapping[str, CodedLayer]
) -> list[CodedLayer]:
    where = f"{name}.{stack}" if name else stack
    found = [layers.get(f"{where}.{i}") for i in range(count)]
    if None in found:
        raise BellboxError(f"{root}: layer '{where}.{found.index(None)}' of the experts is missing")
    return [layer for layer in found if layer is not None]


def _is_packed(module: nn.Module, stack: str) -> bool:
    return isinstance(module._modules.get(stack), ExpertStack)
