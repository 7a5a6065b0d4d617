"""Table of the compiled kernels: for each operation whether they take a call, and the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bellbox.core.grid import Grid
from bellbox.core.packing import code_width
from bellbox.errors import BellboxError
from bellbox.ops import native
from bellbox.ops.activate import ACTIVATIONS
from bellbox.ops.activate import check as check_activation
from bellbox.ops.binarized_linear import MAX_BITS
from bellbox.ops.cross_entropy import check as check_cross_entropy
from bellbox.ops.cross_entropy import check_backward
from bellbox.ops.decode_bytes import check as check_decode
from bellbox.ops.draw import OUT_OF_RANGE
from bellbox.ops.draw import check as check_draw
from bellbox.ops.float_linear import check as check_float
from bellbox.ops.int4_linear import check as check_int4
from bellbox.ops.int8_linear import INT8_COLUMNS
from bellbox.ops.int8_linear import check as check_int8
from bellbox.ops.kept import stepped
from bellbox.ops.layer_norm import check as check_layer_norm
from bellbox.ops.packed_linear import TENSORS, check, with_signs
from bellbox.ops.rms_norm import check_width
from bellbox.ops.table_rows import check as check_rows
from bellbox.ops.table_rows import outside
from bellbox.ops.weight_layout import TILED_LEVELS, check_codes, check_packed, packed_size

_ACTIVATIONS = {kind: number for number, kind in enumerate(ACTIVATIONS)}


@dataclass(frozen=True)
class Implementation:
    """One operation on the kernels."""

    why_not: Callable[[Mapping[str, Any]], str | None]
    """Of a call whose tensors lie on the CPU, by the arguments' names."""
    run: Callable[..., Any]


def _threads() -> int:
    return torch.get_num_threads()


def plan_of(buffers: Mapping[str, Tensor | None], numbers: tuple[Any, ...]) -> Any:
    """The compiled module's plan of a packed layer, or None where it does not take one.

    Args:
        buffers: a dictionary with `TENSORS`, the weight as `packed`; looked into again in every call.
        numbers: from `in_features` to `rescale`, see `bellbox.ops.packed_linear`.
    """
    module = native.compiled()
    assert module is not None
    try:
        return module.Plan(buffers, *numbers)
    except ValueError:
        return None


def _why_not_packed(arguments: Mapping[str, Any]) -> str | None:
    if arguments["normalise"] == "norm":
        return "no kernel keeps the norm of a row"
    n = arguments["act_thresholds"].numel() + 1
    inputs = Grid(n, arguments["act_zero_point"]).integers
    if max(arguments["weight_levels"], n) > native.MAX_LEVELS:
        return f"more than {native.MAX_LEVELS} levels"
    if max(map(abs, (inputs[0], inputs[-1]))) > native.MAX_INTEGER:
        return f"integers above {native.MAX_INTEGER}"
    for name in ("weight_scale", "bias", "act_scale", "act_thresholds"):
        tensor = arguments[name]
        if tensor is not None and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}"
    if arguments["x"].dtype not in native.TYPES:
        return f"the input is {arguments['x'].dtype}"
    return None


def _as_buffers(tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    whole = [None if each is None else each.detach().contiguous() for each in tensors]
    packed = whole[0]
    if packed is not None and packed.data_ptr() % 4:  # the sums behind the tiles are int32
        whole[0] = packed.clone()
    return dict(zip(("packed", *TENSORS[1:]), whole, strict=True))


def _plan_or_refusal(kind: str, *arguments: Any) -> Any:
    module = native.compiled()
    assert module is not None
    try:
        return getattr(module, kind)(*arguments)
    except ValueError as error:
        raise BellboxError(f"packed layer: {error}") from None


def _packed_linear(x: Tensor, *arguments: Any) -> Tensor:
    tensors, numbers, dtype = arguments[:7], arguments[7:-1], arguments[-1]
    check(x, *tensors, *numbers, features=numbers[0])
    plan = _plan_or_refusal("Plan", _as_buffers(tensors), *numbers)
    if x.dim() == 0 or x.shape[-1] != numbers[0]:
        raise BellboxError(
            f"a packed layer of {numbers[0]} inputs got shape {tuple(x.shape)}, dtype {x.dtype}"
        )
    return _linear(plan, x.detach(), tensors[6], dtype)


def _linear(plan: Any, x: Tensor, signs: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = with_signs(x, signs)
    wanted = dtype if dtype in native.TYPES else torch.float32
    out = plan(x, wanted, _threads())
    return out if wanted == dtype else out.to(dtype)


def _bind_linear(
    buffers: Mapping[str, Tensor | None], numbers: Mapping[str, Any]
) -> Callable[[Tensor, torch.dtype], Tensor | None] | None:
    plan = plan_of(buffers, numbers["numbers"])
    if plan is None:
        return None
    get_threads = torch.get_num_threads

    def call(x: Tensor, dtype: torch.dtype) -> Tensor | None:
        try:
            return plan(x, dtype, get_threads())
        except ValueError:  # another dtype, device or width: the operation says what becomes of it
            return None

    if buffers["act_signs"] is None:
        return call
    return lambda x, dtype: call(with_signs(x, buffers["act_signs"]), dtype)


def _bind_group(
    members: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Callable[[Tensor, torch.dtype], list[Tensor] | None] | None:
    """`members`: ignored; `numbers["layers"]`: for each layer its buffers and numbers."""
    del members
    plans = [plan_of(buffers, each) for buffers, each in numbers["layers"]]
    module = native.compiled()
    if module is None or any(plan is None for plan in plans):
        return None
    if any(buffers["act_signs"] is not None for buffers, _ in numbers["layers"]):
        return None
    group, get_threads = module.GroupPlan(plans), torch.get_num_threads

    def call(x: Tensor, dtype: torch.dtype) -> list[Tensor] | None:
        try:
            return group(x, dtype, get_threads())
        except ValueError:  # as above
            return None

    return call


def _why_not_conv(arguments: Mapping[str, Any]) -> str | None:
    if arguments["geometry"][-1] != 1:
        return f"{arguments['geometry'][-1]} groups"
    return _why_not_packed(arguments)


def _packed_conv2d(x: Tensor, *arguments: Any) -> Tensor:
    tensors, numbers, (channels, geometry, add, relu, dtype) = arguments[:7], arguments[7:-5], arguments[-5:]
    check(x, *tensors, *numbers, features=channels)
    plan = _plan_or_refusal("ConvPlan", _as_buffers(tensors), *numbers, channels, list(geometry[:-1]))
    if x.dim() != 4 or x.shape[1] != channels:
        raise BellboxError(
            f"a packed convolution of {channels} channels got shape {tuple(x.shape)}, dtype {x.dtype}"
        )
    outputs = tensors[1].numel()
    return run_conv(plan, x.detach(), tensors[6], outputs, geometry, add, relu, dtype)


def run_conv(
    plan: Any,
    x: Tensor,
    signs: Tensor | None,
    outputs: int,
    geometry: list[int],
    add: Tensor | None,
    relu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """One call of a plan: `[batch, channels, height, width]` to `[batch, outputs, ...]`, channels last."""
    if signs is not None:
        x = x * signs[:, None, None]
    wanted = dtype if dtype in native.TYPES else torch.float32
    kernel_h, kernel_w, stride_h, stride_w, left, right, top, bottom, dilation_h, dilation_w, _ = geometry
    batch, _, height, width = x.shape
    rows = (height + top + bottom - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    columns = (width + left + right - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    if rows < 1 or columns < 1:
        raise BellboxError(
            f"an image of {height} x {width} is smaller than the convolution's window of "
            f"{dilation_h * (kernel_h - 1) + 1} x {dilation_w * (kernel_w - 1) + 1}"
        )
    out = x.new_empty((batch, rows, columns, outputs), dtype=wanted)
    image = x.permute(0, 2, 3, 1).contiguous()
    fused = wanted == dtype == torch.float32 and (
        add is None or (add.dtype == torch.float32 and add.shape == (batch, outputs, rows, columns))
    )
    beside = None if add is None or not fused else add.detach().permute(0, 2, 3, 1).contiguous()
    plan(image, out, beside, relu and fused, batch, height, width, _threads())
    result = out.permute(0, 3, 1, 2).to(dtype)
    if fused:
        return result
    result = result if add is None else result + add
    return result.relu() if relu else result


def _bind_conv(
    buffers: Mapping[str, Tensor | None], numbers: Mapping[str, Any]
) -> Callable[..., Tensor | None] | None:
    geometry, channels = numbers["geometry"], numbers["channels"]
    module = native.compiled()
    if module is None or geometry[-1] != 1:
        return None
    try:
        plan = module.ConvPlan(buffers, *numbers["numbers"], channels, list(geometry[:-1]))
    except ValueError:
        return None
    scale = buffers["weight_scale"]
    assert scale is not None
    outputs = scale.numel()

    def call(x: Tensor, dtype: torch.dtype, add: Tensor | None, relu: bool) -> Tensor | None:
        if not (x.is_cpu and x.dtype in native.TYPES) or not plan.holds():
            return None
        return run_conv(plan, x, buffers["act_signs"], outputs, geometry, add, relu, dtype)

    return call


def _groups(numbers: Mapping[str, Any]) -> list[Any] | None:
    module = native.compiled()
    assert module is not None
    groups: list[Any] = []
    for layers in numbers["layers"]:
        plans = [plan_of(buffers, each) for buffers, each in layers]
        if any(plan is None for plan in plans) or any(
            buffers["act_signs"] is not None for buffers, _ in layers
        ):
            return None
        groups.append(module.GroupPlan(plans))
    return groups


def _bind_llama_block(tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]) -> Any:
    module, groups = native.compiled(), _groups(numbers)
    assert module is not None
    if groups is None:
        return None
    norms = tensors["first_norm"], tensors["second_norm"]
    try:
        return module.LlamaBlock(*groups, numbers["head_dim"], *norms, numbers["eps"])
    except ValueError:
        return None


def _bind_norm(tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]) -> Any:
    weight, eps, module = tensors["weight"], numbers["eps"], native.compiled()
    assert weight is not None
    assert module is not None
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        return None
    weight = weight.detach()

    def norm(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        module.rms_norm(x, weight, eps, out, _threads())
        return out

    return norm


def _bind_head(tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]) -> Any:
    del numbers
    module = native.compiled()
    assert module is not None
    weight, multipliers, scale = tensors["weight"], tensors["multipliers"], tensors["scale"]
    assert weight is not None
    assert scale is not None
    given = [weight, scale] if multipliers is None else [weight, multipliers, scale]
    columns = weight.shape[1] * (1 if multipliers is None else 2)
    run = module.int8_linear if multipliers is None else module.int4_linear
    if not all(each.is_contiguous() for each in given) or columns > INT8_COLUMNS:
        return None

    def head(x: Tensor) -> Tensor:
        out = x.new_empty((*x.shape[:-1], len(scale)))
        run(x, *given, columns, out, _threads())
        return out

    return head


def _bind_gpt_block(tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]) -> Any:
    del tensors
    module, groups = native.compiled(), _groups(numbers)
    assert module is not None
    try:
        return None if groups is None else module.Block(*groups, numbers["head_dim"])
    except ValueError:
        return None


def _why_not_layout(arguments: Mapping[str, Any]) -> str | None:
    return f"more than {TILED_LEVELS} levels" if arguments["levels"] > TILED_LEVELS else None


def _prepack(codes: Tensor, levels: int, places: int) -> Tensor:
    module = native.compiled()
    assert module is not None
    check_codes(codes, levels, places)
    rows, columns = codes.shape
    out = codes.new_empty(packed_size(rows, columns, levels, places))
    try:
        module.prepack(codes.contiguous(), rows, columns, code_width(levels), places, out, _threads())
    except ValueError as error:
        raise BellboxError(f"codes cannot be packed: {error}") from None
    return out


def _unpack(weight: Tensor, rows: int, columns: int, levels: int) -> Tensor:
    module = native.compiled()
    assert module is not None
    check_packed(weight, rows, columns, levels)
    codes = weight.new_empty(rows, columns)
    module.unpack(weight.contiguous(), rows, columns, code_width(levels), codes)
    return codes


def _why_not_plain(arguments: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        tensor = arguments[name]
        if tensor.dtype != torch.float32 or (name != "x" and not tensor.is_contiguous()):
            return f"{name} is {tensor.dtype}, contiguous: {tensor.is_contiguous()}"
    return None if arguments["x"].numel() else "there are no numbers"


def _why_not_norm(arguments: Mapping[str, Any]) -> str | None:
    return _why_not_plain(arguments, "x", "weight")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_width("a norm", x, len(weight))
    module = native.compiled()
    assert module is not None
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    module.rms_norm(x, weight.detach(), eps, out, _threads())
    return out


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    check_layer_norm(x, weight, bias)
    module = native.compiled()
    assert module is not None
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    given = weight.detach(), None if bias is None else bias.detach()
    module.layer_norm(x, *given, eps, out, _threads())
    return out


def _why_not_layer_norm(arguments: Mapping[str, Any]) -> str | None:
    bias = arguments["bias"]
    return _why_not_plain(arguments, "x", "weight", *(() if bias is None else ("bias",)))


def _why_not_activate(arguments: Mapping[str, Any]) -> str | None:
    return _why_not_plain(arguments, "x")


def _activate(x: Tensor, times: Tensor | None, kind: str) -> Tensor:
    check_activation(x, times, kind)
    module = native.compiled()
    assert module is not None
    x = x.detach().contiguous()
    out, number = torch.empty_like(x), _ACTIVATIONS[kind]
    module.activate(x, None if times is None else times.detach().contiguous(), number, out, _threads())
    return out


def _why_not_cross_entropy(arguments: Mapping[str, Any]) -> str | None:
    logits = arguments["logits"]
    return None if logits.dtype in native.TYPES and logits.numel() else f"the logits are {logits.dtype}"


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    check_cross_entropy(logits, targets)
    module = native.compiled()
    assert module is not None
    losses, log_sums = torch.empty(2, len(logits)).unbind()
    module.cross_entropy(logits.detach().contiguous(), targets.contiguous(), losses, log_sums, _threads())
    return losses, log_sums


def _cross_entropy_backward(logits: Tensor, targets: Tensor, log_sums: Tensor, grads: Tensor) -> Tensor:
    check_backward(logits, targets, log_sums, grads)
    module = native.compiled()
    assert module is not None
    logits = logits.detach().contiguous()
    out = torch.empty_like(logits)
    module.cross_entropy_backward(
        logits, targets.contiguous(), log_sums.contiguous(), grads.contiguous(), out, _threads()
    )
    return out


def _why_not_float(arguments: Mapping[str, Any]) -> str | None:
    return _why_not_plain(arguments, "x", "weight")


def _float_linear(x: Tensor, weight: Tensor) -> Tensor:
    check_float(x, weight)
    rows, columns = weight.shape
    module = native.compiled()
    assert module is not None
    out = x.new_empty((*x.shape[:-1], rows))
    module.float_linear(x.detach().contiguous(), weight.detach(), columns, out, _threads())
    return out


def _why_not_int8(arguments: Mapping[str, Any]) -> str | None:
    weight = arguments["weight"]
    if (
        weight.dim() != 2
        or weight.dtype != torch.int8
        or not weight.is_contiguous()
        or weight.shape[1] > INT8_COLUMNS
    ):
        return f"the weight is {weight.dtype} {tuple(weight.shape)}, contiguous: {weight.is_contiguous()}"
    return _why_not_plain(arguments, "x", "scale")


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check_int8(x, weight, scale)
    rows, columns = weight.shape
    module = native.compiled()
    assert module is not None
    out = x.new_empty((*x.shape[:-1], rows))
    module.int8_linear(x.detach().contiguous(), weight, scale.detach(), columns, out, _threads())
    return out


def _why_not_int4(arguments: Mapping[str, Any]) -> str | None:
    for name in ("weight", "multipliers"):
        tensor = arguments[name]
        if tensor.dim() != 2 or tensor.dtype != torch.uint8 or not tensor.is_contiguous():
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}, contiguous: {tensor.is_contiguous()}"
    return _why_not_plain(arguments, "x", "scale")


def _int4_linear(x: Tensor, weight: Tensor, multipliers: Tensor, scale: Tensor) -> Tensor:
    check_int4(x, weight, multipliers, scale)
    module = native.compiled()
    assert module is not None
    out = x.new_empty((*x.shape[:-1], len(weight)))
    columns = 2 * weight.shape[1]
    given = x.detach().contiguous()
    module.int4_linear(given, weight, multipliers, scale.detach(), columns, out, _threads())
    return out


def _why_not_rows_of_table(arguments: Mapping[str, Any]) -> str | None:
    if arguments["ids"].dtype != torch.int64:
        return f"ids are {arguments['ids'].dtype}"
    tensors = [arguments[name] for name in ("weight", "multipliers", "scale")]
    return (
        None
        if all(each is None or each.is_contiguous() for each in tensors)
        else "the table is not contiguous"
    )


def _table_rows(ids: Tensor, weight: Tensor, multipliers: Tensor | None, scale: Tensor) -> Tensor:
    check_rows(ids, weight, multipliers, scale)
    module = native.compiled()
    assert module is not None
    columns = weight.shape[1] * (1 if multipliers is None else 2)
    out = scale.new_empty((*ids.shape, columns))
    if not module.table_rows(ids.contiguous(), weight, multipliers, scale, columns, out, _threads()):
        raise BellboxError(outside(weight))
    return out


def _why_not_decode(arguments: Mapping[str, Any]) -> str | None:
    return None if arguments["packed"].numel() else "there are no bytes"


def _decode_bytes(packed: Tensor, values: Tensor, scale: Tensor, columns: int) -> Tensor:
    check_decode(packed, values, scale, columns)
    module = native.compiled()
    assert module is not None
    rows, out = len(packed), scale.new_empty(len(packed), columns)
    given = packed.contiguous(), values.detach().contiguous(), scale.detach().contiguous()
    module.decode_bytes(*given, rows, columns, out, _threads())
    return out


def _why_not_draw(arguments: Mapping[str, Any]) -> str | None:
    logits = arguments["logits"]
    return None if logits.dtype == torch.float32 and logits.numel() else f"logits are {logits.dtype}"


def _draw(logits: Tensor, *settings: Tensor) -> Tensor:
    check_draw(logits, *settings)
    module = native.compiled()
    assert module is not None
    temperature, top_k, top_p, drawn = (each.detach().contiguous() for each in settings)
    out, given = top_k.new_empty(len(logits)), logits.detach().contiguous()
    try:
        module.draw(given, given.shape[1], temperature, top_k, top_p, drawn, out, _threads())
    except ValueError:
        raise BellboxError(OUT_OF_RANGE) from None
    return out


def _why_not_binarized(arguments: Mapping[str, Any]) -> str | None:
    for name in ("planes", "scales", "order", "steps", "bias"):
        tensor = arguments[name]
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return "there are no numbers" if not arguments["x"].numel() else None


def _binarized_linear(x: Tensor, *arguments: Any) -> Tensor:
    planes, scales, order, steps, bias, rows, block, bits = arguments
    module = native.compiled()
    assert module is not None
    columns = x.shape[-1] if x.dim() else 0
    if not (
        columns
        and 2 <= bits <= MAX_BITS
        and steps.dim() == 2
        and block >= 1
        and len(steps) == -(-columns // block)
    ):
        raise BellboxError(
            f"binarized layer: {columns} columns in blocks of {block}, steps {tuple(steps.shape)}, bits {bits}"
        )
    out = x.new_empty((*x.shape[:-1], rows))
    most, given = 2 ** (bits - 1) - 1, x.detach().contiguous()
    try:
        module.binarized(planes, scales, steps, order, bias, rows, columns, given, most, out, _threads())
    except ValueError as error:
        raise BellboxError(f"binarized layer: {error}") from None
    return out


def _why_not_rows(arguments: Mapping[str, Any], first: str, levels: int = 2) -> str | None:
    x, out = arguments[first], arguments.get("dtype", torch.float32)
    if x.dtype not in native.TYPES or out not in native.TYPES:
        return f"{first} is {x.dtype}, the result {out}"
    return f"more than {native.MAX_LEVELS} levels" if levels > native.MAX_LEVELS else None


def _why_not_rotate(arguments: Mapping[str, Any]) -> str | None:
    return _why_not_rows(arguments, "x")


def _why_not_rms(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    return None if x.dim() == 2 and x.dtype in native.TYPES else f"x is {x.dtype} {tuple(x.shape)}"


def _why_not_coding(arguments: Mapping[str, Any]) -> str | None:
    return _why_not_rows(arguments, "x", len(arguments["thresholds"]) + 1)


def _why_not_backward(arguments: Mapping[str, Any]) -> str | None:
    grad, v, x_hat = arguments["grad"], arguments["v"], arguments["x_hat"]
    if arguments["whole_tensor"]:
        return "one sigma for the whole tensor"
    if not grad.dtype == v.dtype == x_hat.dtype:
        return f"grad is {grad.dtype}, v {v.dtype}, x_hat {x_hat.dtype}"
    for name in ("r", "gamma", "free"):
        if arguments[name].dtype != torch.float32:
            return f"{name} is {arguments[name].dtype}"
    return _why_not_rows(arguments, "grad")


def _bbq_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return native.bbq_backward(*arguments[:-1])


def _why_not_keep(arguments: Mapping[str, Any]) -> str | None:
    if stepped(arguments["thresholds"]) is None:
        return "bytes do not tell the thresholds apart"
    return _why_not_rows(arguments, "x", len(arguments["thresholds"]) + 1)


def _why_not_kept(arguments: Mapping[str, Any]) -> str | None:
    kept, levels = arguments["kept"], len(arguments["thresholds"]) + 1
    if kept.dim() != 2 or kept.dtype != torch.int8 or levels > native.MAX_LEVELS:
        return f"kept is {kept.dtype} {tuple(kept.shape)}, {levels} levels"
    for name in ("scale", "r", "gamma", "free", "row_scale", "weight_scale", "act_scale", "bias"):
        tensor = arguments.get(name)
        if tensor is not None and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}"
    grad, out = arguments.get("grad"), arguments.get("dtype", torch.float32)
    if out not in native.TYPES or (grad is not None and grad.dtype not in native.TYPES):
        return f"the result is {out}"
    return None


def _why_not_kept_linear(arguments: Mapping[str, Any]) -> str | None:
    inputs = Grid(len(arguments["thresholds"]) + 1, arguments["act_zero_point"]).integers
    if max(map(abs, (inputs[0], inputs[-1]))) > native.MAX_INTEGER:
        return f"integers above {native.MAX_INTEGER}"
    if arguments["weight_levels"] > native.MAX_LEVELS:
        return f"more than {native.MAX_LEVELS} levels"
    return _why_not_kept(arguments)


def _kept_linear(*arguments: Any) -> Tensor:
    kept, _, weight, weight_scale = arguments[:4]
    check_packed(weight, weight_scale.numel(), kept.shape[1], arguments[7])
    try:
        return native.kept_linear(*arguments)
    except ValueError as error:
        raise BellboxError(f"kept_linear: {error}") from None


TABLE: dict[str, Implementation] = {
    "rotate": Implementation(_why_not_rotate, native.rotate),
    "row_rms": Implementation(_why_not_rms, native.row_rms),
    "encode": Implementation(_why_not_coding, native.encode),
    "bbq_forward": Implementation(_why_not_coding, native.bbq_forward),
    "bbq_backward": Implementation(_why_not_backward, _bbq_backward),
    "keep": Implementation(_why_not_keep, native.keep),
    "kept_codes": Implementation(_why_not_kept, native.kept_codes),
    "decode_kept": Implementation(_why_not_kept, native.decode_kept),
    "bbq_backward_kept": Implementation(_why_not_kept, native.bbq_backward_kept),
    "kept_linear": Implementation(_why_not_kept_linear, _kept_linear),
    "rms_norm": Implementation(_why_not_norm, _rms_norm),
    "layer_norm": Implementation(_why_not_layer_norm, _layer_norm),
    "cross_entropy": Implementation(_why_not_cross_entropy, _cross_entropy),
    "cross_entropy_backward": Implementation(_why_not_cross_entropy, _cross_entropy_backward),
    "activate": Implementation(_why_not_activate, _activate),
    "float_linear": Implementation(_why_not_float, _float_linear),
    "int8_linear": Implementation(_why_not_int8, _int8_linear),
    "int4_linear": Implementation(_why_not_int4, _int4_linear),
    "decode_bytes": Implementation(_why_not_decode, _decode_bytes),
    "draw": Implementation(_why_not_draw, _draw),
    "table_rows": Implementation(_why_not_rows_of_table, _table_rows),
    "binarized_linear": Implementation(_why_not_binarized, _binarized_linear),
    "packed_linear": Implementation(_why_not_packed, _packed_linear),
    "packed_conv2d": Implementation(_why_not_conv, _packed_conv2d),
    "prepack": Implementation(_why_not_layout, _prepack),
    "unpack": Implementation(_why_not_layout, _unpack),
}
BOUND: dict[str, Callable[..., Any]] = {
    "packed_linear": _bind_linear,
    "packed_linear_group": _bind_group,
    "packed_conv2d": _bind_conv,
    "llama_block": _bind_llama_block,
    "gpt_block": _bind_gpt_block,
    "rms_norm": _bind_norm,
    "int8_linear": _bind_head,
    "int4_linear": _bind_head,
}
