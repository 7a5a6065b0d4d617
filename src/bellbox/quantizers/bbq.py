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

**Where this differs from the paper.** The statistic `token` is ours. Any number of levels n >= 2 is allowed (n = 3 is
ternary). sigma has a floor of 1e-8 for activations too, so zeros stay finite. RMS is taken of the input, which equals
that of its rotation. Weights get their gamma when the layer is prepared instead of at the first batch: the same
number. A NaN or infinity makes its normalisation group NaN instead of some code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bellbox.errors import BellboxError
from bellbox.hadamard import DEFAULT_BLOCK, block_size
from bellbox.kernels.bbq import bbq_backward, bbq_forward
from bellbox.kernels.encode import (
    SIGMA_FLOOR,
    compute_dtype,
    encode,
    mark,
    normaliser,
    row_sigma,
    static_normaliser,
)
from bellbox.levels import Levels
from bellbox.quantizers.base import Quantizer, Statistic, debug_enabled

GAMMA_INIT = 1.694
EMA_DECAY = 0.99


class _FakeQuantize(torch.autograd.Function):
    """`x_hat` of rows, with the closed-form backward of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [rows, features]
        gamma: Tensor,  # [rows, 1] or []
        r: Tensor,  # [rows, 1] or [1, 1]: 1 / (sigma sqrt(block))
        free: Tensor,  # the shape of r: 1 where sigma depends on x
        levels: Levels,
        block: int,
        whole_tensor: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        work = compute_dtype(x)
        scale = gamma.to(work).reshape(-1, 1) / (levels.n / 2)
        x_hat, v = bbq_forward(x, r, scale, levels.thresholds, levels.offset, block, dtype)
        ctx.save_for_backward(v, x_hat, r, free, gamma)  # the matrix product keeps x_hat anyway
        ctx.levels, ctx.block, ctx.whole_tensor, ctx.input_dtype = levels, block, whole_tensor, x.dtype
        return x_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        v, x_hat, r, free, gamma = ctx.saved_tensors
        (grad,) = grads
        grad = grad.contiguous()
        wide_gamma = gamma.to(r.dtype).reshape(-1, 1)
        g_x, dots = bbq_backward(grad, v, x_hat, r, wide_gamma, free, ctx.block, ctx.whole_tensor)
        # q / (n/2) is x_hat / gamma: no need to code v again. A gamma of exactly zero gets no gradient.
        divisor = torch.where(gamma == 0, math.inf, gamma)
        g_gamma = dots.reshape(gamma.shape) if gamma.dim() else dots.sum(dtype=torch.float64)
        g_gamma = g_gamma / divisor / math.sqrt(max(1, v.numel()))
        return g_x.to(ctx.input_dtype), g_gamma.to(gamma.dtype), None, None, None, None, None, None


class BBQ(Quantizer):
    """Bell Box Quantization of one tensor.

    Args:
        features: length of the last dimension, which is rotated.
        levels: which integers; `Levels.gaussian(n)` for the method proper.
        statistic: `row` for a weight (sigma and gamma per row); `token`, `ema` or `tensor` for an activation.
        block: largest Hadamard block (a power of two); the largest one up to it that divides `features` is used.
        rows: number of rows of a weight; gamma is then `[rows, 1]`. None for an activation: gamma is `[]`.
        gamma_init: initial gamma in units of the RMS of the whole first tensor.

    Raises:
        BellboxError: a statistic that does not belong to the role.
    """

    r_ema: Tensor
    initialized: Tensor

    def __init__(
        self,
        features: int,
        levels: Levels,
        statistic: Statistic = "token",
        block: int = DEFAULT_BLOCK,
        rows: int | None = None,
        gamma_init: float = GAMMA_INIT,
    ) -> None:
        super().__init__()
        if (statistic == "row") != (rows is not None) or statistic not in ("row", "token", "ema", "tensor"):
            choices = "token, ema or tensor for activations; row for weights"
            raise BellboxError(f"statistic {statistic!r} does not fit here: {choices}")
        self.levels, self.statistic, self.gamma_init = levels, statistic, gamma_init
        self.features = features
        self.block = block_size(features, block)
        self.gamma = nn.Parameter(torch.ones(()) if rows is None else torch.ones(rows, 1))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        if statistic == "ema":
            self.register_buffer("r_ema", torch.zeros(()))
        # A mirror of the buffer in Python: reading the buffer would synchronise a GPU and break a compiled graph.
        self._ready = False

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"n={self.levels.n}, zero_point={self.levels.zero_point}, statistic={self.statistic}, block={self.block}"

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set gamma from a first tensor: `gamma_init` times the RMS of all of it.

        A weight calls this when its layer is prepared; an activation does by itself on the first batch.
        """
        rms = x.detach().to(torch.float64).square().mean().sqrt()
        if self.statistic != "row" and not 0 < float(rms) < math.inf:
            return  # a dead or broken first batch says nothing about the scale: wait for the next
        rms = rms.clamp(min=SIGMA_FLOOR)  # a weight that starts at zero stays near it, but can still learn
        self.gamma.copy_((self.gamma_init * rms).to(self.gamma.dtype).expand_as(self.gamma))
        if self.statistic == "ema":
            self.r_ema.copy_(1 / rms)
        self.initialized.fill_(True)
        self._ready = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.initialized)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `[..., features]`; see `Quantizer.forward`."""
        rows = self._rows(x)
        if not self._ready and rows.numel():
            self.initialize(rows)
        r, free = self._normaliser(rows, training=self.training)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        whole_tensor = r.numel() == 1 and self.statistic in ("tensor", "ema")
        x_hat = _FakeQuantize.apply(rows, self.gamma, r, free, self.levels, self.block, whole_tensor, dtype)
        return x_hat.reshape(x.shape)  # type: ignore[union-attr]

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and row marks; see `Quantizer.encode`. Uses the evaluation statistic whatever the mode.

        Like `forward`, it sets gamma where this is the first batch.
        """
        rows = self._rows(x)
        if not self._ready and rows.numel():
            self.initialize(rows)
        r, _ = self._normaliser(rows, training=False)
        codes = encode(rows, r, self.levels.thresholds, self.block)
        return codes.reshape(x.shape), mark(r, len(rows)).reshape(*x.shape[:-1], 1)

    def scale(self) -> Tensor:
        """gamma / (n/2), fp32."""
        return self.gamma.detach().to(torch.float32) / (self.levels.n / 2)

    def why_not_packed(self) -> str | None:
        """See `Quantizer.why_not_packed`."""
        if self.statistic == "tensor":
            return (
                "statistic='tensor' looks at future tokens and at the rest of the batch; "
                "train with statistic='token' or 'ema'"
            )
        if not self._ready:
            return "its scale is not set yet; run one batch through the model first"
        if not self.levels.fits_int8:
            return f"{self.levels.n} levels with zero point {self.levels.zero_point} do not fit int8"
        return None

    def _rows(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != self.features:
            where = f" of {self.name}" if self.name else ""
            raise BellboxError(
                f"input{where} has shape {tuple(x.shape)} and dtype {x.dtype}: "
                f"a float tensor with last dimension {self.features} is needed"
            )
        return x.reshape(-1, self.features)

    @torch.no_grad()
    def _normaliser(self, rows: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """r = 1 / (sigma sqrt(block)) with NaN for non-finite groups, and where sigma depends on the input."""
        work = compute_dtype(rows)
        if self.statistic == "ema" and not training:
            if not self._ready:
                raise BellboxError(
                    f"{self.name or 'an activation quantizer'} has no running scale yet: "
                    "statistic='ema' needs one batch through the model before its codes are asked for"
                )
            r = static_normaliser(self.r_ema, rows, self.block).to(work)
            return self._checked(r, rows), torch.zeros_like(r)
        sigma = row_sigma(rows)
        if self.statistic in ("ema", "tensor"):
            sigma = sigma.square().mean().sqrt().reshape(1, 1)
        if self.statistic == "ema":
            self._update_ema(normaliser(sigma, 1))
        r = normaliser(sigma, self.block).to(work)
        return self._checked(r, rows), (sigma > SIGMA_FLOOR).to(work)

    def _update_ema(self, inverse: Tensor) -> None:
        new = inverse.reshape(()).to(self.r_ema.dtype)
        # A non-finite batch must not spoil the running value for ever.
        self.r_ema.copy_(torch.where(new.isfinite(), torch.lerp(new, self.r_ema, EMA_DECAY), self.r_ema))

    def _checked(self, r: Tensor, rows: Tensor) -> Tensor:
        if debug_enabled() and rows.numel() and not bool(r.isfinite().all()):
            where = self.name or ("a weight" if self.statistic == "row" else "an activation")
            raise BellboxError(f"{where}: the quantizer's input holds NaN or infinity (or an RMS above 1e30)")
        return r
