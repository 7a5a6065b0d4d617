"""Products that PyTorch itself offers beside its float layers: int4 weight-only, and oneDNN's int8 layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def contenders(x: Tensor, outputs: int, copies: Any) -> dict[str, Any]:
    rows, inputs = x.shape
    return {
        "torch int4 weight-only": int4(x, outputs, inputs, copies),
        "oneDNN int8, prepacked": onednn(rows, outputs, inputs, copies),
    }


def int4(x: Tensor, outputs: int, inputs: int, copies: Any) -> Any:
    """bf16 activations, 4-bit weights in groups of 128, packed for the CPU."""
    group = 128

    def make() -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        return packed, torch.rand(inputs // group, outputs, 2, dtype=torch.bfloat16)

    weights = copies(make, outputs * inputs // 2)

    def run(turn: int) -> Tensor:
        packed, scales = weights[turn % len(weights)]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)

    return run, outputs * inputs // 2


def onednn(rows: int, outputs: int, inputs: int, copies: Any) -> Any:
    """u8 activations, already quantized, times s8 weights, to fp32."""
    codes = torch.randint(0, 255, (rows, inputs), dtype=torch.uint8)
    scale, zero = torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int64)

    def make() -> Tensor:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return torch.ops.onednn.qlinear_prepack(weight, None)

    weights = copies(make, outputs * inputs)

    def run(turn: int) -> Tensor:
        weight = weights[turn % len(weights)]
        return torch.ops.onednn.qlinear_pointwise(
            codes, 0.02, 128, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return run, outputs * inputs
