"""Bell Box Quantization (BBQ): every code used equally often, and every code a plain integer.

**What.** A b-bit code carries b bits only if all 2^b values are equally likely. Quantizers that place levels to
minimise the squared error of bell-shaped data use the outer levels rarely (at 2 bits they carry about 1.9
bits); quantizers with equally likely levels (NormalFloat) put them at uneven places, which integer hardware
cannot multiply. BBQ has both: equally likely codes *and* evenly spaced levels, because it gives up the wish that
the dequantized value resemble the input. The network is trained in the quantized domain and learns to use it.

**How** (arXiv 2603.01599, section 3). For a weight matrix, per row; for an activation, per token, say:

1. *Rotate*: a block Hadamard along in_features. Sums of many terms are Gaussian: whatever came in, a bell goes on.
2. *Normalise*: divide by the RMS sigma. Now it is the standard bell, v ~ N(0, 1).
3. *Box*: u = n Phi(v). A variable pushed through its own distribution function is uniform: on (0, n).
4. *Cut*: code k = floor(u). Uniform u, equal cuts: equally likely codes. Since Phi is monotone, k is also the number of
   thresholds Phi^-1(i/n), i = 1..n-1, with v >= threshold. That is how it is computed: no erf, and a tie goes up.
5. *Scale*: level q = k - n/2 - z, value x_hat = gamma q / (n/2), with a learned gamma: one per row of a weight, one
   per activation. There is no way back through Phi, no multiplication by sigma and no inverse rotation: both factors
   of the matrix product are rotated by the same orthonormal matrix, and gamma carries the scale.

So `x W^T` becomes `gamma_x gamma_w / (n/2)^2 * (q_x q_w^T)`: an integer product and one multiplication.

**The gradient.** Straight-through in the rounding only; Phi, the division by sigma and the rotation are
differentiated. With G = dL/dx_hat, phi the normal density and H the rotation:

    g_v     = 2 gamma phi(v) G                      (n Phi has slope n phi, a level is worth gamma/(n/2): n cancels)
    g_x     = H^T [ (g_v - v mean(g_v v)) / sigma ]  (mean over whatever sigma was taken over)
    g_gamma = sum(G q / (n/2)) / sqrt(numel)         (the last factor keeps the step of one scalar in proportion)

phi(v) lets the gradient fade in the tails: no clipping rule is needed. And since x is divided by its own sigma,
g_x is orthogonal to x: the scale of a weight row does not matter, only its direction.

**Statistics of an activation.** `tensor`: the paper's, one sigma over batch, tokens and channels. It looks at future
tokens and at the other sequences of the batch, so it cannot generate; it is here for reproduction. `ema` (BBQ-Fast):
trains like `tensor`, evaluates with E = EMA(1/sigma), decay .99: a static scale. `token`: the RMS of each row; causal
and independent of the batch by construction, and the same function in training and evaluation. It is our default.

**Nested widths.** Thresholds of b bits are every second one of b + 1 bits: floor(2^b Phi) is floor(2^(b+1) Phi) >> 1.
So one weight has codes at every width, and the code of a width is the upper bits of any wider one. With the option
`nested` a quantizer has several widths, a gamma for each, and one of them at a time (`quantizers.nested`).

**Options** (`BBQOptions`) are what the paper's ablations and our studies change: gamma's start, whether and how fast it
is trained, no division by sigma, random signs before the rotation, and BBQ-Vision's fixed zeta: x_hat = zeta sigma q /
(n/2), where sigma is differentiated in both of its places, which adds `x mean(G x_hat) / sigma^2` to g_x.

**Where this differs from the paper.** The granularity `token` is ours. Any number of levels n >= 2 is allowed (n = 3 is
ternary). The weights' sigma may be taken over the whole tensor (`tensor`), with one gamma a row. sigma has a floor of
1e-8 for activations too, so zeros stay finite. RMS is taken of the input, which equals that of its rotation. Weights
get their gamma when the layer is prepared instead of at the first batch: the same number. A NaN or infinity makes its
normalisation group NaN instead of some code.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bellbox.core.grid import Levels
from bellbox.core.hadamard import DEFAULT_BLOCK, butterfly
from bellbox.errors import BellboxError
from bellbox.ops.encode import SIGMA_FLOOR, compute_dtype, normaliser
from bellbox.ops.fake_quantize import bbq_backward, bbq_forward
from bellbox.ops.kept import STEPS, bbq_backward_kept, decode_kept, keep, stepped
from bellbox.ops.rotate import rotation
from bellbox.ops.transforms import (
    TransformableFunction,
    apply,
    differentiated_again,
    refuse_second_derivative,
    transposed,
)
from bellbox.quantizers.base import Normaliser
from bellbox.quantizers.coded import Coded, stand_in
from bellbox.quantizers.learned import LearnedQuantizer, plain_tensor, processes, transforming, unset
from bellbox.quantizers.moments import Moments
from bellbox.quantizers.nested import Width, widths_of
from bellbox.quantizers.spec import Granularity, QuantizerSpec

GAMMA_INIT = 1.694
EMA_DECAY = 0.99


class _FakeQuantize(TransformableFunction):
    """`x_hat` of rows, with the closed-form backward of the module docstring.

    Beside it v and r, on which that backward depends: their gradients serve second derivatives.
    """

    @staticmethod
    def forward(
        x: Tensor,  # [rows, features]
        gamma: Tensor,  # [rows, 1] or []
        r: Tensor,  # [rows, 1] or [1, 1]: 1 / (sigma sqrt(block))
        free: Tensor,  # the shape of r: 1 where sigma depends on x  # noqa: ARG004
        levels: Levels,
        block: int,
        whole_tensor: bool,  # noqa: ARG004
        follow: bool,  # gamma is a multiple of sigma, which is differentiated too  # noqa: ARG004
        dtype: torch.dtype,
        soft: float,  # share of the value before it is cut
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = compute_dtype(x)
        scale = gamma.to(work).reshape(-1, 1) / (levels.n / 2)
        x_hat, v = bbq_forward(x, r, scale, levels.thresholds, levels.offset, block, dtype)
        if soft:
            uncut = gamma.to(work).reshape(-1, 1) * torch.erf(v.to(work) / math.sqrt(2))
            x_hat = torch.lerp(x_hat.to(work), uncut, soft).to(dtype)
        return x_hat, v, r.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, gamma, _, free, _, ctx.block, ctx.whole_tensor, ctx.follow, _, _ = inputs
        x_hat, v, r = output
        # The matrix product keeps x_hat anyway.
        ctx.save_for_backward(v, x_hat, r, free, gamma, x if ctx.follow else None)
        ctx.input_dtype = x.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        v, x_hat, r, free, gamma, x = ctx.saved_tensors
        grad, grad_v, grad_r = grads
        g_x = g_gamma = None
        if grad is not None:
            numbers = ctx.block, ctx.whole_tensor, ctx.follow, ctx.input_dtype
            gradient = partial(apply, _Gradient) if differentiated_again() else _Gradient.forward
            g_x, g_gamma = gradient(grad.contiguous(), v, x_hat, r, free, gamma, x, *numbers)
        if grad_v is not None or grad_r is not None:
            g_u = _through_normaliser(grad_v, grad_r, v, r, free, ctx.whole_tensor)
            more = rotation(g_u.contiguous(), 1.0, ctx.block, ctx.input_dtype)
            g_x = more if g_x is None else g_x + more
        return g_x, None if ctx.follow else g_gamma, *[None] * 8


def _through_normaliser(
    grad_v: Tensor | None, grad_r: Tensor | None, v: Tensor, r: Tensor, free: Tensor, whole_tensor: bool
) -> Tensor:
    """From v = u r and r = 1 / (sigma(u) sqrt(block)) back to u = butterfly(x)."""
    v = v.to(r.dtype)
    numel = v.numel() if whole_tensor else v.shape[-1]
    pulled = torch.zeros_like(v)
    if grad_v is not None:
        wide = grad_v.to(r.dtype)
        along = wide * v
        mean = (along.sum() if whole_tensor else along.sum(-1, keepdim=True)) / numel
        pulled = (wide - v * mean * free) * r
    if grad_r is not None:
        pulled = pulled - v * (grad_r * r.square() * free / numel)
    return pulled


class _Keep(torch.autograd.Function):
    """`_FakeQuantize` for a product on integers: a byte a number is kept in place of x_hat and v."""

    @staticmethod
    def forward(
        x: Tensor,  # [rows, features]
        gamma: Tensor,  # [rows, 1] or []  # noqa: ARG004
        r: Tensor,  # as above, like what follows
        free: Tensor,  # noqa: ARG004
        thresholds: tuple[float, ...],
        offset: float,  # noqa: ARG004
        block: int,
        whole_tensor: bool,  # noqa: ARG004
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        return stand_in(x.shape, dtype, x.device), keep(x, r, thresholds, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, gamma, r, free, thresholds, ctx.offset, ctx.block, ctx.whole_tensor, _ = inputs
        _, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(kept, r, free, gamma)
        ctx.input_dtype, ctx.thresholds = x.dtype, steps_of(thresholds)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_second_derivative()
        kept, r, free, gamma = ctx.saved_tensors
        grad, wide_gamma = grads[0].contiguous(), gamma.to(r.dtype).reshape(-1, 1)
        if ctx.whole_tensor:
            levels = decode_kept(kept, torch.ones_like(r[:1]), ctx.thresholds, ctx.offset, grad.dtype)
            v = kept.to(grad.dtype) / STEPS
            g_x, dots = bbq_backward(grad, v, levels, r, wide_gamma, free, ctx.block, True)
        else:
            numbers = ctx.thresholds, ctx.offset, ctx.block, ctx.input_dtype
            g_x, dots = bbq_backward_kept(grad, kept, r, wide_gamma, free, *numbers)
        dots = dots * (r - r + 1)  # bytes hold no NaN: a row that is not finite has it here
        half = (len(ctx.thresholds) + 1) / 2  # n/2 levels are worth gamma
        g_gamma = dots.reshape(gamma.shape) if gamma.dim() else dots.sum(dtype=torch.float64)
        g_gamma = g_gamma / half / math.sqrt(max(1, kept.numel()))
        return g_x.to(ctx.input_dtype), g_gamma.to(gamma.dtype), *[None] * 7


@functools.cache
def steps_of(thresholds: tuple[float, ...]) -> tuple[float, ...]:
    """`stepped` of thresholds that bytes tell apart."""
    found = stepped(thresholds)
    assert found is not None
    return found


class _Gradient(TransformableFunction):
    """The closed-form backward: the gradients to x and gamma."""

    @staticmethod
    def forward(
        grad: Tensor,
        v: Tensor,
        x_hat: Tensor,
        r: Tensor,
        free: Tensor,
        gamma: Tensor,
        x: Tensor | None,
        block: int,
        whole_tensor: bool,
        follow: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wide_gamma = gamma.to(r.dtype).reshape(-1, 1)
        g_x, dots = bbq_backward(grad, v, x_hat, r, wide_gamma, free, block, whole_tensor)
        if follow:  # x_hat is a multiple of sigma: d sigma / dx = x / (numel sigma)
            assert x is not None
            dots = dots.sum().reshape(1, 1) if whole_tensor else dots
            numel = v.numel() if whole_tensor else v.shape[-1]
            inverse = r * math.sqrt(block)
            g_x = g_x + x * (dots * inverse.square() * free / numel)
            return g_x.to(dtype), dots
        # q / (n/2) is x_hat / gamma: no need to code v again. A gamma of exactly zero gets no gradient.
        divisor = torch.where(gamma == 0, math.inf, gamma)
        g_gamma = dots.reshape(gamma.shape) if gamma.dim() else dots.sum(dtype=torch.float64)
        g_gamma = g_gamma / divisor / math.sqrt(max(1, v.numel()))
        return g_x.to(dtype), g_gamma.to(gamma.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        grad, v, x_hat, r, free, gamma, _, ctx.block, ctx.whole_tensor, ctx.follow, _ = inputs
        ctx.save_for_backward(grad, v, x_hat, r, free, gamma)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, v, x_hat, r, free, gamma = ctx.saved_tensors
        block, whole_tensor, follow = ctx.block, ctx.whole_tensor, ctx.follow
        work = r.dtype
        given = gamma.detach().to(work).reshape(-1, 1)
        codes = x_hat.detach().to(work) / torch.where(given == 0, math.inf, given)  # constants
        zeta = given * r.detach() * math.sqrt(block)

        def formula(grad: Tensor, v: Tensor, r: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
            gamma = zeta / (r * math.sqrt(block)) if follow else gamma.to(work).reshape(-1, 1)
            soft = torch.exp(-v * v / 2) * (2 / math.sqrt(2 * math.pi)) * gamma * grad
            g_u = _through_normaliser(soft, None, v, r, free, whole_tensor)
            level = (grad * codes).sum(-1, keepdim=True)
            if follow:
                total = (level * gamma).sum().reshape(1, 1) if whole_tensor else level * gamma
                numel = v.numel() if whole_tensor else v.shape[-1]
                # x is butterfly(v / r) / block: its share goes through the same rotation
                g_u = g_u + v * (total * r * free / numel)
                return butterfly(g_u, block), total
            level = level.reshape(ctx_shape) if ctx_shape else level.sum()
            return butterfly(g_u, block), level / math.sqrt(max(1, v.numel()))

        ctx_shape = tuple(gamma.shape)
        inputs = grad.to(work), v.to(work), r, gamma
        g_grad, g_v, g_r, g_gamma = transposed(formula, inputs, grads)
        return (
            g_grad.to(grad.dtype), g_v.to(v.dtype), None, g_r, None, None if follow else g_gamma, *[None] * 5
        )  # fmt: skip


def boxed(
    rows: Tensor, norm: Normaliser, levels: Levels, block: int, whole_tensor: bool, dtype: torch.dtype
) -> Tensor:
    """Levels of `[rows, features]` over n/2 in `dtype`, with BBQ's gradient to the rows; no scale.

    Args:
        rows: float.
        norm: their normaliser.
        levels: grid and thresholds.
        block: rotation block.
        whole_tensor: whether `norm` is of all rows together.
        dtype: of the result.
    """
    unit = torch.ones((), dtype=norm.r.dtype, device=rows.device)
    return apply(
        _FakeQuantize, rows, unit, norm.r, norm.free, levels, block, whole_tensor, False, dtype, 0.0
    )[0]


@dataclass(frozen=True)
class BBQOptions:
    """What the paper's ablations and our own studies change."""

    gamma_init: float | Literal["optimal", "one"] = GAMMA_INIT
    """Initial gamma in units of the RMS of the whole first tensor; `optimal`: of least squared error for a Gaussian;
    `one`: 1, whatever the tensor, as in the paper's ablation without gamma's start (Table 5)."""
    gamma: Literal["learned", "frozen"] = "learned"
    """Whether gamma is trained."""
    gamma_lr: float = 1.0
    """Learning rate of gamma, as a multiple of everything else's."""
    rms: bool = True
    """False for no division by sigma: thresholds compare with the rotated value itself."""
    zeta: float | None = None
    """BBQ-Vision: gamma is not learned but zeta * sigma, and sigma is differentiated there too."""
    signs: bool = False
    """Fixed random signs before the rotation, the same for all tensors of one width."""
    nested: str = ""
    """Widths in bits that the quantizer has, the widest first: `4,3,2,1`; empty for the one that its levels say."""

    def __post_init__(self) -> None:
        for name in ("gamma_init", "gamma_lr", "zeta"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise BellboxError(f"{name} {value}: must be a finite number above 0, such as 1.694")


def bin_moments(levels: Levels) -> list[float]:
    """E[v; v in the bin] of a standard normal variable v for each code, rising: phi(t_k) - phi(t_(k+1))."""
    edges = [0.0, *(math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in levels.thresholds), 0.0]
    return [edges[code] - edges[code + 1] for code in range(levels.n)]


def optimal_gamma(levels: Levels) -> float:
    """gamma / sigma of least squared error for Gaussian data: E[v q'] / E[q'^2], q' = q / (n/2).

    Examples: 1.596 at 1 bit, 1.655 at 2, 1.603 at 3, 1.669 at 4; its limit is 3 / sqrt(pi) = 1.693.
    """
    values = [(code - levels.offset) / (levels.n / 2) for code in range(levels.n)]
    product = sum(q * moment for q, moment in zip(values, bin_moments(levels), strict=True))
    return product / (sum(q * q for q in values) / levels.n)


class BBQ(LearnedQuantizer):
    """Bell Box Quantization of one tensor; see `Quantizer` for the arguments.

    Statistics: `row` or `tensor` for a weight (gamma is `[rows, 1]` in both); `token`, `ema` or `tensor` for an
    activation, whose gamma is `[1]`.
    """

    method = "bbq"
    training_options = frozenset({"gamma_init", "gamma", "gamma_lr"})
    later_options = frozenset({"nested"})
    Options = BBQOptions
    own_block: ClassVar[int] = DEFAULT_BLOCK
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("row", "tensor")
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("token", "ema", "tensor")

    options: BBQOptions
    gamma: nn.Parameter
    """Of the widest width, where there are several."""
    r_ema: Tensor
    soft: float = 0.0
    """In training, the share of a value that is not cut yet: of `gamma (2 Phi(v) - 1)`, which the gradient is that of
    in any case (`bellbox.training.soften`)."""
    waiting: list[Tensor] | None = None
    """The 1/sigma of batches that the running scale is still to move by (`quantizers.running`)."""

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self._by_bits = {width.bits: width for width in widths_of(self.options.nested, self._levels)}
        self._active = next(iter(self._by_bits.values()), None)
        self.rescale = self.options.zeta is not None
        if not self.options.rms:
            self.normalise = "static"
        if self.rescale:
            if not self.options.rms or self.granularity == "ema":
                raise BellboxError(
                    "zeta multiplies by each input's sigma: not with rms=false or granularity='ema'"
                )
        else:  # else nothing is learned
            for name in self._gammas:
                start = unset(1) if rows is None else unset(rows, 1)
                self.register_parameter(name, nn.Parameter(start, self.options.gamma == "learned"))
        if self.granularity == "ema":
            self.register_buffer("r_ema", unset(1))
        if self.options.signs:
            draw = torch.Generator().manual_seed(features)
            drawn = torch.randint(2, (features,), generator=draw, dtype=torch.int8, device="cpu")
            self.register_buffer("signs", 1 - 2 * drawn)
        self.learning_rates = dict.fromkeys(self._gammas, self.options.gamma_lr)

    @property
    def _gammas(self) -> list[str]:
        """Names of the scales, that of the widest width first."""
        return [width.gamma for width in self._by_bits.values()] or ["gamma"]

    @property
    def levels(self) -> Levels:
        """Of the width that is used now."""
        return self._levels if self._active is None else self._active.levels

    @property
    def widths(self) -> tuple[int, ...]:
        """See `Quantizer`."""
        return tuple(self._by_bits)

    @property
    def learned_scale(self) -> Tensor | None:
        """See `Quantizer`."""
        return self._parameters.get("gamma" if self._active is None else self._active.gamma)

    def use_bits(self, bits: int) -> None:
        """See `Quantizer`."""
        if bits not in self._by_bits:
            super().use_bits(bits)
        self._active = self._by_bits[bits]

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Gaussian quantiles between any number of levels; those of nested widths lie about zero unless it is said."""
        nested = self.options.nested and zero_point is None
        return Levels.gaussian(n, -0.5 if nested else zero_point)

    def learned_gamma(self) -> Tensor:
        """The scale of the width that is used now, as it is computed with.

        The other widths' are in the graph with a gradient of zero, so that processes that train together exchange the
        same gradients whatever widths their forwards had.
        """
        if self._active is None:
            return self.learned("gamma")
        gamma = self.learned(self._active.gamma)
        if torch.is_grad_enabled():
            for name in self._gammas:
                if name != self._active.gamma:
                    gamma = gamma + 0 * self.learned(name)
        return gamma

    def set_from_moments(self, moments: Moments) -> None:
        """gamma is `gamma_init` times the RMS of the whole tensor, or one."""
        if self.options.zeta is not None:
            return
        rms = moments.rms.clamp(min=SIGMA_FLOOR)  # a weight that starts at zero can still learn
        init = self.options.gamma_init
        for width in list(self._by_bits.values()) or [Width(0, self._levels, "gamma")]:
            gamma: Tensor = getattr(self, width.gamma)
            if init == "one":
                gamma.fill_(1.0)
            else:
                ratio = optimal_gamma(width.levels) if init == "optimal" else init
                gamma.copy_((ratio * rms).to(gamma.dtype).expand_as(gamma))
        if self.granularity == "ema":
            self.r_ema.copy_(1 / rms)

    @torch.no_grad()
    def continue_from(self, before: LearnedQuantizer) -> bool:
        """gamma is what n/2 levels are worth, whatever n is: it serves another width, and so does the running scale."""
        plain = {"nested": ""}
        alike = (
            type(before) is type(self)
            and (before.block, before.granularity, before.rows) == (self.block, self.granularity, self.rows)
            and replace(before.options, **plain) == replace(self.options, **plain)
            and before.is_set
        )
        if not isinstance(before, BBQ) or not alike or self.options.zeta is not None:
            return False
        for name in self._gammas:
            getattr(self, name).copy_(before.learned_gamma())
        if self.granularity == "ema":
            self.r_ema.copy_(before.r_ema)
        return True

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with BBQ's gradient."""
        whole = norm.r.numel() == 1 and self.granularity in ("tensor", "ema")
        follow = self.options.zeta is not None
        if self.options.zeta is None:
            gamma = self.divided_by_row(self.learned_gamma(), rows)
        else:
            assert norm.sigma is not None
            gamma = (self.options.zeta * norm.sigma * (norm.r - norm.r + 1)).to(compute_dtype(rows))
        arguments = self.levels, self.block, whole, follow, dtype, self.soft if self.training else 0.0
        return apply(_FakeQuantize, rows, gamma, norm.r, norm.free, *arguments)[0]

    @property
    def keeps_bytes(self) -> bool:
        """Whether bytes do for the backward: cut, of size 1, a learned gamma, thresholds that bytes tell apart."""
        plain = self.options.rms and self.options.zeta is None and not (self.soft and self.training)
        return plain and stepped(self.levels.thresholds) is not None

    def coded_rows(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Coded:
        """`[rows, features]` as codes for a product on integers, with BBQ's gradient."""
        if not self.keeps_bytes:
            return super().coded_rows(rows, norm, dtype)
        whole = norm.r.numel() == 1 and self.granularity in ("tensor", "ema")
        numbers = self.levels.thresholds, self.levels.offset, self.block, whole, dtype
        gamma = self.divided_by_row(self.learned_gamma(), rows)
        value, kept = _Keep.apply(rows, gamma, norm.r, norm.free, *numbers)  # type: ignore[misc]
        return Coded(value, kept, steps_of(self.levels.thresholds), self.scale(), norm.r - norm.r + 1)

    def scale(self) -> Tensor:
        """gamma / (n/2), fp32."""
        if self.options.zeta is not None:
            return torch.tensor(self.options.zeta / (self.levels.n / 2))
        return self.learned_gamma().detach().to(torch.float32) / (self.levels.n / 2)

    def rstd(self) -> Tensor:
        """The running 1/sigma, or 1 without RMS."""
        return self.learned("r_ema") if self.options.rms else torch.ones((), device=self.gamma.device)

    @torch.no_grad()
    def normaliser(self, rows: Tensor, training: bool) -> Normaliser:
        """What rows are multiplied with; in training the running scale is updated and the batch's own is used."""
        if self.granularity != "ema" or not self.options.rms:
            return super().normaliser(rows, training)
        if training:
            sigma = self.measure(rows)
            self._update_ema(normaliser(sigma, 1))
            return self.normaliser_of(sigma, rows)
        if not torch.compiler.is_compiling() and not rows.is_meta and not self.is_set:
            raise BellboxError(
                f"{self.name or 'an activation quantizer'} has no running scale yet: "
                "granularity='ema' needs one batch through the model before its codes are asked for"
            )
        return super().normaliser(rows, training)

    def _update_ema(self, inverse: Tensor) -> None:
        if transforming() and plain_tensor(self.r_ema) is self.r_ema:
            raise BellboxError(
                f"{self.name or 'an activation quantizer'}: granularity='ema' keeps a running scale in training, which "
                "torch.func cannot change: use model.eval(), or granularity='token'"
            )
        if self.waiting is not None and not torch.compiler.is_compiling():
            self.waiting.append(inverse)
            return
        if processes() > 1:  # the batch is that of all processes, so that they keep one running scale
            squares = inverse.to(torch.float64).square().reciprocal()
            torch.distributed.all_reduce(squares)
            inverse = (squares / processes()).rsqrt()
        self.move(inverse)

    def move(self, inverse: Tensor) -> None:
        """Move the running scale towards the 1/sigma of one batch, fp64 of one entry."""
        new = inverse.reshape(1).to(self.r_ema.dtype)
        # A non-finite batch must not spoil the running value for ever.
        self.r_ema.copy_(torch.where(new.isfinite(), torch.lerp(new, self.r_ema, EMA_DECAY), self.r_ema))
