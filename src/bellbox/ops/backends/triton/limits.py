"""Which calls the kernels take, by operation; reasons are a few words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bellbox.core.grid import Grid
from bellbox.ops.kept import stepped
from bellbox.ops.weight_layout import TILED_LEVELS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_LEVELS = TILED_LEVELS
LARGEST_BLOCK = 2048
"""Of a rotation; a program holds at least one whole block in registers."""
_INT32 = 2**31 - 1
_GRID = 65_535
"""Most programs along the second axis of a launch."""
LEAST_OUTPUTS = 32
"""Of a program along that axis."""
PIECE = 1024
"""Least columns of a program along that axis."""


def largest_integer(n: int, zero_point: float) -> int:
    """Largest magnitude of the integers of a grid."""
    integers = Grid(n, zero_point).integers
    return max(abs(integers[0]), abs(integers[-1]))


def _float(arguments: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        if arguments[name] is not None and arguments[name].dtype not in FLOATS:
            return f"{name} is {arguments[name].dtype}"
    if arguments.get("dtype", torch.float32) not in FLOATS:
        return f"the result is {arguments['dtype']}"
    return None


def _fp32(arguments: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        tensor = arguments[name]
        if tensor is not None and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}"
    return None


def _rows(x: Tensor, block: int = 1) -> str | None:
    if block > LARGEST_BLOCK:
        return f"a rotation of {block}"
    if not x.dim() or not x.numel():
        return "there are no numbers"
    if x.shape[-1] > _GRID * PIECE:
        return f"rows of {x.shape[-1]} numbers"
    return None


def _levels(count: int) -> str | None:
    return f"more than {MOST_LEVELS} levels" if count > MOST_LEVELS else None


def _thresholds(thresholds: Sequence[float]) -> str | None:
    if not thresholds or any(not a <= b for a, b in pairwise(thresholds)):
        return "thresholds do not rise"
    return _levels(len(thresholds) + 1)


def _outputs(scale: Tensor) -> str | None:
    if not scale.numel():
        return "there are no outputs"
    return f"{scale.numel()} outputs" if scale.numel() > _GRID * LEAST_OUTPUTS else None


def _product(columns: int, weight: tuple[int, float], act: tuple[int, float]) -> str | None:
    codes = 2 * weight[0]  # products are of codes first, then of what is taken from them
    largest = max(largest_integer(*weight), codes) + codes
    if columns * largest * largest_integer(*act) > _INT32:
        return f"sums of {columns} columns may not fit 32 bits"
    return None


def _packed_linear(arguments: Mapping[str, Any]) -> str | None:
    n, levels = arguments["act_thresholds"].numel() + 1, arguments["weight_levels"]
    reason = _levels(max(n, levels)) or _float(arguments, "x") or _rows(arguments["x"], arguments["block"])
    reason = reason or _fp32(arguments, "weight_scale", "bias", "act_scale", "act_thresholds", "act_rstd")
    if reason is not None:
        return reason
    if n < 2:
        return "there are no thresholds"
    return _outputs(arguments["weight_scale"]) or _product(
        arguments["in_features"],
        (levels, arguments["weight_zero_point"]),
        (n, arguments["act_zero_point"]),
    )


def _kept(arguments: Mapping[str, Any]) -> str | None:
    kept = arguments["kept"]
    if kept.dim() != 2 or kept.dtype != torch.int8:
        return f"kept is {kept.dtype} {tuple(kept.shape)}"
    return _rows(kept) or _thresholds(arguments["thresholds"])


def _kept_linear(arguments: Mapping[str, Any]) -> str | None:
    levels, n = arguments["weight_levels"], len(arguments["thresholds"]) + 1
    reason = _kept(arguments) or _levels(levels) or _float(arguments)
    reason = reason or _fp32(arguments, "row_scale", "weight_scale", "bias", "act_scale")
    return (
        reason
        or _outputs(arguments["weight_scale"])
        or _product(
            arguments["kept"].shape[1],
            (levels, arguments["weight_zero_point"]),
            (n, arguments["act_zero_point"]),
        )
    )


def _decode_kept(arguments: Mapping[str, Any]) -> str | None:
    return _kept(arguments) or _fp32(arguments, "scale") or _float(arguments)


def _rotate(arguments: Mapping[str, Any]) -> str | None:
    return _float(arguments, "x") or _rows(arguments["x"], arguments["block"])


def _row_rms(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    return f"x is {tuple(x.shape)}" if x.dim() != 2 else _float(arguments, "x") or _rows(x)


def _coding(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    if x.dim() != 2:
        return f"x is {tuple(x.shape)}"
    reason = _float(arguments, "x") or _rows(x, arguments["block"]) or _thresholds(arguments["thresholds"])
    return reason or _fp32(arguments, "r", *(("scale",) if "scale" in arguments else ()))


def _keep(arguments: Mapping[str, Any]) -> str | None:
    reason = _coding(arguments)
    if reason is None and stepped(arguments["thresholds"]) is None:
        return "bytes do not tell the thresholds apart"
    return reason


def _backward(arguments: Mapping[str, Any]) -> str | None:
    if arguments["whole_tensor"]:
        return "one sigma for the whole tensor"
    reason = _float(arguments, "grad", "v", "x_hat") or _fp32(arguments, "r", "gamma", "free")
    return reason or _rows(arguments["grad"], arguments["block"])


def _backward_kept(arguments: Mapping[str, Any]) -> str | None:
    reason = _kept(arguments) or _float(arguments, "grad") or _fp32(arguments, "r", "gamma", "free")
    return reason or _rows(arguments["grad"], arguments["block"])


def _layout(arguments: Mapping[str, Any]) -> str | None:
    if arguments["levels"] > MOST_LEVELS:
        return f"more than {MOST_LEVELS} levels"
    rows, columns = arguments.get("codes", torch.empty(0)).shape if "codes" in arguments else (
        arguments["rows"],
        arguments["columns"],
    )  # fmt: skip
    if not rows * columns:
        return "there are no codes"
    return f"rows of {columns} codes" if columns > _GRID * 64 else None


WHY_NOT: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "packed_linear": _packed_linear,
    "kept_linear": _kept_linear,
    "row_rms": _row_rms,
    "rotate": _rotate,
    "encode": _coding,
    "bbq_forward": _coding,
    "bbq_backward": _backward,
    "keep": _keep,
    "kept_codes": _kept,
    "decode_kept": _decode_kept,
    "bbq_backward_kept": _backward_kept,
    "prepack": _layout,
    "unpack": _layout,
}
"""For each operation that has a kernel: why a call whose tensors lie where kernels run is not taken, or None."""
