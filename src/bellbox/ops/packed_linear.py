"""A packed linear layer in one operation: rotate, normalise and code the input, multiply integers, scale.

    y = float32(sum of integers) * (weight_scale[row] * act_scale') * row_scale + bias

`row_scale` is 1, or the input row's sigma where the output follows it, or what gives its levels the norm of the row.
Everything that the function depends on is an
argument (docs/format.md has it step by step), so a graph that holds the operation holds the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bellbox.core.grid import Grid
from bellbox.core.hadamard import butterfly
from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Circumstances, Operation, bind, is_direct
from bellbox.ops.encode import (
    MEASURES,
    compute_dtype,
    kept_norm,
    normaliser,
    reference_encode,
    row_scale,
    static_normaliser,
)
from bellbox.ops.integer import scaled_product
from bellbox.ops.transforms import TransformableFunction, apply
from bellbox.ops.weight_layout import packed_size, unpack, unpack_operation

SCHEMA = (
    "Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor act_scale, Tensor act_thresholds, "
    "Tensor? act_rstd, Tensor? act_signs, int in_features, int weight_levels, float weight_zero_point, "
    "float act_zero_point, int block, str normalise, bool rescale"
)
TENSORS = ("weight", "weight_scale", "bias", "act_scale", "act_thresholds", "act_rstd", "act_signs")
"""Arguments that a layer keeps as buffers, in the order of the schema."""


def with_signs(x: Tensor, signs: Tensor | None) -> Tensor:
    """`x` with the sign of each entry of a row changed where `signs` is -1."""
    return x if signs is None else x * signs


def encode_input(
    rows: Tensor,
    thresholds: Tensor,
    act_rstd: Tensor | None,
    zero_point: float,
    block: int,
    normalise: str,
    rescale: bool,
) -> tuple[Tensor, Tensor]:
    """Codes of an input as a packed layer takes it: uint8 `[rows, features]` and fp32 row scales `[rows, 1]`.

    Args:
        rows: float `[rows, features]`, signs changed already.
        thresholds: fp32 `[n - 1]`, rising.
        act_rstd: `[1]`, 1/sigma for `static`.
        zero_point: of the codes' grid.
        block: rotation block.
        normalise: `rms`, `absmax` or `norm` of each row, or `static`.
        rescale: whether row scales are sigma (of `norm`, the row's L2 norm over that of its levels) in place of 1.
    """
    sigma = None
    if normalise == "static":
        assert act_rstd is not None
        r = static_normaliser(act_rstd.reshape(()), rows, block)
    else:
        sigma = MEASURES[normalise](rows)
        r = normaliser(sigma, block)
    r = r.to(compute_dtype(rows))
    codes = reference_encode(rows, r, thresholds.tolist(), block)
    if normalise == "norm":
        grid = Grid(thresholds.numel() + 1, zero_point)
        return codes, kept_norm(rows, grid.decode(codes, torch.float64), r)
    return codes, row_scale(r, len(rows), sigma if rescale else None)


def check(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor, act_thresholds: Tensor,
    act_rstd: Tensor | None, act_signs: Tensor | None, in_features: int, weight_levels: int,
    weight_zero_point: float, act_zero_point: float, block: int, normalise: str, rescale: bool, features: int,
) -> None:  # fmt: skip
    """Refuse arguments that do not fit together; shared with packed convolutions (`features`: entries of a rotation).

    Raises:
        BellboxError: naming the argument.
    """
    rows, n = weight_scale.numel(), act_thresholds.numel() + 1
    grids = Grid(weight_levels, weight_zero_point), Grid(n, act_zero_point)  # refuse numbers that no grid has
    if not all(grid.fits_int8 for grid in grids):
        raise BellboxError(f"{weight_levels} and {n} levels: their integers do not fit int8")
    for ok, what in (
        (x.is_floating_point(), f"the input is {x.dtype}: a float tensor is needed"),
        (in_features >= 1, f"in_features is {in_features}"),
        (
            weight.dtype == torch.uint8 and weight.dim() == 1,
            f"weight is {weight.dtype} {tuple(weight.shape)}: one-dimensional uint8 is needed (ops.prepack)",
        ),
        (
            weight.numel() >= packed_size(rows, in_features, weight_levels),
            f"weight has {weight.numel()} bytes: {rows} x {in_features} codes of {weight_levels} levels need more",
        ),
        (weight_scale.dtype == torch.float32, f"weight_scale is {weight_scale.dtype}: fp32 is needed"),
        (act_scale.numel() == 1, f"act_scale has {act_scale.numel()} numbers: one is needed"),
        (bias is None or bias.numel() == rows, f"bias does not have {rows} numbers"),
        (
            block >= 1 and not block & (block - 1) and features % block == 0,
            f"block {block} does not divide {features}",
        ),
        (act_signs is None or act_signs.numel() == features, f"act_signs does not have {features} numbers"),
        (
            normalise in ("rms", "absmax", "norm", "static"),
            f"normalise is {normalise!r}: rms, absmax, norm or static",
        ),
        (normalise != "norm" or rescale, "norm needs rescale: it is the scale that keeps the norm"),
        (
            normalise != "static" or (act_rstd is not None and act_rstd.numel() == 1),
            "static needs act_rstd [1]",
        ),
        (normalise != "static" or not rescale, "static has no rescale: its sigma is the same for every row"),
        (
            normalise != "absmax" or block == 1,
            f"absmax needs block 1, not {block}: it is taken before a rotation",
        ),
    ):
        if not ok:
            raise BellboxError(f"packed layer: {what}")


def _reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor, act_thresholds: Tensor,
    act_rstd: Tensor | None, act_signs: Tensor | None, in_features: int, weight_levels: int,
    weight_zero_point: float, act_zero_point: float, block: int, normalise: str, rescale: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check(
        x, weight, weight_scale, bias, act_scale, act_thresholds, act_rstd, act_signs, in_features, weight_levels,
        weight_zero_point, act_zero_point, block, normalise, rescale, in_features,
    )  # fmt: skip
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise BellboxError(
            f"a packed layer of {in_features} inputs got shape {tuple(x.shape)}, dtype {x.dtype}"
        )
    outputs = weight_scale.numel()
    rows = with_signs(x.reshape(-1, in_features), act_signs)
    codes, row_scales = encode_input(
        rows, act_thresholds, act_rstd, act_zero_point, block, normalise, rescale
    )
    inputs = Grid(act_thresholds.numel() + 1, act_zero_point)
    weights = Grid(weight_levels, weight_zero_point)
    product = scaled_product(
        inputs.decode_int8(codes),
        weights.decode_int8(unpack_operation.reference(weight, outputs, in_features, weight_levels)),
        weight_scale.reshape(-1) / weights.multiplier,
        act_scale.reshape(()).to(torch.float32) / inputs.multiplier,
        row_scales,
    )
    if bias is not None:
        product = product + bias.to(torch.float32)
    return product.to(dtype).reshape(*x.shape[:-1], outputs)


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, *rest: Any) -> Tensor:
    del weight
    return x.new_empty((*x.shape[:-1], weight_scale.numel()), dtype=rest[-1])


operation = Operation(f"packed_linear({SCHEMA}, ScalarType dtype) -> Tensor", _reference, _fake)


class _WithGradient(TransformableFunction):
    """A packed operation with the gradient of its input, for what is trained in front of it (adapters, prompts).

    Straight-through: the staircase of the codes counts as the line through its steps, flat beyond the outermost
    ones, and sigma as a constant. The weights are codes and have no gradient.
    """

    @staticmethod
    def forward(
        run: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor], x: Tensor
    ) -> Tensor:
        del back
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        del output
        _, ctx.back, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, ctx.back(ctx.saved_tensors[0], grads[0])


def with_gradient(
    run: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor], x: Tensor
) -> Tensor:
    """`run(x)` whose gradient to `x` is `back(x, gradient of the result)`; `run` itself has none."""
    if not is_differentiated(x):
        return run(x)
    return apply(_WithGradient, run, back, x)


def is_differentiated(x: Tensor) -> bool:
    """Whether somebody may ask for a derivative of what is done with a tensor now, in reverse or forward mode."""
    return (x.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def input_gradient(
    rows: Tensor,
    into_levels: Callable[[Tensor], Tensor],
    act_scale: Tensor,
    thresholds: Tensor,
    act_rstd: Tensor | None,
    signs: Tensor | None,
    zero_point: float,
    block: int,
    normalise: str,
    rescale: bool,
) -> Tensor:
    """Straight-through gradient of rows that are coded, see `_WithGradient`.

    Args:
        rows: `[rows, features]`, fp32, signs changed already.
        into_levels: the gradient of the loss with respect to the coded input, `[rows, features]` in the rotated domain,
            given sigma of each row, `[rows, 1]`, or ones.
        act_scale: what a level is worth, like all that follows as in the operation.
    """
    if normalise == "static":
        assert act_rstd is not None
        sigma, r = None, static_normaliser(act_rstd.reshape(()), rows, block)
    else:
        sigma = MEASURES[normalise](rows)
        r = normaliser(sigma, block)
    r = r.to(rows.dtype).expand(len(rows), 1)
    v = butterfly(rows, block) * r
    widths = thresholds.diff()
    ends = (widths[:1], widths[-1:]) if len(widths) else (torch.ones_like(thresholds),) * 2
    edges = torch.cat((thresholds[:1] - ends[0], thresholds, thresholds[-1:] + ends[1]))
    cell = torch.bucketize(v, edges, right=True) - 1
    inside = (cell >= 0) & (cell < len(edges) - 1)
    slope = torch.where(inside, (act_scale.reshape(()) / edges.diff())[cell.clamp(0, len(edges) - 2)], 0.0)
    follows = torch.ones_like(r) if sigma is None or not rescale else sigma.to(rows.dtype)
    if normalise == "norm":
        levels = Grid(thresholds.numel() + 1, zero_point).decode(
            cell.clamp(0, len(thresholds)), torch.float64
        )
        follows = kept_norm(rows, levels, r).to(rows.dtype)
    g = into_levels(follows) * slope * r
    g = butterfly(g, block)
    return g if signs is None else g * signs


class Bound:
    """A packed layer's call with all but the input fixed.

    Args:
        buffers: the layer's own dictionary of buffers, read anew in each call: `TENSORS` by their names, the weight as
            `packed`.
        numbers: the arguments from `in_features` to `rescale`, in the order of the schema.
    """

    def __init__(self, buffers: dict[str, Tensor | None], numbers: tuple[Any, ...]) -> None:
        self._buffers, self._numbers = buffers, numbers
        self._plan: Callable[[Tensor, torch.dtype], Tensor | None] | None = None
        self._circumstances = Circumstances()

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the schema after the input."""
        buffers = self._buffers
        return (buffers["packed"], *(buffers[name] for name in TENSORS[1:]))

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`[..., in_features]` to `[..., out_features]` in `dtype`.

        Raises:
            BellboxError: an input of another width, or of no float dtype.
        """
        direct, plan = is_direct(x), self._plan
        if direct and plan is not None and self._circumstances.hold():
            out = plan(x, dtype)
            if out is not None:
                return out
        if x.shape[-1:] != (self._numbers[0],) or not x.is_floating_point():
            raise BellboxError(
                f"a packed layer of {self._numbers[0]} inputs got shape {tuple(x.shape)}, dtype {x.dtype}"
            )
        if direct:  # there was no plan yet, or a buffer lies elsewhere now
            self._circumstances = Circumstances()
            self._plan = plan = bind("packed_linear", self._buffers, {"numbers": self._numbers})
            out = None if plan is None else plan(x, dtype)
            if out is not None:
                return out
        return with_gradient(
            lambda given: operation(given, *self.tensors(), *self._numbers, dtype), self._gradient, x
        )

    @torch.no_grad()
    def _gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        weight, weight_scale, _, act_scale, thresholds, rstd, signs = self.tensors()
        columns, n, zero_point, act_zero_point, block, normalise, rescale = self._numbers
        assert weight is not None
        assert weight_scale is not None
        assert act_scale is not None
        assert thresholds is not None
        levels = Grid(n, zero_point).decode(unpack(weight, weight_scale.numel(), columns, n))
        matrix = levels * weight_scale.reshape(-1, 1)
        rows = with_signs(x.reshape(-1, columns).to(torch.float32), signs)
        flat = grad.reshape(-1, grad.shape[-1]).to(torch.float32)
        found = input_gradient(
            rows,
            lambda follows: (flat * follows) @ matrix,
            act_scale,
            thresholds,
            rstd,
            signs,
            act_zero_point,
            block,
            normalise,
            rescale,
        )
        return found.reshape(x.shape).to(x.dtype)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The arguments from `in_features` to `rescale`."""
        return self._numbers

    @property
    def buffers(self) -> dict[str, Tensor | None]:
        """The layer's."""
        return self._buffers


def bind_group(layers: Sequence[Bound]) -> Callable[[Tensor, torch.dtype], list[Tensor] | None] | None:
    """One call for layers that code their common input alike: a result for each; None where no backend has one.

    The call gives None where a buffer of a layer lies elsewhere now, or for an input that it does not take.
    """
    described = [(layer.buffers, layer.numbers) for layer in layers]
    return bind("packed_linear_group", layers[0].buffers, {"layers": described})
