"""A packed model as a folder: `config.json` says what it is, `model.safetensors` has the numbers.

The format is written down in `docs/format.md`. Everything read is distrusted: sizes are bounded before
they are believed, checksums are compared before tensors are read, and every tensor must have the name, shape
and dtype that the configuration implies. A folder loads as the function that was saved, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.files import new_folder, read_json, sha256_file
from bellbox.levels import Grid, Levels
from bellbox.nn import (
    InputCoding,
    PackedLinear,
    QuantizedLinear,
    SharedInput,
    replace_layer,
    without_fused_paths,
)
from bellbox.packing import unpack

FORMAT = "bellbox-packed"
VERSION = 2
CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
HEADER_LIMIT = 64 << 20

Model = TypeVar("Model", bound=nn.Module)


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: str | os.PathLike[str] | None = None
) -> None:
    """Write a packed model; whole or not at all, and safely over an earlier one.

    Args:
        model: what `convert` gave. Models of `bellbox.models` load by themselves later; any other module
            loads with `load(folder, into=model)`.
        folder: new, empty, or an earlier packed model, which is replaced.
        tokenizer: a tokenizer.json to put beside it.

    Raises:
        BellboxError: the model is not packed, or the folder cannot be used.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not layers:
        raise BellboxError("save takes a packed model: call bellbox.convert(model) first")
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise BellboxError("save takes a packed model; this one still has layers in training form")
    target = Path(folder)
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise BellboxError(f"{tokenizer}: no such file; name a tokenizer.json, or none")
    with new_folder(target, replaces=CONFIG) as writing:
        if (target / CONFIG).is_file() and not is_packed(target):
            raise BellboxError(f"{target}: the folder holds something else; name a new or empty folder")
        tensors = {name: value.detach().contiguous().cpu() for name, value in unique_tensors(model).items()}
        memory: set[int] = set()
        for name, value in tensors.items():
            start = value.untyped_storage().data_ptr()
            if start in memory:  # a view of another one's memory, which safetensors refuses to write
                tensors[name] = value.clone()
            memory.add(start)
        try:
            save_file(tensors, writing / TENSORS)
        except SafetensorError as error:
            raise BellboxError(f"{target}: cannot be written ({error})") from None
        config: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": _describe_model(model),
            "quantization": {"layers": _describe_layers(layers)},
            "files": {TENSORS: _describe_file(writing / TENSORS)},
        }
        if tokenizer is not None:
            shutil.copyfile(tokenizer, writing / TOKENIZER)
            config["files"][TOKENIZER] = _describe_file(writing / TOKENIZER)
        config["sha256"] = _checksum(config)
        (writing / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


@overload
def load(folder: str | os.PathLike[str], *, into: None = None) -> nn.Module: ...
@overload
def load(folder: str | os.PathLike[str], *, into: Model) -> Model: ...
def load(folder: str | os.PathLike[str], *, into: nn.Module | None = None) -> nn.Module:
    """Read a packed model.

    Args:
        folder: what `save` wrote.
        into: a module of the same shape (full precision, prepared or packed) whose layers are replaced, for
            models that Bellbox does not know how to build. It is changed only after everything was checked.

    Returns:
        The model in evaluation mode, without gradients; `into` itself where it is given.

    Raises:
        BellboxError: missing, truncated, altered, of another version, or not fitting the model.
    """
    root = Path(folder)
    config = read_config(root)
    if into is None and config["model"] is None:
        raise BellboxError(
            f"{root}: Bellbox cannot build this model itself; use load(folder, into=your_model)"
        )
    if into is not None and any(t.is_meta for t in (*into.parameters(), *into.buffers())):
        raise BellboxError("load(into=model): the model lies on the meta device; build it on a real one")
    tensors = _read_tensors(root, config)
    packed = _packed_layers(root, config["quantization"]["layers"])
    model = _build(root, config["model"]) if into is None else into
    device = None if into is None else next((t.device for t in (*into.parameters(), *into.buffers())), None)
    _check_fit(root, model, packed, tensors)
    for name, layer in packed.items():
        model = replace_layer(model, model.get_submodule(name), layer)
    without_fused_paths(model)
    _assign(model, tensors, device)
    return model.requires_grad_(False).eval()


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is a packed model (its content is not looked at)."""
    path = Path(folder) / CONFIG
    try:
        return path.is_file() and read_json(path).get("format") == FORMAT
    except BellboxError:
        return False


def tokenizer_path(folder: str | os.PathLike[str]) -> Path | None:
    """The tokenizer stored with a packed model, its checksum compared; None where there is none.

    Raises:
        BellboxError: it is missing or altered.
    """
    root = Path(folder)
    stated = read_config(root)["files"].get(TOKENIZER)
    if stated is None:
        return None
    _verify_file(root / TOKENIZER, stated)
    return root / TOKENIZER


def read_config(root: Path) -> dict[str, Any]:
    """`config.json` with its format, version and checksum verified.

    Raises:
        BellboxError: otherwise.
    """
    if not root.is_dir():
        raise BellboxError(f"{root}: no such folder")
    path = root / CONFIG
    config = read_json(path)
    if config.get("format") != FORMAT:
        raise BellboxError(f"{path}: not a packed Bellbox model")
    if config.get("version") != VERSION:
        raise BellboxError(f"{path}: format version {config.get('version')!r}; this Bellbox reads {VERSION}")
    if config.get("sha256") != _checksum(config):
        raise BellboxError(f"{path}: damaged, its checksum does not match; save the model again")
    return _validated(path, config)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a packed model, and what the same parameters take in bf16."""

    quantized_parameters: int
    """Weights of the packed layers."""
    packed_bytes: int
    """Their codes, scales and activation constants."""
    other_parameters: int
    """Everything else: embeddings, head, norms, biases."""
    other_bytes: int
    """As stored."""

    @property
    def bf16_bytes(self) -> int:
        """The packed layers' weights at two bytes each."""
        return 2 * self.quantized_parameters

    @property
    def ratio(self) -> float:
        """How many times smaller the packed layers are than in bf16."""
        return self.bf16_bytes / self.packed_bytes


def sizes(model: nn.Module) -> Sizes:
    """Count the bytes that `save` would write for a packed model (without the file headers)."""
    tensors = unique_tensors(model)
    packed_names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_modules()
        if isinstance(layer, PackedLinear)
        for name in ("weight_packed", "weight_scale", "act_scale", "act_rsigma", "act_signs")
    }
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    inside = sum(t.numel() * t.element_size() for name, t in tensors.items() if name in packed_names)
    rest = [t for name, t in tensors.items() if name not in packed_names]
    return Sizes(
        quantized, inside, sum(t.numel() for t in rest), sum(t.numel() * t.element_size() for t in rest)
    )


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once; what is tied goes under the first of its names."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if first.setdefault(id(value), name) == name}


# --- writing ---


def _checksum(config: Mapping[str, Any]) -> str:
    content = {key: value for key, value in config.items() if key != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _describe_file(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _describe_model(model: nn.Module) -> dict[str, Any] | None:
    from bellbox.models import GPT, Llama

    return model.config.to_dict() if isinstance(model, (Llama, GPT)) else None


def _describe_levels(levels: Levels) -> dict[str, Any]:
    gaussian = Levels.gaussian(levels.n, levels.zero_point) == levels
    thresholds = "gaussian" if gaussian else list(levels.thresholds)
    return {**_describe_grid(levels), "thresholds": thresholds}


def _describe_grid(grid: Grid) -> dict[str, Any]:
    return {"levels": grid.n, "zero_point": grid.zero_point}


def _describe_layers(layers: Mapping[str, PackedLinear]) -> dict[str, Any]:
    owners: dict[int, str] = {}
    return {
        name: {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "hadamard_block": layer.coding.block,
            "normalise": layer.coding.normalise,
            "rescale": layer.coding.rescale,
            "signs": layer.coding.signs,
            "weight": _describe_grid(layer.weight_levels),
            "activation": _describe_levels(layer.coding.levels),
            "input": owners.setdefault(id(layer.shared), name),
        }
        for name, layer in layers.items()
    }


# --- reading ---


def _validated(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every key known and every value of its type."""
    from pydantic import BaseModel, ConfigDict, Field, ValidationError

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

    class StoredGrid(Strict):
        levels: int = Field(ge=2, le=256)
        zero_point: float

    class StoredLevels(StoredGrid):
        thresholds: Literal["gaussian"] | list[float]

    class StoredLayer(Strict):
        in_features: int = Field(ge=1, le=1 << 24)
        out_features: int = Field(ge=1, le=1 << 24)
        bias: bool
        hadamard_block: int = Field(ge=1, le=1 << 16)
        normalise: Literal["rms", "absmax", "static"]
        rescale: bool
        signs: bool
        weight: StoredGrid
        activation: StoredLevels
        input: str

    class StoredQuantization(Strict):
        layers: dict[str, StoredLayer] = Field(min_length=1)

    class StoredFile(Strict):
        bytes: int = Field(ge=0)
        sha256: str

    class StoredConfig(Strict):
        format: str
        version: int
        model: dict[str, Any] | None
        quantization: StoredQuantization
        files: dict[Literal["model.safetensors", "tokenizer.json"], StoredFile]
        sha256: str

    try:
        return StoredConfig.model_validate(config).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BellboxError(f"{path}: field {where!r}: {first['msg']}") from None


def _verify_file(path: Path, stated: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != stated["bytes"]:
            raise BellboxError(f"{path}: {size} bytes instead of {stated['bytes']}: truncated; copy it again")
        if sha256_file(path) != stated["sha256"]:
            raise BellboxError(f"{path}: damaged, its checksum does not match config.json; copy it again")
    except OSError as error:
        raise BellboxError(f"{path}: cannot be read ({error.strerror})") from None


def _read_tensors(root: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = root / TENSORS
    if TENSORS not in config["files"]:
        raise BellboxError(f"{root / CONFIG}: lists no {TENSORS}")
    _verify_file(path, config["files"][TENSORS])
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(HEADER_LIMIT, path.stat().st_size - 8):
        raise BellboxError(f"{path}: damaged, claims a header of {header} bytes")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise BellboxError(f"{path}: damaged ({error})") from None


def _read_levels(stored: Mapping[str, Any]) -> Levels:
    if stored["thresholds"] == "gaussian":
        return Levels.gaussian(stored["levels"], stored["zero_point"])
    return Levels(stored["levels"], stored["zero_point"], tuple(stored["thresholds"]))


def _packed_layers(root: Path, stored: Mapping[str, Any]) -> dict[str, PackedLinear]:
    """Empty layers, without memory, as the configuration describes them."""
    readers: dict[str, int] = {}
    for entry in stored.values():
        readers[entry["input"]] = readers.get(entry["input"], 0) + 1
    shared = {owner: SharedInput(count) for owner, count in readers.items()}
    layers = {}
    for name, entry in stored.items():
        try:
            weight = Grid(entry["weight"]["levels"], entry["weight"]["zero_point"])
            activation, block = _read_levels(entry["activation"]), entry["hadamard_block"]
            if block & (block - 1) or entry["in_features"] % block:
                raise BellboxError(
                    f"Hadamard block {block}: must be a power of two that divides {entry['in_features']}"
                )
            if entry["normalise"] == "absmax" and block != 1:
                raise BellboxError(f"normalise 'absmax' goes with hadamard_block 1, not {block}")
            if entry["normalise"] == "static" and entry["rescale"]:
                raise BellboxError("rescale needs a sigma that follows the input, not normalise 'static'")
            if entry["input"] not in stored:
                raise BellboxError(f"its input is that of layer {entry['input']!r}, which is not in the file")
            if not (weight.fits_int8 and activation.fits_int8):
                raise BellboxError("levels do not fit int8")
        except BellboxError as error:
            raise BellboxError(f"{root / CONFIG}: layer {name!r}: {error}") from None
        coding = InputCoding(activation, block, entry["normalise"], entry["rescale"], entry["signs"])
        with torch.device("meta"):
            layers[name] = PackedLinear(
                entry["in_features"],
                entry["out_features"],
                weight,
                coding,
                entry["bias"],
                shared[entry["input"]],
            )
    return layers


def _build(root: Path, description: dict[str, Any]) -> nn.Module:
    from bellbox.models import build, config_from_dict

    try:
        config = config_from_dict(description)
        with torch.device("meta"):
            return build(config)
    except BellboxError as error:
        raise BellboxError(f"{root / CONFIG}: model: {error}") from None


def _check_fit(
    root: Path, model: nn.Module, packed: Mapping[str, PackedLinear], tensors: Mapping[str, Tensor]
) -> None:
    """Names, shapes and dtypes against the model, and values that no packed layer can have; changes nothing."""
    places = dict(model.named_modules())
    for name, layer in packed.items():
        place = places.get(name)
        if not isinstance(place, (nn.Linear, QuantizedLinear, PackedLinear)):
            kind = "nothing" if place is None else type(place).__name__
            raise BellboxError(f"{root}: layer {name!r} is {kind} in the model, not a linear layer")
        here, there = (place.out_features, place.in_features), (layer.out_features, layer.in_features)
        if here != there:
            raise BellboxError(f"{root}: layer {name!r} is {there} in the file and {here} in the model")
    inside = tuple(f"{name}." if name else "" for name in packed)
    # What is not packed may be stored in another precision than the model has, but not as another kind of number.
    expected: dict[str, tuple[torch.Size, torch.dtype | None]] = {
        name: (value.shape, None if value.is_floating_point() else value.dtype)
        for name, value in unique_tensors(model).items()
        if not name.startswith(inside)
    }
    for name, layer in packed.items():
        for buffer, value in layer.named_buffers():
            expected[f"{name}.{buffer}" if name else buffer] = (value.shape, value.dtype)
    for name, (shape, dtype) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise BellboxError(f"{root / TENSORS}: tensor {name!r} is missing")
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tensor.shape != shape or not fits:
            found, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", f"{dtype or 'float'} {tuple(shape)}"
            raise BellboxError(f"{root / TENSORS}: tensor {name!r} is {found}, the model needs {wanted}")
    if unknown := sorted(set(tensors) - set(expected)):
        raise BellboxError(f"{root / TENSORS}: tensor {unknown[0]!r} is not in the model")
    owners: dict[int, tuple[InputCoding, list[Tensor | None]]] = {}
    for name, layer in packed.items():
        prefix = f"{name}." if name else ""
        mine = [tensors.get(prefix + buffer) for buffer in ("act_rsigma", "act_signs")]
        coding, numbers = owners.setdefault(id(layer.shared), (layer.coding, mine))
        same = (
            a is None or (b is not None and torch.equal(a, b)) for a, b in zip(numbers, mine, strict=True)
        )
        if coding != layer.coding or not all(same):
            raise BellboxError(f"{root}: layer {name!r} shares an input that it codes differently")
        signs = tensors.get(prefix + "act_signs")
        if signs is not None and not bool((signs.abs() == 1).all()):
            raise BellboxError(f"{root / TENSORS}: tensor {prefix + 'act_signs'!r} holds more than 1 and -1")
        for buffer in ("weight_scale", "act_scale", "act_rsigma", "bias"):
            value = tensors.get(prefix + buffer)
            if value is not None and not bool(value.isfinite().all()):
                raise BellboxError(f"{root / TENSORS}: tensor {prefix + buffer!r} holds NaN or infinity")
        levels = layer.weight_levels
        if levels.n & (levels.n - 1):  # only then can bytes hold codes that do not exist
            codes = unpack(tensors[prefix + "weight_packed"], layer.in_features, levels.n)
            if int(codes.max()) >= levels.n:
                raise BellboxError(
                    f"{root / TENSORS}: {prefix + 'weight_packed'!r} has codes above {levels.n - 1}"
                )


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | None) -> None:
    """Put the stored tensors in the model's places; ties stay ties."""
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        source = tensors[first.setdefault(id(value), name)]
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._parameters:
            original = first[id(value)]
            if original != name:
                owner, _, owner_leaf = original.rpartition(".")
                module._parameters[leaf] = model.get_submodule(owner)._parameters[owner_leaf]
            else:
                module._parameters[leaf] = nn.Parameter(
                    source.to(device or source.device), requires_grad=False
                )
        else:
            module._buffers[leaf] = source.to(device or source.device)
    for module in model.modules():  # what is not stored (tables that a model computes) still has no memory
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            module.to_empty(device=device or "cpu", recurse=False)
