"""bitsandbytes' NF4 layer, and OpenVINO with 4-bit weights in groups of 128 and 8-bit activations inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def bitsandbytes_nf4(x: Tensor, outputs: int, copies: Any) -> dict[str, Any]:
    import bitsandbytes

    inputs = x.shape[1]

    def make() -> Any:
        layer = bitsandbytes.nn.Linear4bit(
            inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        return layer.to("cpu").eval()

    layers = copies(make, outputs * inputs // 2)
    return {"bitsandbytes NF4": (lambda turn: layers[turn % len(layers)](x), outputs * inputs // 2)}


def openvino_int4(x: Tensor, outputs: int, copies: Any) -> dict[str, Any]:
    import openvino
    from openvino import opset13 as ops

    rows, inputs = x.shape
    values = x.float().numpy()
    group = 128
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        "INFERENCE_PRECISION_HINT": "f32",
    }

    def make() -> Any:
        random = np.random.default_rng(0)
        raw = random.integers(0, 255, outputs * inputs // 2).astype(np.uint8)
        shape = [outputs, inputs // group, group]
        codes = openvino.Tensor(raw, shape, openvino.Type.u4)
        weight = ops.convert(ops.constant(codes), np.float16)
        weight = ops.subtract(weight, ops.constant(np.full([outputs, inputs // group, 1], 8, np.float16)))
        scale = random.random([outputs, inputs // group, 1]).astype(np.float16)
        weight = ops.multiply(weight, ops.constant(scale))
        weight = ops.convert(ops.reshape(weight, [outputs, inputs], False), np.float32)
        entry = ops.parameter([rows, inputs], np.float32)
        model = openvino.Model([ops.matmul(entry, weight, False, True)], [entry])
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        request.set_input_tensor(openvino.Tensor(values))
        return request

    requests = copies(make, outputs * inputs // 2)
    return {
        "OpenVINO int4, group 128": (
            lambda turn: requests[turn % len(requests)].infer(),
            outputs * inputs // 2,
        )
    }
