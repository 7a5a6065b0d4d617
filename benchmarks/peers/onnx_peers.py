"""onnxruntime: a float product, its int8 product, and its 4- and 2-bit weights at accuracy level 4 (int8 inside)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

BLOCK = 128


def contenders(x: Tensor, outputs: int, copies: Any) -> dict[str, Any]:
    values = x.float().numpy()
    count = outputs * x.shape[1]
    found = {
        "onnxruntime fp32": (fp32, 4 * count),
        "onnxruntime MatMulInteger, product alone": (int8, count),
        "onnxruntime MatMulNBits 4 bits": (lambda n, k: bits(n, k, 4), count // 2),
        "onnxruntime MatMulNBits 2 bits": (lambda n, k: bits(n, k, 2), count // 4),
    }
    return {name: contender(values, make, outputs, nbytes, copies) for name, (make, nbytes) in found.items()}


def contender(values: np.ndarray, make: Any, outputs: int, nbytes: int, copies: Any) -> Any:
    sessions = copies(lambda: session(make(outputs, values.shape[1])), nbytes)
    wanted = sessions[0].get_inputs()[0].type
    if wanted == "tensor(uint8)":
        values = np.random.default_rng(0).integers(0, 255, values.shape).astype(np.uint8)

    def run(turn: int) -> Any:
        return sessions[turn % len(sessions)].run(None, {"x": values})

    return run, nbytes


def session(model: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def model_of(node: Any, weights: dict[str, np.ndarray], x_type: int, y_type: int) -> Any:
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", x_type, ["rows", "inputs"])],
        [helper.make_tensor_value_info("y", y_type, ["rows", "outputs"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def fp32(outputs: int, inputs: int) -> Any:
    weight = np.random.default_rng(0).standard_normal((inputs, outputs), dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return model_of(node, {"w": weight}, TensorProto.FLOAT, TensorProto.FLOAT)


def int8(outputs: int, inputs: int) -> Any:
    weight = np.random.default_rng(0).integers(-127, 127, (inputs, outputs)).astype(np.int8)
    zeros = {"xz": np.array(128, np.uint8), "wz": np.array(0, np.int8)}
    node = helper.make_node("MatMulInteger", ["x", "w", "xz", "wz"], ["y"])
    return model_of(node, {"w": weight, **zeros}, TensorProto.UINT8, TensorProto.INT32)


def bits(outputs: int, inputs: int, width: int) -> Any:
    random = np.random.default_rng(0)
    blocks = inputs // BLOCK
    weight = random.integers(0, 255, (outputs, blocks, BLOCK * width // 8)).astype(np.uint8)
    scale = random.random(outputs * blocks, dtype=np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=width,
        block_size=BLOCK,
        accuracy_level=4,
    )
    return model_of(node, {"w": weight, "s": scale}, TensorProto.FLOAT, TensorProto.FLOAT)
