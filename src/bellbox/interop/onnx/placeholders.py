"""Operations of Bellbox in an exported graph: one node each, in a domain of their own, until `lower` replaces them.

torch's exporter asks for a translation while the numbers of the weights are not there yet. So each operation first
becomes one node that has the names of its schema; afterwards its weights are constants that can be looked at.
Modules that compute with plain torch operations on packed bytes (weight-only layers, bf16 heads) say `symbolic` while
they are exported: their bytes would otherwise be decoded into the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.errors import require
from bellbox.nn import WeightOnlyMatrix
from bellbox.nn.compact import CompactEmbedding, CompactLinear
from bellbox.ops import int4_linear, int8_linear, packed_conv2d, packed_linear, rms_norm, rotate
from bellbox.ops.dispatch import Operation
from bellbox.quantizers.base import rotate_vectors

DOMAIN = "bellbox"
OPERATIONS: tuple[Operation, ...] = (
    packed_linear.operation,
    packed_conv2d.operation,
    int8_linear.operation,
    int4_linear.operation,
    rms_norm.operation,
    rotate.rotate,
)
"""Those that `lower` has a rule for."""


def translations() -> dict[Any, Callable[..., Any]]:
    """The table for `torch.onnx.export(custom_translation_table=...)`."""
    return {each.call: _placeholder(each.call._schema) for each in OPERATIONS}  # pyright: ignore[reportFunctionMemberAccess]


def _placeholder(schema: Any) -> Callable[..., Any]:
    """A translation to one node: tensors of the schema are its inputs, all else its attributes."""
    onnxscript, defs = require("onnxscript", "onnx"), require("onnx.defs", "onnx")
    kinds, options = defs.OpSchema.AttrType, defs.OpSchema.FormalParameterOption
    kind_of = {"float": kinds.FLOAT, "str": kinds.STRING, "List[int]": kinds.INTS}
    inputs, attributes, constraints = [], [], [("T", ["tensor(float)"], "")]
    for argument in schema.arguments:
        kind = str(argument.type)
        if "Tensor" in kind:
            option = options.Optional if "Optional" in kind else options.Single
            inputs.append(
                defs.OpSchema.FormalParameter(argument.name, f"T{len(inputs)}", "", param_option=option)
            )
            constraints.append((f"T{len(inputs) - 1}", ["tensor(float)"], ""))
        else:
            given = kind_of.get(kind, kinds.INT)
            attributes.append(defs.OpSchema.Attribute(argument.name, given, "", required=False))
    name = schema.name.split("::")[1]
    node = onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        name,
        defs.OpSchema(
            name,
            DOMAIN,
            1,
            inputs=inputs,
            outputs=[defs.OpSchema.FormalParameter("y", "T")],
            attributes=attributes,
            type_constraints=constraints,
        ),
    )

    def translate(*arguments: Any) -> Any:
        tensors, numbers = [], {}
        for argument, value in zip(schema.arguments, arguments, strict=True):
            if "Tensor" in str(argument.type):
                tensors.append(value)
            else:
                numbers[argument.name] = int(value) if isinstance(value, bool) else value
        return node(*tensors, **numbers)

    return translate


def _symbolic(
    name: str, x: Tensor, tensors: tuple[Tensor | None, ...], shape: tuple[int, ...], **numbers: Any
) -> Tensor:
    made = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", (x, *tensors), numbers, dtype=torch.float32, shape=shape, version=1
    )
    assert isinstance(made, Tensor)
    return made


def _weight_only(layer: WeightOnlyMatrix, x: Tensor) -> Tensor:
    x = x if layer.act_signs is None else x * layer.act_signs
    tensors = layer.packed, layer.weight_scale, layer.weight_table, layer.bias
    numbers = {"columns": layer.row_length, "levels": layer.weight_levels.n}
    offset = layer.weight_levels.offset
    rotated = rotate_vectors(x, layer.block)
    return _symbolic(
        "weight_only", rotated, tensors, (*x.shape[:-1], layer.row_count), offset=offset, **numbers
    )


def _bf16_head(layer: CompactLinear, x: Tensor) -> Tensor:
    return _symbolic("bf16_linear", x, (layer.weight, layer.bias), (*x.shape[:-1], layer.rows))


def _int4_rows(layer: CompactEmbedding, ids: Tensor) -> Tensor:
    tensors = layer.weight, layer.multipliers, layer.scale
    return _symbolic("int4_rows", ids, tensors, (*ids.shape, layer.columns))


@contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """While open, modules that decode bytes in their forward are one node of an exported graph."""
    changed = []
    for module in model.modules():
        if isinstance(module, WeightOnlyMatrix):
            forward = partial(_weight_only, module)
        elif isinstance(module, CompactEmbedding) and module.multipliers is not None:
            forward = partial(_int4_rows, module)
        elif isinstance(module, CompactLinear) and module.coding is None:
            forward = partial(_bf16_head, module)
        else:
            continue
        if "forward" not in vars(module):  # the user's own stays theirs
            vars(module)["forward"] = forward
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]
