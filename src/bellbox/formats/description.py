"""The `config.json` of a packed folder: what a model says of itself, and all versions read into one form.

Version 4 is a section of the configuration that transformers reads, version 5 is that with a model's fused experts,
version 6 has embeddings of 4 bits, and version 7 layers of several widths; versions 2 and 3 were a file of their own.
What is read is validated field by field and comes out as version 7 has it, so that nobody else needs to know of the
others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bellbox.core.grid import Grid, Levels
from bellbox.core.planes import MOST_BITS
from bellbox.errors import BellboxError
from bellbox.nn import CodedLayer, PackedConv, PackedExperts, PackedLayer, WeightOnlyMatrix
from bellbox.nn.compact import Compact
from bellbox.utils.files import canonical_sha256, checksum, read_json

CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
VERSION, WITH_EXPERTS, WITH_INT4, WITH_WIDTHS = 4, 5, 6, 7
"""What is written, and what of a model with fused experts, with embeddings of 4 bits, with several widths."""
VERSIONS = (2, 3, 4, 5, 6, 7)
"""What is read."""
SECTION, QUANT_METHOD = "quantization_config", "bellbox"
"""Where version 4 stands in `config.json`, and its `quant_method`."""
FORMER_FORMAT = "bellbox-packed"
"""`format` of versions 2 and 3."""
WEIGHTS_FILE = "transformers_weights"
"""Key under which transformers wants the name of the file of weights, where it is another than the usual one."""
NO_SUCH_FILE = "pip-install-bellbox--and--import-bellbox.interop.transformers--to-load-this.safetensors"
"""What stands there. Without Bellbox, transformers skips packed layers with a warning, and has random weights in their
places; a file that is not there it refuses, and says its name. With Bellbox the entry is taken away first."""
RMS_NORM = "rms_norm"
"""Key under which the configuration of a LLaMA says whose norm it was trained with: `bellbox`, or transformers'. With
ours go our activation, rotary positions and attention."""
LAYER_NORM = "layer_norm"
"""Likewise of a GPT."""
FILE_OF_WIDTHS = r"^(model\.safetensors|tokenizer\.json|bits-[1-7]\.safetensors)$"
"""Files of a folder of version 7: a `bits-B.safetensors` is what B bits need beyond the next narrower width."""
METHOD_NAME = r"[\x20-\x7e]{0,32}"
"""What a method may be called in a file: printable ASCII."""


# --- writing ---


def describe(
    model: nn.Module, layers: Mapping[str, CodedLayer], files: Mapping[str, Any], widths: bool = False
) -> dict[str, Any]:
    """The whole `config.json` of a packed model, sealed with its checksum.

    Args:
        model: packed.
        layers: its layers of codes, by name.
        files: size and checksum of every other file (`utils.files.describe_file`).
        widths: whether the files have nested layers at all their widths; else each at its own alone.

    Raises:
        BellboxError: a layer whose method has a name that no file can hold.
    """
    made = section(model, layers, files, widths)
    config = {**_fields_of_transformers(model), SECTION: made}
    made["sha256"] = seal(config)
    return config


def section(
    model: nn.Module, layers: Mapping[str, CodedLayer], files: Mapping[str, Any], widths: bool = False
) -> dict[str, Any]:
    """Our section without its checksum; arguments and errors as of `describe`."""
    tables = {name: m for name, m in model.named_modules() if isinstance(m, Compact)}
    return section_of(_describe_model(model), layers, tables, _describe_experts(model), files, widths)


def section_of(
    model: dict[str, Any] | None,
    layers: Mapping[str, CodedLayer],
    tables: Mapping[str, Compact],
    experts: dict[str, Any],
    files: Mapping[str, Any],
    widths: bool = False,
) -> dict[str, Any]:
    """The same from its parts: what `bellbox.models` builds, layers, rounded tables, experts as they stand in it."""
    described = {name: _describe_table(table) for name, table in tables.items()}
    version = WITH_EXPERTS if experts else VERSION
    if any(isinstance(each, dict) for each in described.values()):
        version = WITH_INT4
    entries = _describe_layers(layers)
    if widths:
        version = WITH_WIDTHS
        for name, entry in entries.items():
            entry["nested"] = _describe_widths(layers[name])
    return {
        "quant_method": QUANT_METHOD,
        "version": version,
        **({"experts": experts} if version != VERSION else {}),
        "model": model,
        "layers": entries,
        "embeddings": described,
        "files": dict(files),
    }


def seal(config: Mapping[str, Any]) -> str:
    """The checksum of a configuration of version 4: of all of it but the checksum itself."""
    section = {key: value for key, value in config[SECTION].items() if key != "sha256"}
    return canonical_sha256({**config, SECTION: section})


def _describe_model(model: nn.Module) -> dict[str, Any] | None:
    from bellbox.models import GPT, Llama, ResNet, ViT

    return model.config.to_dict() if isinstance(model, (Llama, GPT, ResNet, ViT)) else None


def has_class_of_transformers(model: nn.Module) -> bool:
    """Whether `config.json` of a model of `bellbox.models` is also one of transformers."""
    from bellbox.models import GPT, Llama

    return isinstance(model, (Llama, GPT))


def _fields_of_transformers(model: nn.Module) -> dict[str, Any]:
    from bellbox.models import Llama
    from bellbox.models.hf_config import write_config

    if not has_class_of_transformers(model):
        return {}
    norm = {RMS_NORM: "bellbox"} if isinstance(model, Llama) else {}
    config: Any = model.config
    return {**write_config(config, "float32"), WEIGHTS_FILE: NO_SUCH_FILE, **norm}


def _describe_table(table: Compact) -> str | dict[str, Any]:
    coding = table.coding
    if coding is None or coding.group is None:
        return table.precision
    return {"bits": coding.bits, "group": coding.group}


def _describe_experts(model: nn.Module) -> dict[str, Any]:
    """Of each module of fused experts the number of experts, and which of its projections are packed."""
    return {
        name: {"count": module.num_experts, "projections": module.packed_stacks}
        for name, module in model.named_modules()
        if isinstance(module, PackedExperts)
    }


def _describe_layers(layers: Mapping[str, CodedLayer]) -> dict[str, Any]:
    owners: dict[int, str] = {}
    return {name: _describe_layer(name, layer, owners) for name, layer in layers.items()}


def _describe_layer(name: str, layer: CodedLayer, owners: dict[int, str]) -> dict[str, Any]:
    method = layer.quantization_method
    if not re.fullmatch(METHOD_NAME, method):
        raise BellboxError(
            f"layer {name!r}: a method called {method!r} cannot be stored; names have at most 32 characters of ASCII"
        )
    common: dict[str, Any] = {
        "method": method,
        "in_features": layer.row_length,
        "out_features": layer.row_count,
        "bias": layer.bias is not None,
    }
    if isinstance(layer, WeightOnlyMatrix):
        levels = _describe_grid(layer.weight_levels)
        if layer.weight_table is not None:
            levels["zero_point"] = None
        return {
            "function": "weight_only_linear",
            **common,
            "hadamard_block": layer.block,
            "signs": layer.act_signs is not None,
            "weight": {**levels, "group": layer.scale_group},
        }
    assert isinstance(layer, PackedLayer)
    common |= {
        "hadamard_block": layer.coding.block,
        "normalise": layer.coding.normalise,
        "rescale": layer.coding.rescale,
        "signs": layer.coding.signs,
        "weight": _describe_grid(layer.weight_levels),
        "activation": _describe_levels(layer.input_levels()),
    }
    if isinstance(layer, PackedConv):
        return {"function": "packed_conv2d", **common, "convolution": _describe_geometry(layer)}
    return {"function": "packed_linear", **common, "input": owners.setdefault(id(layer.group), name)}


def _describe_widths(layer: CodedLayer) -> dict[str, Any] | None:
    if not isinstance(layer, PackedLayer) or not layer.widths:
        return None
    return {"widths": list(layer.widths), "inputs": layer.nested_inputs}


def _describe_grid(grid: Grid) -> dict[str, Any]:
    return {"levels": grid.n, "zero_point": grid.zero_point}


def _describe_levels(levels: Levels) -> dict[str, Any]:
    gaussian = Levels.gaussian(levels.n, levels.zero_point) == levels
    return {**_describe_grid(levels), "thresholds": "gaussian" if gaussian else list(levels.thresholds)}


def _describe_geometry(layer: PackedConv) -> dict[str, Any]:
    geometry = layer.geometry
    return {
        "channels": layer.in_channels,
        "groups": geometry.groups,
        "kernel": list(geometry.kernel),
        "stride": list(geometry.stride),
        "padding": list(geometry.padding),
        "dilation": list(geometry.dilation),
    }


# --- reading ---


def is_description(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says that it is of a packed model, of whatever version."""
    return config.get("format") == FORMER_FORMAT or _is_section(config.get(SECTION))


def _is_section(section: Any) -> bool:
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def read(path: Path) -> dict[str, Any]:
    """A `config.json`, its version and checksum verified, with every field known and every value of its type.

    Returns:
        `version`, `model`, `layers`, `experts`, `embeddings` and `files` as docs/format.md has them in version 7.

    Raises:
        BellboxError: otherwise; of a field, by its name.
    """
    config = read_json(path)
    if not is_description(config):
        raise BellboxError(f"{path}: not a packed Bellbox model")
    former = config.get("format") == FORMER_FORMAT
    if not former and "prepared" in config[SECTION]:
        raise BellboxError(
            f"{path}: is of a model in training form; load it with transformers (docs/interop.md), convert and save it"
        )
    section = config if former else config[SECTION]
    version = section.get("version")
    if type(version) is not int or version not in VERSIONS:
        *others, last = map(str, VERSIONS)
        raise BellboxError(
            f"{path}: format version {version!r}; this Bellbox reads {', '.join(others)} and {last}"
        )
    if former != (version < VERSION):
        raise BellboxError(f"{path}: format version {version} does not stand in this place of the file")
    if section.get("sha256") != (checksum(config) if former else seal(config)):
        raise BellboxError(f"{path}: damaged, its checksum does not match; save the model again")
    if former:
        found = _upgraded(path, _validated(path, _FORMER, section))
    else:
        found = {"experts": {}, **_validated(path, _KINDS[version], section)}
    for entry in found["layers"].values():
        entry.setdefault("nested", None)
    return found


_FORMER, _PRESENT, _EXPERTS, _INT4, _WIDTHS = "former", "present", "experts", "int4", "widths"
_KINDS = {VERSION: _PRESENT, WITH_EXPERTS: _EXPERTS, WITH_INT4: _INT4, WITH_WIDTHS: _WIDTHS}


def _validated(path: Path, kind: str, section: dict[str, Any]) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        return _schema(kind).model_validate(section).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BellboxError(f"{path}: field {where!r}: {first['msg']}") from None


def _upgraded(path: Path, former: dict[str, Any]) -> dict[str, Any]:
    """Versions 2 and 3 as version 7 has them."""
    layers: dict[str, Any] = {}
    for name, entry in former["quantization"]["layers"].items():
        entry["method"] = ""
        if entry["convolution"] is None:
            del entry["convolution"]
            layers[name] = {"function": "packed_linear", **entry}
            continue
        if former["version"] < 3:
            raise BellboxError(f"{path}: layer {name!r} is a convolution, which version 2 does not have")
        if entry.pop("input") not in former["quantization"]["layers"]:
            raise BellboxError(
                f"{path}: layer {name!r}: its input is that of a layer that is not in the file"
            )
        layers[name] = {"function": "packed_conv2d", **entry}
    return {
        "version": former["version"],
        "model": former["model"],
        "layers": layers,
        "experts": {},
        "embeddings": former["quantization"]["embeddings"],
        "files": former["files"],
    }


@cache
def _schema(kind: str) -> Any:
    """The pydantic model of the whole file (versions 2 and 3), or of the section (from version 4 on)."""
    from typing import Annotated

    from pydantic import BaseModel, ConfigDict, Field

    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

    class StoredGrid(Strict):
        levels: int = Field(ge=2, le=256)
        zero_point: float

    class StoredLevels(StoredGrid):
        thresholds: Literal["gaussian"] | list[float]

    class StoredValues(Strict):
        levels: int = Field(ge=2, le=256)
        zero_point: float | None
        group: Annotated[int, Field(ge=1, le=1 << 24)] | None

    class StoredGeometry(Strict):
        channels: int = Field(ge=1, le=1 << 24)
        groups: int = Field(ge=1, le=1 << 24)
        kernel: list[int] = Field(min_length=2, max_length=2)
        stride: list[int] = Field(min_length=2, max_length=2)
        padding: list[int] = Field(min_length=4, max_length=4)
        dilation: list[int] = Field(min_length=2, max_length=2)

    class Sized(Strict):
        in_features: int = Field(ge=1, le=1 << 24)
        out_features: int = Field(ge=1, le=1 << 24)
        bias: bool
        hadamard_block: int = Field(ge=1, le=1 << 16)
        signs: bool

    class Coded(Sized):
        normalise: Literal["rms", "absmax", "norm", "static"]
        rescale: bool
        weight: StoredGrid
        activation: StoredLevels

    class FormerLayer(Coded):
        input: str
        convolution: StoredGeometry | None = None

    class Named(Strict):
        method: str = Field(max_length=32, pattern=f"^{METHOD_NAME}$")

    class Linear(Coded, Named):
        function: Literal["packed_linear"]
        input: str

    class Convolution(Coded, Named):
        function: Literal["packed_conv2d"]
        convolution: StoredGeometry

    class WeightOnly(Sized, Named):
        function: Literal["weight_only_linear"]
        weight: StoredValues

    class StoredFile(Strict):
        bytes: int = Field(ge=0)
        sha256: str

    class Common(Strict):
        version: int
        model: dict[str, Any] | None
        files: dict[Literal["model.safetensors", "tokenizer.json"], StoredFile]
        sha256: str

    class FormerQuantization(Strict):
        layers: dict[str, FormerLayer] = Field(min_length=1)
        embeddings: dict[str, Literal["bf16", "int8"]]

    class Former(Common):
        format: str
        quantization: FormerQuantization

    class Present(Common):
        quant_method: str
        layers: dict[str, Annotated[Linear | Convolution | WeightOnly, Field(discriminator="function")]] = (
            Field(min_length=1)
        )

    class WithoutInt4(Present):
        embeddings: dict[str, Literal["bf16", "int8"]]

    class StoredExperts(Strict):
        count: int = Field(ge=1, le=1 << 16)
        projections: list[Literal["gate_up_proj", "up_proj", "down_proj"]] = Field(min_length=1, max_length=2)

    class WithExperts(WithoutInt4):
        experts: dict[str, StoredExperts] = Field(min_length=1)

    class StoredTable(Strict):
        bits: Literal[4]
        group: Literal[32, 64]

    class WithInt4(Present):
        experts: dict[str, StoredExperts]
        embeddings: dict[str, Literal["bf16", "int8"] | StoredTable]

    class StoredWidths(Strict):
        widths: list[Annotated[int, Field(ge=1, le=MOST_BITS)]] = Field(min_length=2, max_length=MOST_BITS)
        inputs: bool

    class LinearOfWidths(Linear):
        nested: StoredWidths | None

    class ConvolutionOfWidths(Convolution):
        nested: StoredWidths | None

    class WeightOnlyOfOne(WeightOnly):
        nested: None

    class WithWidths(Common):
        quant_method: str
        layers: dict[
            str,
            Annotated[
                LinearOfWidths | ConvolutionOfWidths | WeightOnlyOfOne, Field(discriminator="function")
            ],
        ] = Field(min_length=1)
        experts: dict[str, StoredExperts]
        embeddings: dict[str, Literal["bf16", "int8"] | StoredTable]
        files: dict[Annotated[str, Field(pattern=FILE_OF_WIDTHS)], StoredFile]  # type: ignore[assignment]

    # Annotations are strings here, and these names are of this function.
    for each in (
        FormerLayer,
        Linear,
        Convolution,
        WeightOnly,
        FormerQuantization,
        Former,
        Present,
        WithoutInt4,
        WithExperts,
        WithInt4,
        LinearOfWidths,
        ConvolutionOfWidths,
        WeightOnlyOfOne,
        WithWidths,
        Common,
        Coded,
    ):
        each.model_rebuild(_types_namespace={**globals(), **locals()})
    kinds = {_FORMER: Former, _PRESENT: WithoutInt4, _EXPERTS: WithExperts, _INT4: WithInt4}
    return {**kinds, _WIDTHS: WithWidths}[kind]
