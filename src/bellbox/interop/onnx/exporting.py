"""`export`: a packed model as an ONNX file of standard operators."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bellbox.convert import convert
from bellbox.errors import BellboxError, require
from bellbox.interop.onnx import decoder
from bellbox.interop.onnx.graph import WEIGHT_TYPES, Builder
from bellbox.interop.onnx.lower import lower
from bellbox.interop.onnx.placeholders import DOMAIN, exportable, translations
from bellbox.models import GPT, Llama, ResNet, ViT
from bellbox.nn import PackedExperts, QuantizedLayer
from bellbox.nn.binarized_linear import BinarizedLinear
from bellbox.nn.quantized_table import QuantizedTable
from bellbox.utils.files import new_file, one_line, refuse_target
from bellbox.version import __version__

Weights = Literal["int2", "int4", "int8"]
CODED = "bellbox.coded"
"""Key of the file's metadata: by the name of its layer, for each coded input the value, then that of its codes or,
where the layer is one node, of its output, then which of the two."""
_OLDEST, _NEWEST = 18, 25
_ONE_FILE = 2_000_000_000
"""Bytes of constants that a file may hold; protocol buffers end at 2 GiB."""
_IR_VERSIONS = {25: 13, 23: 11, 21: 10, 18: 8}
"""The first version of the file format that an opset belongs to."""


@dataclass(frozen=True)
class Call:
    """How the graph is called; the fields are arguments of `export`."""

    example_inputs: tuple[Any, ...]
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    dynamic_shapes: Any = None


@dataclass(frozen=True)
class Kind:
    """What kind of file is written; the fields are arguments of `export`."""

    weights: Weights
    opset: int | None
    custom_op: bool

    @property
    def opset_or_oldest(self) -> int:
        """The opset that was asked for, or the oldest one that has these weights."""
        return WEIGHT_TYPES.get(self.weights, 0) if self.opset is None else self.opset


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    weights: Weights = "int2",
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    metadata: Mapping[str, str] | None = None,
    custom_op: bool = False,
) -> None:
    """Write a model as an ONNX file that any runtime with the standard operators computes.

    Codes are the model's own, integers are multiplied exactly. What is not packed (norms, attention, full-precision
    layers) is translated by torch's exporter, and rounds as the runtime does.

    Args:
        model: packed, or prepared (then its packed form is written; the model itself stays). Evaluation mode is set
            while it is exported. It is exported for the CPU, in fp32.
        example_inputs: arguments of one forward.
        path: the file. Constants beyond 2 GB go into `path` + ".data".
        weights: the narrowest type that weights are stored in. int2 needs opset 25 (onnxruntime 1.32 reads it), int4
            opset 21, int8 opset 18. The function is the same.
        opset: of the operators, 18 to 25; the oldest one that has `weights` where None.
        input_names: of the file's inputs; the names of the arguments where None.
        output_names: of its outputs.
        dynamic_shapes: as `torch.onnx.export`; where None, the first axis of each tensor may have any length.
        metadata: further properties of the file.
        custom_op: packed linear layers become the operator `bellbox::PackedLinear`, so that a session needs the
            library of native/onnx (docs/interop.md). Layers that it does not compute stay standard operators.

    Raises:
        BellboxError: a missing extra, an opset too old for `weights`, a layer that cannot be exported, or a path that
            cannot be written. Nothing is written then.
    """
    call = Call(example_inputs, input_names, output_names, dynamic_shapes)
    _export(model, call, Kind(weights, opset, custom_op), Path(path), metadata)


def _export(model: nn.Module, call: Call, kind: Kind, path: Path, metadata: Mapping[str, str] | None) -> None:
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    _check(kind.weights, kind.opset_or_oldest)
    refuse_target(path)
    made = _in_standard_operators(_packed(model), call, kind)
    made.metadata_props.update(metadata or {})
    _write(made, path)


def _check(weights: str, opset: int) -> None:
    if weights not in WEIGHT_TYPES:
        raise BellboxError(f"weights can be {', '.join(WEIGHT_TYPES)}, not {weights!r}")
    if type(opset) is not int or not _OLDEST <= opset <= _NEWEST:
        raise BellboxError(f"opset {opset}: exports have one from {_OLDEST} to {_NEWEST}")
    if opset < WEIGHT_TYPES[weights]:
        fitting = next(kind for kind, first in WEIGHT_TYPES.items() if first <= opset)
        raise BellboxError(
            f"opset {opset} has no {weights.upper()} tensors for the weights: take opset {WEIGHT_TYPES[weights]}, or "
            f"{fitting} weights"
        )


def _packed(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, BinarizedLinear | PackedExperts):
            kind = "binarized layers" if isinstance(module, BinarizedLinear) else "mixtures of experts"
            raise BellboxError(
                f"{name or 'the model'}: {kind} cannot be exported to ONNX; use the model with Bellbox"
            )
    if any(isinstance(module, QuantizedLayer | QuantizedTable) for module in model.modules()):
        return convert(model)
    return model


def _in_standard_operators(model: nn.Module, call: Call, kind: Kind) -> Any:
    opset = kind.opset_or_oldest
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise BellboxError(f"{name}: is on {tensor.device}; export model.cpu()")
    shapes = _first_axes(call.example_inputs) if call.dynamic_shapes is None else call.dynamic_shapes
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), exportable(model.eval()), _quiet():
            program = torch.onnx.export(
                model,
                call.example_inputs,
                dynamo=True,
                verbose=False,
                optimize=True,
                opset_version=opset,
                input_names=call.input_names,
                output_names=call.output_names,
                dynamic_shapes=shapes,
                custom_translation_table=translations(),
            )
    except BellboxError:
        raise
    except Exception as error:  # the exporter raises whatever went wrong inside it
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise BellboxError(
            f"the model cannot be exported to ONNX: {one_line(cause)} (torch.export must be able to trace it)"
        ) from error
    finally:
        for module in training:
            module.training = True
    assert program is not None
    made = program.model
    if (given := made.opset_imports.get("", 0)) != opset:
        raise BellboxError(f"torch wrote opset {given} where {opset} was asked for; take opset {given}")
    builder = Builder(made.graph, opset, kind.weights, kind.custom_op)
    lower(made.graph, builder)
    _clean(made, opset, {DOMAIN} if kind.custom_op else set())
    where = {
        name: [x.name, seen.name, "output" if getattr(seen.producer(), "domain", "") else "codes"]
        for name, (x, seen) in builder.coded.items()
    }
    made.metadata_props[CODED] = json.dumps(where)
    return made


def _first_axes(example: tuple[Any, ...]) -> tuple[Any, ...]:
    auto = torch.export.Dim.AUTO
    return tuple({0: auto} if isinstance(each, Tensor) and each.dim() else None for each in example)


def _clean(model: Any, opset: int, domains: set[str]) -> None:
    """Drop what nothing uses, and where in somebody's source each node came from."""
    passes = require("onnx_ir.passes.common", "onnx")
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    left = sorted({node.domain for node in model.graph if node.domain} - domains)
    if left:
        raise BellboxError(f"the model needs operators of {', '.join(left)}, which no runtime has")
    model.producer_name, model.producer_version = "bellbox", __version__
    model.ir_version = next(version for first, version in _IR_VERSIONS.items() if opset >= first)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter tells of its own affairs (an absent torchvision, deprecated calls of its own)."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write(model: Any, path: Path) -> None:
    onnx_ir = require("onnx_ir", "onnx")
    constants: Mapping[str, Any] = model.graph.initializers
    size = sum(value.const_value.nbytes for value in constants.values() if value.const_value is not None)
    try:
        if size < _ONE_FILE:
            with new_file(path) as temporary:
                onnx_ir.save(model, temporary)
            return
        data = path.with_name(path.name + ".data")
        refuse_target(data)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            onnx_ir.save(model, Path(folder) / path.name, external_data=data.name)
            (Path(folder) / data.name).replace(data)
            (Path(folder) / path.name).replace(path)
    except OSError as error:
        raise BellboxError(f"{path}: cannot be written ({error.strerror})") from None


def export_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    weights: Weights = "int2",
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
    custom_op: bool = False,
) -> None:
    """`export` of a model of `bellbox.models`: LLaMA and GPT with their KV cache (`decoder`), ResNet and ViT.

    Args:
        model: packed or prepared. With `exact_attention` its attention and activations are computed in float64.
        path: the file.
        weights: see `export`.
        opset: see `export`.
        metadata: see `export`.
        custom_op: see `export`.

    Raises:
        BellboxError: another model, or as `export`.
    """
    kind = Kind(weights, opset, custom_op)
    if isinstance(model, Llama | GPT):
        packed: Any = _packed(model)
        call = Call(decoder.example(model), *decoder.names(model.config.num_hidden_layers))
        _export(decoder.Decoder(packed), call, kind, Path(path), metadata)
    elif isinstance(model, ResNet | ViT):
        size = model.config.image_size or 32
        image = torch.zeros(2, model.config.num_channels, size, size)
        axes = {0: "batch"} if isinstance(model, ViT) else {0: "batch", 2: "height", 3: "width"}
        _export(model, Call((image,), ["images"], ["logits"], (axes,)), kind, Path(path), metadata)
    else:
        raise BellboxError(
            f"{type(model).__name__} is none of LLaMA, GPT, ResNet and ViT of bellbox.models: give an example input to "
            "bellbox.interop.onnx.export"
        )
