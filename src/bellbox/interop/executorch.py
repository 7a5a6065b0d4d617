"""Packed language models as programs of ExecuTorch, which is PyTorch's own way onto devices.

The program has standard operators and four of Bellbox's (`native/executorch` has their kernels). So packed layers, RMS
norms and rounded heads keep their bits; attention, rotary positions and activations are ExecuTorch's own.
"""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError, require
from bellbox.ops import int4_linear, int8_linear, packed_linear, rms_norm
from bellbox.utils.files import new_file, one_line

_OPERATIONS = (packed_linear.operation, rms_norm.operation, int8_linear.operation, int4_linear.operation)
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

    sequences: int
    near: int
    """Sequences all of whose logits are within 1e-5 of the largest."""
    difference: float
    """The largest one of those, relative."""
    same_token: float
    """Share of positions whose likeliest token is the same, of all sequences."""

    @property
    def holds(self) -> bool:
        """Whether it is the same function but for codes that lie on a threshold."""
        return 2 * self.near >= self.sequences


def export_executorch(model: nn.Module, path: Path) -> Lowered:
    """Write a packed LLaMA or GPT as a program: tokens `[1, length]` int64 to logits `[1, length, vocabulary]` fp32.

    Args:
        model: packed, with `config.max_position_embeddings`.
        path: of the `.pte` file.

    Raises:
        BellboxError: ExecuTorch is not installed, or the model has what the kernels do not run.
    """
    exir: Any = require("executorch.exir", "executorch")
    _define_outputs()
    config: Any = model.config
    longest = torch.export.Dim("length", min=2, max=config.max_position_embeddings)
    example = torch.zeros(1, min(8, config.max_position_embeddings), dtype=torch.int64)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model.eval(), (example,), dynamic_shapes=({1: longest},))
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
    model: nn.Module, path: Path, operators: Iterable[str], kernels: Path, sequences: Iterable[Tensor]
) -> Agreement:
    """Run a program in ExecuTorch's runtime beside the model.

    Args:
        model: packed.
        path: the program.
        operators: that it needs (`Lowered.operators`).
        kernels: the library of `native/executorch`, which this process loads and keeps.
        sequences: int64 `[1, length]` each.

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
    for ids in sequences:
        with torch.no_grad():
            expected: Tensor = model(ids)
        found: Tensor = method.execute([ids])[0]
        difference = float((found - expected).abs().max() / expected.abs().max())
        count += 1
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        positions += ids.numel()
        if difference <= _NEAR:
            near += 1
            largest = max(largest, difference)
    return Agreement(count, near, largest, same / max(positions, 1))
