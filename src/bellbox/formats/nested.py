"""One folder, several widths: the codes of nested layers as bit planes, in a file for each width.

`bits-1.safetensors` has the first plane of every such layer, `bits-2.safetensors` the second, and so on, each with the
scales of its width. Who wants 2 bits reads the first two and no byte of the others, which may be missing. What is read
comes out as of a folder that has that one width, so that nobody else needs to know of the others (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bellbox.core.packing import row_bytes
from bellbox.core.planes import check_widths, has_clean_ends, packed_from, planes_of
from bellbox.errors import BellboxError
from bellbox.formats.description import CONFIG
from bellbox.nn import CodedLayer, PackedLayer
from bellbox.nn.huge_pages import may_leave_memory
from bellbox.nn.widths import width_at
from bellbox.utils.files import listed_file, read_tensors


def file_of(bits: int) -> str:
    """Name of the file that a width needs beyond those of the narrower ones."""
    return f"bits-{bits}.safetensors"


def nested_layers(layers: Mapping[str, CodedLayer]) -> dict[str, PackedLayer]:
    """Those layers that a file has at several widths."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, PackedLayer) and layer.widths}


# --- writing ---


def split(layers: Mapping[str, PackedLayer], tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Take the tensors that depend on the width out of a model's, and give those of each width's file.

    Args:
        layers: `nested_layers`, by name.
        tensors: of the model as one width has them (`formats.packed.tensors_of`); what is returned is taken out.
    """
    files: dict[int, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        scales = {prefix + key: value for key, value in layer.narrower_scales().items()}
        for side in ("weight", "act") if layer.nested_inputs else ("weight",):
            scales[f"{prefix}{side}_scale_{layer.widths[0]}"] = tensors.pop(f"{prefix}{side}_scale")
        planes = planes_of(tensors.pop(f"{prefix}weight_packed"), layer.row_length, layer.widths[0])
        for bits, numbers in _new_planes(layer.widths):
            own = files.setdefault(bits, {})
            own |= {f"{prefix}weight_plane_{number}": planes[number - 1] for number in numbers}
            own |= {key: value for key, value in scales.items() if key.endswith(f"_scale_{bits}")}
    return files


def _new_planes(widths: tuple[int, ...]) -> Iterator[tuple[int, range]]:
    """Each width and the numbers of the planes that it needs beyond the next narrower one's."""
    for bits, narrower in zip(widths, (*widths[1:], 0), strict=True):
        yield bits, range(narrower + 1, bits + 1)


# --- reading ---


def widths_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Bits of the widths that a folder can be read at, the widest first; empty where it has one.

    Args:
        config: as `description.read` gives it.
    """
    found = {
        bits for entry in config["layers"].values() for bits in (entry["nested"] or {"widths": ()})["widths"]
    }
    return tuple(sorted(found, reverse=True))


def at_width(root: Path, config: dict[str, Any], bits: int | None) -> dict[str, Any]:
    """A configuration as of the folder that one width would have; its entries `nested` have the widths up to that.

    Args:
        root: the folder, for messages.
        config: as `description.read` gives it.
        bits: the width; the widest where None. A layer without it has its widest below.

    Raises:
        BellboxError: a width that the folder does not have, or entries whose numbers do not nest.
    """
    widths = widths_of(config)
    if bits is not None and bits not in widths:
        there = (
            f"it can be read at {', '.join(map(str, widths))} bits" if widths else "its layers have one width"
        )
        raise BellboxError(f"{root}: no width of {bits} bits in this folder; {there}")
    layers: dict[str, Any] = {}
    for name, entry in config["layers"].items():
        try:
            layers[name] = entry if entry["nested"] is None else _entry_at(name, entry, bits or widths[0])
        except BellboxError as error:
            raise BellboxError(f"{root / CONFIG}: layer {name!r}: {error}") from None
    return {**config, "layers": layers}


def _entry_at(name: str, entry: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """An entry as of one width."""
    widths, inputs = entry["nested"]["widths"], entry["nested"]["inputs"]
    check_widths(widths)
    weight, activation = entry["weight"], entry["activation"]
    _check_half_integer("weight", weight, widths[0])
    if inputs:
        _check_half_integer("activation", activation, widths[0])
        if activation["thresholds"] != "gaussian":
            raise BellboxError("inputs of several widths need gaussian thresholds, which nest")
    at = width_at(name, widths, bits)
    levels = {"levels": 2**at}
    return {
        **entry,
        "weight": {**weight, **levels},
        "activation": {**activation, **levels} if inputs else activation,
        "nested": {"widths": [each for each in widths if each <= at], "inputs": inputs},
    }


def _check_half_integer(side: str, grid: Mapping[str, Any], widest: int) -> None:
    if grid["levels"] != 2**widest:
        raise BellboxError(
            f"{side} has {grid['levels']} levels, its widest width of {widest} bits has {2**widest}"
        )
    if grid["zero_point"] % 1 != 0.5:
        raise BellboxError(
            f"{side} has the zero point {grid['zero_point']}, of several widths it is a half-integer"
        )


class Read(NamedTuple):
    """What the files of a folder's widths hold of one width."""

    tensors: dict[str, Tensor]
    """As a folder of that width has them: `NAME.weight_packed`, `NAME.weight_scale`, `NAME.act_scale`. The first is a
    stand-in without memory."""
    codes: dict[str, Callable[[], Tensor]]
    """`NAME.weight_packed` -> what makes it of its planes, so that no two layers need be held at once."""
    narrower: dict[str, dict[str, Tensor]]
    """Layer -> `PackedLayer.narrower_scales`."""


def read(root: Path, config: Mapping[str, Any]) -> Read:
    """Read the files of a width and the narrower ones, checked: sizes, checksums, names, shapes, dtypes, values.

    Args:
        root: the folder.
        config: as `at_width` gives it.

    Raises:
        BellboxError: the first thing that is missing or does not fit.
    """
    entries = {name: entry for name, entry in config["layers"].items() if entry["nested"] is not None}
    stored: dict[str, Tensor] = {}
    for bits in widths_of(config):
        path = listed_file(root, config["files"], file_of(bits), CONFIG)
        tensors = read_tensors(path)
        _check(path, _expected(entries, bits), tensors)
        stored |= tensors
    found = Read({}, {}, {})
    for name, entry in entries.items():
        prefix, (at, *narrower) = f"{name}." if name else "", entry["nested"]["widths"]
        planes = [stored[f"{prefix}weight_plane_{number}"] for number in range(1, at + 1)]
        for number, plane in enumerate(planes, 1):
            if not has_clean_ends(plane, entry["in_features"]):
                raise BellboxError(
                    f"{root}: tensor '{prefix}weight_plane_{number}' has bits beyond the ends of its rows"
                )
        columns = entry["in_features"]
        size = entry["out_features"], row_bytes(columns, 2**at)
        found.tensors[f"{prefix}weight_packed"] = torch.empty(size, dtype=torch.uint8, device="meta")
        found.codes[f"{prefix}weight_packed"] = partial(_put_together, planes, columns)
        sides = ("weight", "act") if entry["nested"]["inputs"] else ("weight",)
        for side in sides:
            found.tensors[f"{prefix}{side}_scale"] = stored[f"{prefix}{side}_scale_{at}"]
        names = [f"{side}_scale_{bits}" for bits in narrower for side in sides]
        found.narrower[name] = {key: stored[prefix + key] for key in names}
    return found


def _put_together(planes: list[Tensor], columns: int) -> Tensor:
    rows = packed_from(planes, columns)
    for plane in planes:
        may_leave_memory(plane)
    return rows


def _expected(entries: Mapping[str, Any], bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a width's file."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, entry in entries.items():
        prefix, rows = f"{name}." if name else "", entry["out_features"]
        for width, numbers in _new_planes(tuple(entry["nested"]["widths"])):
            if width != bits:
                continue
            plane = (rows, row_bytes(entry["in_features"], 2)), torch.uint8
            found |= {f"{prefix}weight_plane_{number}": plane for number in numbers}
            found[f"{prefix}weight_scale_{bits}"] = (rows,), torch.float32
            if entry["nested"]["inputs"]:
                found[f"{prefix}act_scale_{bits}"] = (1,), torch.float32
    return found


def _check(
    path: Path, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Mapping[str, Tensor]
) -> None:
    if missing := sorted(expected.keys() - tensors.keys()):
        raise BellboxError(f"{path}: tensor {missing[0]!r} is missing")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise BellboxError(f"{path}: tensor {unknown[0]!r} is of no layer at this width")
    for name, (shape, dtype) in expected.items():
        value = tensors[name]
        if tuple(value.shape) != shape or value.dtype != dtype:
            found, wanted = f"{value.dtype} {tuple(value.shape)}", f"{dtype} {shape}"
            raise BellboxError(f"{path}: tensor {name!r} is {found}, {wanted} is needed")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise BellboxError(f"{path}: tensor {name!r} holds NaN or infinity")
