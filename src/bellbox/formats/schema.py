"""A packed folder's description against what a model is: everything is checked before anything is changed.

A description becomes empty layers, the tensors are compared with them, and at the end put in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.core.geometry import ConvGeometry
from bellbox.core.grid import Grid, Levels
from bellbox.core.packing import row_bytes, unpack_slabs
from bellbox.core.table import TableCoding
from bellbox.errors import BellboxError
from bellbox.formats.description import CONFIG, TENSORS
from bellbox.formats.expert_places import ExpertPlace, PackedProjections, expert_places
from bellbox.nn import (
    CodedLayer,
    InputCoding,
    PackedConv,
    PackedConv1d,
    PackedConv2d,
    PackedGroup,
    PackedLayer,
    PackedLinear,
    PackedMatrix,
    PackedTransposed,
    WeightOnlyLinear,
    WeightOnlyMatrix,
    WeightOnlyTransposed,
    is_transposed_linear,
)
from bellbox.nn.adopted import class_for, owners_class
from bellbox.nn.compact import Compact, empty_like
from bellbox.nn.huge_pages import may_leave_memory, own_copy
from bellbox.nn.tools import replace_layer, unique_tensors
from bellbox.nn.transposed import transposed_sizes
from bellbox.utils.skeleton import give_memory


def _read_levels(stored: Mapping[str, Any]) -> Levels:
    if stored["thresholds"] == "gaussian":
        return Levels.gaussian(stored["levels"], stored["zero_point"])
    return Levels(stored["levels"], stored["zero_point"], tuple(stored["thresholds"]))


def packed_layers(root: Path, model: nn.Module, stored: Mapping[str, Any]) -> dict[str, CodedLayer]:
    """Empty layers, without memory, as the description has them, each of the kind that its place in the model has.

    Raises:
        BellboxError: a description that no layer can have.
    """
    groups: dict[str, PackedGroup] = {}
    layers: dict[str, CodedLayer] = {}
    places = _places(model)
    for name, entry in stored.items():
        try:
            layers[name] = layer = _empty_layer(entry, places.get(name))
            layer.quantization_method = entry["method"]
            if isinstance(layer, PackedMatrix):
                _check_owner(entry, stored)
                layer.join(groups.setdefault(entry["input"], PackedGroup()))
        except BellboxError as error:
            raise BellboxError(f"{root / CONFIG}: layer {name!r}: {error}") from None
    return layers


def _places(model: nn.Module) -> dict[str, nn.Module | ExpertPlace]:
    """Where layers may be put: modules, and the matrices of fused experts."""
    return {**dict(model.named_modules()), **expert_places(model)}


def _check_owner(entry: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """The layer whose input this one shares: there, of the same kind and width, and its own owner."""
    owner = stored.get(entry["input"])
    where = f"its input is that of layer {entry['input']!r}, which"
    if owner is None:
        raise BellboxError(f"{where} is not in the file")
    if owner["function"] != "packed_linear":
        raise BellboxError(f"{where} is a {owner['function']}, not a packed_linear")
    if owner["input"] != entry["input"]:
        raise BellboxError(f"{where} shares that of layer {owner['input']!r} itself")
    if owner["in_features"] != entry["in_features"]:
        raise BellboxError(f"{where} has {owner['in_features']} in_features, not {entry['in_features']}")


def _check_block(block: int, features: int) -> None:
    if block & (block - 1) or features % block:
        raise BellboxError(f"Hadamard block {block}: must be a power of two that divides {features}")


def _empty_layer(entry: Mapping[str, Any], place: nn.Module | ExpertPlace | None) -> CodedLayer:
    """A layer without memory, for a place in a model.

    Raises:
        BellboxError: numbers that do not fit together.
    """
    if entry["function"] == "weight_only_linear":
        return _empty_weight_only(entry, place)
    weight = Grid(entry["weight"]["levels"], entry["weight"]["zero_point"])
    activation, block = _read_levels(entry["activation"]), entry["hadamard_block"]
    conv = entry.get("convolution")
    _check_block(block, entry["in_features"] if conv is None else _check_geometry(conv, entry))
    if entry["normalise"] == "absmax" and block != 1:
        raise BellboxError(f"normalise 'absmax' goes with hadamard_block 1, not {block}")
    if entry["normalise"] == "static" and entry["rescale"]:
        raise BellboxError("rescale needs a sigma that follows the input, not normalise 'static'")
    if entry["normalise"] == "norm" and not entry["rescale"]:
        raise BellboxError("normalise 'norm' keeps the norm by a scale, so rescale must be true")
    if not (weight.fits_int8 and activation.fits_int8):
        raise BellboxError("levels do not fit int8")
    coding = InputCoding(activation, block, entry["normalise"], entry["rescale"], entry["signs"])
    outputs, bias = entry["out_features"], entry["bias"]
    with torch.device("meta"):
        if conv is None:
            kind = _kind_for(place, PackedLinear, PackedTransposed)
            return kind(entry["in_features"], outputs, weight, coding, bias)
        sizes = (tuple(conv[name]) for name in ("kernel", "stride", "padding", "dilation"))
        geometry = ConvGeometry(*sizes, conv["groups"])  # type: ignore[arg-type]
        line = isinstance(place, nn.Conv1d) and geometry.is_line
        made = PackedConv1d if line else PackedConv2d
        return made(conv["channels"], outputs, geometry, weight, coding, bias)


def _kind_for(place: nn.Module | ExpertPlace | None, linear: Any, transposed: Any) -> Any:
    """The class for the product with a matrix, where a model may have it as a `Conv1D`."""
    if not isinstance(place, nn.Module) or not is_transposed_linear(place):
        return linear
    return class_for(transposed, owners_class(place))


def _empty_weight_only(entry: Mapping[str, Any], place: nn.Module | ExpertPlace | None) -> WeightOnlyMatrix:
    columns, group, zero_point = entry["in_features"], entry["weight"]["group"], entry["weight"]["zero_point"]
    _check_block(entry["hadamard_block"], columns)
    if group is not None and columns % group:
        raise BellboxError(f"group {group}: must divide the {columns} in_features")
    levels = Grid(entry["weight"]["levels"], -0.5 if zero_point is None else zero_point)
    with torch.device("meta"):
        return _kind_for(place, WeightOnlyLinear, WeightOnlyTransposed)(
            columns,
            entry["out_features"],
            levels,
            entry["bias"],
            group=group,
            table=zero_point is None,
            block=entry["hadamard_block"],
            signs=entry["signs"],
        )


def _check_geometry(geometry: Mapping[str, Any], entry: Mapping[str, Any]) -> int:
    """Channels of a group, where the numbers of a convolution fit together."""
    channels, groups = geometry["channels"], geometry["groups"]
    depth = channels // groups
    for name, least in (("kernel", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        if not all(least <= size <= 1 << 16 for size in geometry[name]):
            raise BellboxError(f"{name} is {geometry[name]}: numbers from {least} to {1 << 16} are needed")
    if channels % groups or entry["out_features"] % groups:
        raise BellboxError(f"{groups} groups do not divide {channels} and {entry['out_features']} channels")
    if entry["in_features"] != geometry["kernel"][0] * geometry["kernel"][1] * depth:
        raise BellboxError(
            f"in_features is {entry['in_features']}, which is not kernel {geometry['kernel']} times {depth} channels"
        )
    return depth


def compact_tables(root: Path, model: nn.Module, stored: Mapping[str, Any]) -> dict[str, Compact]:
    """Empty embeddings and heads, without memory, as the configuration describes them; tied ones share their tensors.

    Raises:
        BellboxError: one that the model has not, or whose rows cannot be what the configuration says.
    """
    places = dict(model.named_modules())
    first: dict[int, Compact] = {}
    tables: dict[str, Compact] = {}
    order = {
        name: at for at, name in enumerate(places)
    }  # the model's, whatever a file's writer did to its keys
    for name in sorted(stored, key=lambda each: order.get(each, len(order))):
        entry, place = stored[name], places.get(name)
        if not isinstance(place, (nn.Embedding, nn.Linear, Compact)):
            kind = "nothing" if place is None else type(place).__name__
            raise BellboxError(f"{root}: {name!r} is {kind} in the model, neither an embedding nor a head")
        try:
            tables[name] = empty_like(place, _table_coding(entry), "meta")
        except BellboxError as error:
            raise BellboxError(f"{root / CONFIG}: embedding {name!r}: {error}") from None
        twin = first.setdefault(id(place.weight), tables[name])
        if twin.coding != tables[name].coding:
            raise BellboxError(
                f"{root / CONFIG}: embedding {name!r} is tied to one that is rounded in another way"
            )
        tables[name].tie(twin)
    return tables


def _table_coding(entry: Any) -> TableCoding | None:
    """How a table is rounded, as the configuration says; None for bf16."""
    if isinstance(entry, str):
        return None if entry == "bf16" else TableCoding(8)
    return TableCoding(entry["bits"], entry["group"])


def all_replaced(
    root: Path, layers: Mapping[str, CodedLayer], tables: Mapping[str, Compact]
) -> dict[str, CodedLayer | Compact]:
    """Layers and tables by name.

    Raises:
        BellboxError: a name that is both.
    """
    if both := sorted(layers.keys() & tables.keys()):
        raise BellboxError(
            f"{root / CONFIG}: {both[0]!r} is described as a layer and as an embedding or head"
        )
    return {**layers, **tables}


def check_fit(
    root: Path,
    model: nn.Module,
    replaced: Mapping[str, CodedLayer | Compact],
    experts: PackedProjections,
    tensors: Mapping[str, Tensor],
) -> None:
    """Names, shapes and dtypes against the model, and values that no packed layer can have; changes nothing.

    Raises:
        BellboxError: the first thing that does not fit.
    """
    coded = {name: layer for name, layer in replaced.items() if isinstance(layer, CodedLayer)}
    _check_places(root, model, coded)
    _check_tensors(root, model, replaced, experts, tensors)
    _check_inputs(root, coded, tensors)
    _check_values(root, replaced, tensors)


def check_layers(root: Path, layers: Mapping[str, CodedLayer], tensors: Mapping[str, Tensor]) -> None:
    """Layers by themselves, where somebody else builds the model: shapes, dtypes and values of their tensors.

    Raises:
        BellboxError: the first thing that does not fit.
    """
    for name, layer in layers.items():
        own = {f"{name}.{key}": (value.shape, value.dtype) for key, value in stored_buffers(layer).items()}
        _check_expected(root, own, tensors)
    _check_inputs(root, layers, tensors)
    _check_values(root, layers, tensors)


def _check_values(
    root: Path, replaced: Mapping[str, CodedLayer | Compact], tensors: Mapping[str, Tensor]
) -> None:
    for name, layer in replaced.items():
        prefix = f"{name}." if name else ""
        signs = tensors.get(prefix + "act_signs")
        if signs is not None and not bool((signs.abs() == 1).all()):
            raise BellboxError(f"{root / TENSORS}: tensor {prefix + 'act_signs'!r} holds more than 1 and -1")
        for buffer in ("weight_scale", "weight_table", "act_scale", "act_rstd", "bias", "scale"):
            value = tensors.get(prefix + buffer)
            if value is not None and not bool(value.isfinite().all()):
                raise BellboxError(f"{root / TENSORS}: tensor {prefix + buffer!r} holds NaN or infinity")
        table = tensors.get(prefix + "weight_table")
        if isinstance(layer, WeightOnlyMatrix) and table is not None and bool((table.diff() < 0).any()):
            raise BellboxError(f"{root / TENSORS}: tensor {prefix + 'weight_table'!r} does not rise")
        if isinstance(layer, CodedLayer):
            _check_codes(root, prefix, layer, tensors)


def _check_codes(root: Path, prefix: str, layer: CodedLayer, tensors: Mapping[str, Tensor]) -> None:
    levels = layer.weight_levels
    if levels.n & (levels.n - 1) == 0:  # bytes cannot hold codes that do not exist
        return
    slabs = unpack_slabs(tensors[prefix + "weight_packed"], layer.row_length, levels.n)
    if any(int(codes.max()) >= levels.n for codes in slabs):
        raise BellboxError(f"{root / TENSORS}: {prefix + 'weight_packed'!r} has codes above {levels.n - 1}")


def _check_places(root: Path, model: nn.Module, coded: Mapping[str, CodedLayer]) -> None:
    places = _places(model)
    for name, layer in coded.items():
        place = places.get(name)
        conv = isinstance(layer, PackedConv)
        if place is None or not _is_of_kind(place, conv):
            kind = "nothing" if place is None else type(place).__name__
            wanted = "a convolution" if conv else "a linear layer"
            raise BellboxError(f"{root}: layer {name!r} is {kind} in the model, not {wanted}")
        here, there = _shape(place), _shape(layer)
        if here != there:
            raise BellboxError(f"{root}: layer {name!r} is {there} in the file and {here} in the model")


def _shape(layer: nn.Module | ExpertPlace) -> tuple[Any, ...]:
    """What must be equal of the layer in the file and that in the model: outputs, inputs, geometry."""
    if isinstance(layer, ExpertPlace):
        return layer.outputs, layer.inputs
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        geometry = layer.geometry if isinstance(layer, PackedConv) else ConvGeometry.of(layer)
        return layer.out_channels, layer.in_channels, geometry
    if isinstance(layer, CodedLayer):
        return layer.row_count, layer.row_length
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return transposed_sizes(layer)[::-1]


def _is_of_kind(place: nn.Module | ExpertPlace, conv: bool) -> bool:
    """Whether a place in a model is for a convolution, or for the product with a matrix."""
    if isinstance(place, ExpertPlace):
        return not conv
    if conv:
        return isinstance(place, nn.Conv1d | nn.Conv2d)
    return isinstance(place, nn.Linear) or is_transposed_linear(place)


def _check_tensors(
    root: Path,
    model: nn.Module,
    replaced: Mapping[str, CodedLayer | Compact],
    experts: PackedProjections,
    tensors: Mapping[str, Tensor],
) -> None:
    places = dict(model.named_modules(remove_duplicate=False))
    gone = {
        id(places[name]) for name in replaced if name in places
    }  # layers of experts may have no module yet
    inside = tuple(f"{name}." if name else "" for name, module in places.items() if id(module) in gone)
    inside += experts.names(model)
    # What is not packed may be stored in another precision than the model has, but not as another kind of number.
    expected: dict[str, tuple[torch.Size, torch.dtype | None]] = {
        name: (value.shape, None if value.is_floating_point() else value.dtype)
        for name, value in unique_tensors(model, leave_out=inside).items()
    }
    seen: set[int] = set()
    buffers = {name: stored_buffers(layer) for name, layer in replaced.items()}
    for name, own in buffers.items():
        for buffer, value in own.items():
            if id(value) not in seen:  # of tied tensors the file has the first
                expected[f"{name}.{buffer}" if name else buffer] = (value.shape, value.dtype)
            seen.add(id(value))
    _check_expected(root, expected, tensors)
    if unknown := sorted(set(tensors) - set(expected)):
        raise BellboxError(f"{root / TENSORS}: tensor {unknown[0]!r} is not in the model")


def _check_expected(
    root: Path,
    expected: Mapping[str, tuple[torch.Size, torch.dtype | None]],
    tensors: Mapping[str, Tensor],
) -> None:
    for name, (shape, dtype) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise BellboxError(f"{root / TENSORS}: tensor {name!r} is missing")
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tensor.shape != shape or not fits:
            found, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", f"{dtype or 'float'} {tuple(shape)}"
            raise BellboxError(f"{root / TENSORS}: tensor {name!r} is {found}, the model needs {wanted}")


def stored_buffers(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a layer of codes or a compact table as files have them; of an empty one shapes and dtypes.

    Those of one width: of a nested layer its own (`formats.nested` has the others).
    """
    buffers = dict(layer.named_buffers())
    if not isinstance(layer, CodedLayer):
        return buffers
    if isinstance(layer, PackedLayer):
        for name in layer.narrower_scales():
            del buffers[name]
    rows = buffers.pop("packed")
    buffers.pop("act_thresholds", None)
    if not rows.is_meta:
        rows = layer.weight_packed
    elif isinstance(layer, PackedLayer):
        size = row_bytes(layer.row_length, layer.weight_levels.n)
        rows = torch.empty(layer.row_count, size, dtype=torch.uint8, device="meta")
    return {"weight_packed": rows, **buffers}


def _check_inputs(root: Path, coded: Mapping[str, CodedLayer], tensors: Mapping[str, Tensor]) -> None:
    owners: dict[int, tuple[InputCoding, list[Tensor | None]]] = {}
    for name, layer in coded.items():
        if not isinstance(layer, PackedLayer):
            continue
        prefix = f"{name}." if name else ""
        mine = [tensors.get(prefix + buffer) for buffer in ("act_rstd", "act_signs")]
        coding, numbers = owners.setdefault(id(layer.group), (layer.coding, mine))
        same = (
            a is None or (b is not None and torch.equal(a, b)) for a, b in zip(numbers, mine, strict=True)
        )
        if coding != layer.coding or not all(same):
            raise BellboxError(f"{root}: layer {name!r} shares an input that it codes differently")


def put_into(
    model: nn.Module, replaced: Mapping[str, CodedLayer | Compact]
) -> tuple[nn.Module, dict[str, CodedLayer | Compact]]:
    """Put layers of codes and compact tables in their places, those of experts being there already.

    Returns:
        The model, or what stands for it where it is itself such a table, and what is in the places now.
    """
    placed: dict[str, CodedLayer | Compact] = {}
    for name, layer in replaced.items():
        place = model.get_submodule(name)
        if isinstance(layer, CodedLayer):
            placed[name] = layer if place is layer else layer.move_into(place)
        else:
            model, placed[name] = replace_layer(model, place, layer), layer
    return model, placed


def assign(
    model: nn.Module,
    replaced: Mapping[str, CodedLayer | Compact],
    tensors: Mapping[str, Tensor],
    device: torch.device | None,
    codes: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Put the stored tensors in the model's places; ties stay ties. Codes are laid out for the kernels.

    Nothing stays in the memory of the file, which anybody may write to or shorten.

    Args:
        model: to be filled.
        replaced: its layers of codes and compact tables, by name, which are in their places.
        tensors: by name.
        device: of the model; that of the tensors where None.
        codes: `NAME.weight_packed` -> what makes it, where `tensors` have a stand-in.
    """
    codes = codes or {}
    inside: set[int] = set()
    for name, layer in replaced.items():
        if isinstance(layer, CodedLayer):
            prefix = f"{name}." if name else ""
            inside.add(id(layer))
            stored = {key: tensors.get(prefix + key) for key in stored_buffers(layer)}
            if (make := codes.get(f"{prefix}weight_packed")) is not None:
                stored["weight_packed"] = make()
            fill(layer, stored, device)
    placed: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if id(module) in inside:
            continue
        places = module._parameters if leaf in module._parameters else module._buffers
        if id(value) not in placed:
            own = own_copy(tensors[name], device)
            is_buffer = places is module._buffers
            placed[id(value)] = own if is_buffer else nn.Parameter(own, requires_grad=False)
        places[leaf] = placed[id(value)]  # type: ignore[assignment]
    for module in model.modules():  # what is not stored (tables that a model computes) still has no memory
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            give_memory(module, device or "cpu")


def fill(layer: CodedLayer, stored: Mapping[str, Tensor | None], device: torch.device | None) -> None:
    """Give an empty layer its stored tensors, in memory of its own.

    Args:
        layer: as `packed_layers` makes it.
        stored: what files have of it (`stored_buffers`), by name.
        device: of the layer; that of the tensors where None.
    """
    rows = stored["weight_packed"]
    assert rows is not None
    for name, value in stored.items():
        if name != "weight_packed" and value is not None:
            layer._buffers[name] = own_copy(value, device)
    if not isinstance(layer, PackedLayer):
        layer.fill_from_rows(own_copy(rows, device))
        return
    layer.act_thresholds = torch.tensor(layer.coding.levels.thresholds, device=device)
    layer.fill_from_rows(rows)
    layer.packed = layer.packed.to(device or rows.device)
    may_leave_memory(rows)
