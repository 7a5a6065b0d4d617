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
from bellbox.nn.compact import CompactEmbedding
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


def export_executorch(model: nn.Module, path: Path) -> Lowered:
    """Write a packed model as a program.

    A LLaMA or GPT takes tokens `[1, length]` int64 and gives logits `[1, length, vocabulary]` fp32; a ResNet or ViT
    takes an image `[1, channels, size, size]` fp32 in [0, 1] and gives logits `[1, labels]`.

    Args:
        model: packed, with a `config` of a kind of `bellbox.models`.
        path: of the `.pte` file.

    Raises:
        BellboxError: ExecuTorch is not installed, or the model has what the kernels do not run.
    """
    exir: Any = require("executorch.exir", "executorch")
    _define_outputs()
    example, shapes = _example(model)
    _refuse_groups(model)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _own_tables(model):
            warnings.simplefilter("ignore")
            program = torch.export.export(model.eval(), (example,), dynamic_shapes=shapes)
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


def _example(model: nn.Module) -> tuple[Tensor, Any]:
    """An input, and which of its sizes may be others."""
    config: Any = model.config
    if not hasattr(config, "max_position_embeddings"):
        return torch.zeros(image_shape(config)), None
    longest = torch.export.Dim("length", min=2, max=config.max_position_embeddings)
    return torch.zeros(1, min(8, config.max_position_embeddings), dtype=torch.int64), ({1: longest},)


class _Rows(nn.Module):
    """A rounded embedding whose rows one operation of ours reads, where tracing would show torch's own operations."""

    def __init__(self, table: CompactEmbedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return table_rows.operation.call(ids, *self.table.codes())


@contextmanager
def _own_tables(model: nn.Module) -> Iterator[None]:
    """While it lasts, rounded embeddings are `_Rows`."""
    found = [m for m in model.modules() if isinstance(m, CompactEmbedding) and m.coding is not None]
    swapped = [(table, _Rows(table)) for table in found]
    for table, rows in swapped:
        replace_layer(model, table, rows)
    try:
        yield
    finally:
        for table, rows in swapped:
            replace_layer(model, rows, table)


def _refuse_groups(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PackedConv) and module.geometry.groups > 1:
            raise BellboxError(
                f"{name}: a convolution of {module.geometry.groups} groups, which native/executorch has no kernel for"
            )


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
    model: nn.Module, path: Path, operators: Iterable[str], kernels: Path, samples: Iterable[Tensor]
) -> Agreement:
    """Run a program in ExecuTorch's runtime beside the model.

    Args:
        model: packed.
        path: the program.
        operators: that it needs (`Lowered.operators`).
        kernels: the library of `native/executorch`, which this process loads and keeps.
        samples: int64 `[1, length]` each, or fp32 images `[1, channels, size, size]`.

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
        found: Tensor = method.execute([sample])[0]
        difference = float((found - expected).abs().max() / expected.abs().max())
        chosen = expected.argmax(-1)
        count += 1
        same += int((found.argmax(-1) == chosen).sum())
        positions += chosen.numel()
        if difference <= _NEAR:
            near += 1
            largest = max(largest, difference)
    return Agreement(count, near, largest, same / max(positions, 1))
