"""Each operation of Bellbox in a graph becomes standard operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bellbox.errors import BellboxError
from bellbox.interop.onnx import layers, tables
from bellbox.interop.onnx.graph import Builder
from bellbox.interop.onnx.placeholders import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

_FLOAT, _OTHER_FLOATS = 1, (10, 11, 16)  # of ONNX's data types
RULES: dict[str, Callable[[Builder, list[ir.Value | None], dict[str, Any]], ir.Value]] = {
    "packed_linear": layers.packed_linear,
    "packed_conv2d": layers.packed_conv2d,
    "int8_linear": tables.int8_linear,
    "int4_linear": tables.int4_linear,
    "int4_rows": tables.int4_rows,
    "bf16_linear": tables.bf16_linear,
    "rms_norm": tables.rms_norm,
    "rotate": tables.rotate,
    "weight_only": tables.weight_only,
}
_WEIGHT = 1
"""Where a node's weight stands among its inputs; layers are named after it."""


def lower(graph: ir.Graph, builder: Builder) -> None:
    """Replace all nodes of the domain `bellbox`, in place.

    Raises:
        BellboxError: a layer that does not compute in fp32, or that the options cannot hold.
    """
    for number, node in enumerate(list(graph)):
        if node.domain != DOMAIN:
            continue
        numbers = {name: attribute.value for name, attribute in node.attributes.items()}
        builder.name = _layer_of(node, number)
        x = node.inputs[0]
        if numbers.get("dtype", _FLOAT) != _FLOAT or (x is not None and x.dtype in _OTHER_FLOATS):
            raise BellboxError(
                f"{builder.name}: does not compute in fp32, and onnxruntime has no bf16 or fp16 on a CPU; export "
                "model.float()"
            )
        builder.nodes = []
        out = RULES[node.op_type](builder, list(node.inputs), numbers)
        builder.ir.convenience.replace_nodes_and_values(
            graph, node, [node], builder.nodes, node.outputs, [out]
        )


def _layer_of(node: ir.Node, number: int) -> str:
    weight = node.inputs[_WEIGHT] if len(node.inputs) > _WEIGHT else None
    if weight is None or weight.name is None:
        return f"{node.op_type}_{number}"
    return weight.name.rpartition(".")[0]
