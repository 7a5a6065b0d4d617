"""Packed models as programs of ExecuTorch, which is PyTorch's own way onto devices.

The program has standard operators and six of Bellbox's (`native/executorch` has their kernels). So packed layers, RMS
norms, rounded embeddings and heads keep their bits; attention, rotary positions, activations and what is in full
precision are ExecuTorch's own.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError, require
from bellbox.inference.fixed import forward_at
from bellbox.nn.coded import CodedLayer
from bellbox.nn.compact import CompactEmbedding
from bellbox.nn.packed import PackedLayer
from bellbox.nn.packed_conv import PackedConv
from bellbox.nn.tools import replace_layer
from bellbox.ops import int4_linear, int8_linear, packed_conv2d, packed_linear, rms_norm, table_rows
from bellbox.utils.files import new_file, one_line

_OPERATIONS = tuple(
    each.operation for each in (packed_linear, packed_conv2d, table_rows, rms_norm, int8_linear, int4_linear)
)
_NEAR = 1e-5
"""Relative to the largest logit: what other sums make of it, where no code moved."""


@dataclass(frozen=True)
class Lowered:
    """What was written."""

    bytes: int
    """Of the program."""
    operators: tuple[str, ...]
    """That a runtime must have, ours included."""


@dataclass(frozen=True)
class Agreement:
    """ExecuTorch's runtime against the packed model."""

    samples: int
    """Sequences, or images."""
    near: int
    """Samples all of whose logits are within 1e-5 of the largest."""
    difference: float
    """The largest one of those, relative."""
    same_choice: float
    """Share of positions whose likeliest token is the same, or of images whose likeliest class is."""

    @property
    def holds(self) -> bool:
        """Whether it is the same function but for codes that lie on a threshold."""
        return 2 * self.near >= self.samples


def export_executorch(model: nn.Module, path: Path, *, cache: bool = False) -> Lowered:
    """Write a packed model as a program.

    A LLaMA or GPT takes tokens `[1, length]` int64 and gives logits `[1, length, vocabulary]` fp32; a ResNet or ViT
    takes an image `[1, channels, size, size]` fp32 in [0, 1] and gives logits `[1, labels]`.

    Args:
        model: packed, with a `config` of a kind of `bellbox.models`.
        path: of the `.pte` file.
        cache: of a language model, keep keys and values in the program's own memory. It then takes a second input, the
            place of the first of these tokens in the text, int64 `[1]`; a text begins at 0.

    Raises:
        BellboxError: ExecuTorch is not installed, or the model has what the kernels do not run.
    """
    exir: Any = require("executorch.exir", "executorch")
    _define_outputs()
    inputs, shapes = _example(model, cache)
    _refuse_layers(model)
    whole = _Continued(model) if cache else model
    try:
        with torch.no_grad(), warnings.catch_warnings(), _lowerable(model):
            warnings.simplefilter("ignore")
            program = torch.export.export(whole.eval(), inputs, dynamic_shapes=shapes)
            _refuse_others(program)
            # Operations of our own are not in the list of those that its verifier knows.
            edge = exir.to_edge(program, compile_config=exir.EdgeCompileConfig(_check_ir_validity=False))
            made = edge.to_executorch(exir.ExecutorchBackendConfig())
    except BellboxError:
        raise
    except Exception as error:  # the exporter raises whatever went wrong inside it
        raise BellboxError(f"the model cannot be exported to ExecuTorch: {one_line(error)}") from error
    try:
        with new_file(path) as temporary:
            temporary.write_bytes(made.buffer)
    except OSError as error:
        raise BellboxError(f"{path}: cannot be written ({error.strerror})") from None
    plan = made.executorch_program.execution_plan[0]
    names = (f"{each.name}.{each.overload}" if each.overload else each.name for each in plan.operators)
    return Lowered(len(made.buffer), tuple(sorted(names)))


def image_shape(config: Any) -> tuple[int, int, int, int]:
    """`[1, channels, size, size]` of a vision model's images.

    Raises:
        BellboxError: it takes images of any size, and a program has one.
    """
    size = getattr(config, "image_size", None)
    if not size:
        raise BellboxError("a program takes images of one size, and the model's config.json names none")
    return 1, config.num_channels, size, size


def _example(model: nn.Module, cache: bool) -> tuple[tuple[Tensor, ...], Any]:
    """Inputs, and which of their sizes may be others."""
    config: Any = model.config
    if not hasattr(config, "max_position_embeddings"):
        if cache:
            raise BellboxError("a cache is of language models, and this one takes images")
        return (torch.zeros(image_shape(config)),), None
    longest = torch.export.Dim("length", min=1 if cache else 2, max=config.max_position_embeddings)
    ids = torch.zeros(1, min(8, config.max_position_embeddings), dtype=torch.int64)
    if cache:
        return (ids, torch.zeros(1, dtype=torch.int64)), ({1: longest}, None)
    return (ids,), ({1: longest},)


class _Continued(nn.Module):
    """A language model and the keys and values of its whole context."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, config = model, model.config
        shape = 1, config.key_value_heads, config.max_position_embeddings, config.head_size
        self._blocks: int = config.num_hidden_layers
        for block in range(self._blocks):
            self.register_buffer(f"keys_{block}", torch.zeros(shape))
            self.register_buffer(f"values_{block}", torch.zeros(shape))

    def forward(self, input_ids: Tensor, first: Tensor) -> Tensor:
        places = first + torch.arange(input_ids.shape[1])
        keys, values = (
            [getattr(self, f"{kind}_{block}") for block in range(self._blocks)] for kind in ("keys", "values")
        )
        return forward_at(self.model, input_ids, places, keys, values)


class _Rows(nn.Module):
    """A rounded embedding whose rows one operation of ours reads, where tracing would show torch's own operations."""

    def __init__(self, table: CompactEmbedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return table_rows.operation.call(ids, *self.table.codes())


class _InOrder(nn.Module):
    """A batch norm of an image that lies channel by channel, the one order that ExecuTorch's takes."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.contiguous())


@contextmanager
def _lowerable(model: nn.Module) -> Iterator[None]:
    """While it lasts, rounded embeddings are `_Rows` and batch norms `_InOrder`."""
    swapped: list[tuple[nn.Module, nn.Module]] = []
    for module in list(model.modules()):
        if isinstance(module, CompactEmbedding) and module.coding is not None:
            swapped.append((module, _Rows(module)))
        elif isinstance(module, nn.BatchNorm2d):
            swapped.append((module, _InOrder(module)))
    for module, other in swapped:
        replace_layer(model, module, other)
    try:
        yield
    finally:
        for module, other in swapped:
            replace_layer(model, other, module)


def _refuse_layers(model: nn.Module) -> None:
    """What would be lowered, and then run nowhere."""
    for name, module in model.named_modules():
        lacking = None
        if isinstance(module, CodedLayer) and not isinstance(module, PackedLayer):
            lacking = "a layer of low-bit weights alone (weight_only)"
        elif isinstance(module, PackedLayer) and module.act_signs is not None:
            lacking = "random signs before its rotation"
        elif isinstance(module, PackedConv) and module.geometry.groups > 1:
            lacking = f"a convolution of {module.geometry.groups} groups"
        if lacking is not None:
            raise BellboxError(f"{name} is or has {lacking}, which native/executorch has no kernel for")


@cache
def _define_outputs() -> torch.library.Library:
    """For each of our operations the form that writes into memory of its caller's, which ExecuTorch's programs call."""
    library = torch.library.Library("bellbox", "FRAGMENT")
    for each in _OPERATIONS:
        inputs = re.fullmatch(r"bellbox::(\w+)\((.*)\) -> Tensor", str(each.call._schema))  # pyright: ignore[reportFunctionMemberAccess]
        assert inputs is not None
        library.define(f"{inputs[1]}.out({inputs[2]}, *, Tensor(a!) out) -> Tensor(a!)")
    return library


def _refuse_others(program: Any) -> None:
    ours = {f"bellbox.{each.name}.default" for each in _OPERATIONS}
    found = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("bellbox.")}
    if found - ours:
        names = ", ".join(sorted(name.split(".")[1] for name in found - ours))
        raise BellboxError(f"the model needs {names}, which native/executorch has no kernels for")


def agreement(
    model: nn.Module,
    path: Path,
    operators: Iterable[str],
    kernels: Path,
    samples: Iterable[Tensor],
    *,
    cache: bool = False,
) -> Agreement:
    """Run a program in ExecuTorch's runtime beside the model.

    Args:
        model: packed.
        path: the program.
        operators: that it needs (`Lowered.operators`).
        kernels: the library of `native/executorch`, which this process loads and keeps.
        samples: int64 `[1, length]` each, or fp32 images `[1, channels, size, size]`.
        cache: whether the program has one. Half of a sequence is then given at once, the rest token by token.

    Raises:
        BellboxError: ExecuTorch is not installed, its runtime lacks an operator, or the kernels cannot be loaded.
    """
    runtime: Any = require("executorch.runtime", "executorch").Runtime.get()
    if "bellbox::packed_linear.out" not in runtime.operator_registry.operator_names:
        try:
            ctypes.CDLL(str(kernels.resolve()))
        except OSError as error:
            raise BellboxError(f"{kernels}: cannot be loaded: {one_line(error)}") from None
    if "bellbox::packed_linear.out" not in runtime.operator_registry.operator_names:
        raise BellboxError(f"{kernels}: registers no kernels of Bellbox; build it with make executorch")
    lacking = sorted(set(operators) - runtime.operator_registry.operator_names)
    if lacking:
        raise BellboxError(f"ExecuTorch's runtime here has no {', '.join(lacking)}, which the program needs")
    method = runtime.load_program(path).load_method("forward")
    count = near = same = positions = 0
    largest = 0.0
    for sample in samples:
        with torch.no_grad():
            expected: Tensor = model(sample)
        found = _continued(method, sample) if cache else method.execute([sample])[0]
        difference = float((found - expected).abs().max() / expected.abs().max())
        chosen = expected.argmax(-1)
        count += 1
        same += int((found.argmax(-1) == chosen).sum())
        positions += chosen.numel()
        if difference <= _NEAR:
            near += 1
            largest = max(largest, difference)
    return Agreement(count, near, largest, same / max(positions, 1))


def _continued(method: Any, ids: Tensor) -> Tensor:
    """Logits `[1, length, vocabulary]`, the first half of the tokens at once."""
    half = max(ids.shape[1] // 2, 1)
    parts = [ids[:, :half], *ids[:, half:].split(1, 1)]
    places = [0, *range(half, ids.shape[1])]
    return torch.cat(
        [
            method.execute([part.contiguous(), torch.tensor([place])])[0].clone()
            for part, place in zip(parts, places, strict=True)
        ],
        1,
    )
