"""Writing standard ONNX operators in the place of a node: what every rule of `lower` is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bellbox.errors import BellboxError, require

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHT_TYPES = {"int2": 25, "int4": 21, "int8": 18}
"""The narrowest type that weights may be stored in, and the first opset that has it."""


class Builder:
    """Nodes that follow one another, and constants of the graph that they use.

    Args:
        graph: that takes the constants.
        opset: of the model.
        weights: the narrowest type that weights are stored in.
        custom_op: whether packed linear layers may be the operator of native/onnx.
    """

    def __init__(self, graph: ir.Graph, opset: int, weights: str, custom_op: bool = False) -> None:
        self.ir: Any = require("onnx_ir", "onnx")
        self.graph, self.opset, self.weights, self.custom_op = graph, opset, weights, custom_op
        self.nodes: list[ir.Node] = []
        self.name = ""
        """What the names of new values begin with."""
        self.memo: dict[Any, Any] = {}
        """What nodes of one layer share with those of another: coded inputs, weights."""
        self.coded: dict[str, tuple[ir.Value, ir.Value]] = {}
        """By the name of the first layer that reads it, each coded input and its codes; of a layer that is the custom
        operator, which shows no codes, its input and its output."""
        self._constants: dict[Any, ir.Value] = {}
        self._count = 0
        self._taken: set[str | None] = {value.name for node in graph for value in node.outputs}
        self._taken |= {*graph.initializers, *(value.name for value in graph.inputs)}

    def unique(self, name: str) -> str:
        """A name of the layer's that no value of the graph has."""
        full = name = f"{self.name}.{name}" if self.name else name
        while full in self._taken:
            self._count += 1
            full = f"{name}.{self._count}"
        self._taken.add(full)
        return full

    def _short(self) -> str:
        """A name for what nobody looks at: long ones are half the file of a small model."""
        while True:
            self._count += 1
            if (name := f"v{self._count}") not in self._taken:
                return name

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """One more node with one output."""
        return self.ops(kind, *inputs, outputs=1, name=name, domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: ir.Value | None,
        outputs: int,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """One more node."""
        node = self.ir.node(kind, list(inputs), attributes, num_outputs=outputs, domain=domain)
        for value in node.outputs:
            value.name = self._short() if name is None else self.unique(name)
        self.nodes.append(node)
        return list(node.outputs)

    def cast(self, value: ir.Value, to: str) -> ir.Value:
        """`value` as FLOAT, DOUBLE, INT8, ..."""
        return self.op("Cast", value, to=self.ir.DataType[to].value)

    def constant(self, value: Any, dtype: Any) -> ir.Value:
        """A constant that all who ask for these numbers share."""
        array = np.asarray(value, dtype)
        key = array.tobytes(), array.shape, array.dtype.str
        if key not in self._constants:
            layer, self.name = self.name, ""
            self._constants[key] = self.initializer(self.unique("constant"), self.ir.tensor(array))
            self.name = layer
        return self._constants[key]

    def initializer(self, name: str, tensor: Any) -> ir.Value:
        """A constant of its own, under exactly this name."""
        tensor.name = name
        value = self.ir.Value(
            name=name,
            shape=self.ir.Shape(tensor.shape),
            type=self.ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def small_integers(self, name: str, array: np.ndarray, width: int, signed: bool = True) -> ir.Value:
        """A constant of integers of 2, 4 or 8 bits, in the narrowest type that the options allow.

        Raises:
            BellboxError: the opset has no such type.
        """
        import ml_dtypes

        width = max(width, int(self.weights[3:]))
        kind = f"{'' if signed else 'u'}int{width}"
        first = WEIGHT_TYPES[f"int{width}"]
        if self.opset < first:
            raise BellboxError(
                f"opset {self.opset} has no {kind.upper()} tensors for the weights of {self.name}: take opset {first}, "
                "or wider weights (int4 from opset 21 on, int8 in any)"
            )
        return self.initializer(name, self.ir.tensor(array.astype(getattr(ml_dtypes, kind, kind))))


def numbers_of(value: ir.Value | None, what: str) -> np.ndarray | None:
    """The numbers of a constant; None of no value.

    Raises:
        BellboxError: they are computed in the graph.
    """
    if value is None:
        return None
    if value.const_value is None:
        raise BellboxError(
            f"{what}: its weights are not constants of the exported graph; export the packed model"
        )
    return value.const_value.numpy()
