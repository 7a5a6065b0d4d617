"""The contract that every quantization method keeps, and nothing about layers or models.

A quantizer turns a float tensor into codes and back. Two views of it must be the same function:

- `forward(x)`: fake quantization. Returns the dequantized tensor, differentiable, for training.
- `encode(x)` with `scale()`: the stored integers and what one level is worth, for evaluation and packing.

Every method whose levels are an integer grid is, on rows of its input:

    v = butterfly(x) * r;  code = number of thresholds t with v >= t;  q = code - offset;  x_hat = scale * row_scale * q

and methods differ in four things: what a row is divided by (`measure`, or a stored number: `rstd`), whether the
result is multiplied by it again (`rescale`: row_scale is then sigma, else 1), the thresholds (`levels`), and the way
back.
A tie goes up. Both sides of a product live in the rotated domain (`block`) and are never rotated back.

A new method is a small class: see `docs/methods.md`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size
from bellbox.errors import BellboxError
from bellbox.ops.encode import (
    MEASURES,
    SIGMA_FLOOR,
    compute_dtype,
    encode,
    normaliser,
    result_dtype,
    row_scale,
    static_normaliser,
)
from bellbox.ops.kept import thresholds_of_codes
from bellbox.ops.rotate import rotation
from bellbox.quantizers.coded import Coded
from bellbox.quantizers.registry import METHODS, NoOptions, read_options
from bellbox.quantizers.spec import Granularity, QuantizerSpec

_debug = os.environ.get("BELLBOX_DEBUG", "") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Raise `BellboxError` on NaN or infinity in a quantizer's input instead of passing it on as NaN.

    Costs one look at a small tensor a call. Also switched on by the environment variable BELLBOX_DEBUG=1.

    Examples:
        >>> from bellbox.quantizers import build_quantizer, set_debug
        >>> quantizer = build_quantizer(bb.QuantizerSpec("quest", 4), 64, None, "input of fc")
        >>> set_debug(True)
        >>> try:
        ...     quantizer(torch.full((1, 64), float("nan")))
        ... except bb.BellboxError as error:
        ...     print(error)
        ... finally:
        ...     set_debug(False)
        input of fc: the quantizer's input holds NaN or infinity (or an RMS above 1e30)
    """
    global _debug
    _debug = enabled


def debug_enabled() -> bool:
    """Whether non-finite inputs raise."""
    return _debug


class Normaliser(NamedTuple):
    """What rows are multiplied with, and what it was made of."""

    r: Tensor
    """`[rows, 1]` or `[1, 1]`, compute dtype: 1 / (sigma sqrt(block)); NaN where sigma is not finite."""
    sigma: Tensor | None
    """fp64, the shape of `r`, at least 1e-8; None where 1/sigma is a stored number."""
    free: Tensor
    """The shape of `r`: 1 where sigma follows the input, 0 where it is constant."""


class Quantizer(nn.Module, ABC):
    """One tensor's quantizer: a weight matrix, or the input of one or several sibling layers.

    Args:
        features: length of the last dimension.
        spec: method and numbers.
        rows: rows of a weight; None for an activation.

    Raises:
        BellboxError: options or a granularity that the method does not have, or an activation of a weight-only method.

    Examples:
        >>> from bellbox.quantizers import build_quantizer
        >>> quantizer = build_quantizer(bb.QuantizerSpec("quest", 4), features=64, rows=None, name="an input").eval()
        >>> x = torch.randn(2, 64)
        >>> codes, row_scales = quantizer.encode(x)
        >>> levels = quantizer.levels.decode(codes)
        >>> torch.allclose(quantizer(x), quantizer.scale() * row_scales * levels)  # two views, one function
        True
    """

    method: ClassVar[str]
    """Its name in recipes."""
    Options: ClassVar[type] = NoOptions
    """A frozen dataclass: the method's own options."""
    own_block: ClassVar[int] = 1
    """Largest rotation block where a recipe names none."""
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("row",)
    """Statistics that a weight may have, the default first."""
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("token",)
    """Likewise for activations; empty where the method quantizes weights only."""
    on_grid: ClassVar[bool] = True
    """Whether its levels are evenly spaced, so that products run on integers."""
    measured: ClassVar[Literal["rms", "absmax"]] = "rms"
    """What a row is divided by under the granularities `row` and `token`."""
    training_options: ClassVar[frozenset[str]] = frozenset()
    """Names of options that only training depends on: states of different ones are of one function."""
    later_options: ClassVar[frozenset[str]] = frozenset()
    """Names of options that came after states were written: at their defaults no record of a state counts them."""
    decayed: tuple[str, ...] = ()
    """Names of own parameters that weight decay pulls on."""
    refits: ClassVar[bool] = False
    """Whether `refit` fits something to the weight anew, such as a codebook."""
    refit_every: int = 0
    """Training steps between such fits; 0 for never."""
    by_squared_gradients: bool = False
    """Whether they want the squared gradients of the weight."""

    own_levels: ClassVar[int] = 4
    """Levels where a recipe names none."""
    granularity: Granularity
    normalise: Literal["rms", "absmax", "norm", "static", "tensor"]
    """Where 1/sigma comes from in evaluation; `tensor` exists for training only. `norm` is the RMS, with a row scale
    that gives levels the L2 norm of the row."""
    rescale: bool = False
    """Whether the result is multiplied by sigma again."""
    signs: Tensor | None
    """int8 `[features]` of +-1, multiplied with before the rotation; None for none."""
    learning_rates: dict[str, float]
    """Own parameter -> its learning rate, as a multiple of everything else's."""
    name: str = ""
    """Dotted name of the layer it belongs to, for messages."""
    samples: bool = False
    """Whether a row is a whole sample `[pixels, features]`, as of a convolution's input; else a vector of features."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "method" in cls.__dict__:
            METHODS[cls.method] = cls

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__()
        self.features, self.rows, self.spec = features, rows, spec
        self.options = read_options(self.method, self.Options, spec.options)
        self.granularity = self._choose_granularity(spec.granularity)
        each = self.granularity in ("row", "token")
        self.normalise = self.measured if each else "tensor" if self.granularity == "tensor" else "static"
        self.block = block_size(features, self.own_block if spec.block is None else spec.block)
        if self.measured == "absmax" and self.block != 1:
            raise BellboxError(
                f"{self.method} divides by the largest magnitude, taken before any rotation: block=1"
            )
        self._levels = self.make_levels(spec.levels, spec.zero_point)
        self.register_buffer("signs", None)
        self._signs_of_meta: Tensor | None = None
        self.learning_rates = {}

    @property
    def levels(self) -> Levels:
        """The integers that codes stand for, and the thresholds between them."""
        return self._levels

    @property
    def widest_levels(self) -> Levels:
        """Of the widest width that the quantizer has: what its state is of, whatever width is used now."""
        return self._levels if self.widths else self.levels

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of the widths that it can be used at, the widest first; empty where it has the one of its levels."""
        return ()

    @property
    def learned_scale(self) -> Tensor | None:
        """The parameter `gamma` of the width that is used now; None where the method has none."""
        return getattr(self, "gamma", None)

    def use_bits(self, bits: int) -> None:
        """Quantize at another of its widths from now on. `bellbox.set_bits` does so for a model, and checks it whole.

        Raises:
            BellboxError: it does not have this width.
        """
        there = f"it has {', '.join(map(str, self.widths))}" if self.widths else "it has one width only"
        raise BellboxError(f"{self.name or 'a quantizer'} cannot be used at {bits} bits; {there}")

    def thresholds(self, device: torch.device) -> Tensor:
        """The thresholds between codes: fp32 `[n - 1]`."""
        return torch.tensor(self.levels.thresholds, dtype=torch.float32, device=device)

    @property
    def is_set(self) -> bool:
        """Whether everything that it learns has a value; see `LearnedQuantizer`."""
        return True

    @property
    def scales_a_row(self) -> int:
        """Scales that a row of a weight needs beside its codes."""
        return 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A move. Scales do not become bf16 or fp16: steps of a learning rate would be lost in those.

        Signs follow from the specification: they outlive the meta device, where memory has no content.
        """
        before = self.signs
        super()._apply(_not_narrower(fn), recurse)  # pyright: ignore[reportUnknownMemberType]
        if before is not None and self.signs is not None:
            if self.signs.is_meta and not before.is_meta:
                self._signs_of_meta = before.to("cpu")
            elif before.is_meta and not self.signs.is_meta and self._signs_of_meta is not None:
                self.signs.copy_(self._signs_of_meta)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        levels = f"n={self.levels.n}, zero_point={self.levels.zero_point}"
        return f"{levels}, granularity={self.granularity}, block={self.block}"

    @abstractmethod
    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """The grid and its thresholds.

        Raises:
            BellboxError: a number of levels or a zero point that the method does not have.
        """

    @abstractmethod
    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, differentiable."""

    @abstractmethod
    def scale(self) -> Tensor:
        """What one level is worth (before `rescale`), fp32: `[rows, 1]` or `[]` for weights, `[]` for activations."""

    def initialize(self, x: Tensor) -> None:
        """Set what is learned from a first tensor. A weight's is called when its layer is prepared."""

    def refit(self, x: Tensor, squared_gradients: Tensor | None = None) -> None:
        """Fit anew what follows from the weight as a whole, where the method `refits`.

        Args:
            x: the weight as it is now, `[rows, features]`.
            squared_gradients: mean or sum over steps of the squared gradient of each entry, the shape of `x`; None
                where every entry counts alike.
        """
        raise NotImplementedError

    def rstd(self) -> Tensor:
        """The stored 1/sigma of a static granularity, `[]` or `[rows, 1]`."""
        raise NotImplementedError

    def measure(self, rows: Tensor) -> Tensor:
        """What rows are divided by, fp64 `[rows, 1]`, or `[1, 1]` for all together."""
        sigma = MEASURES[self.measured](rows)
        if self.granularity not in ("tensor", "ema"):
            return sigma
        together = sigma.amax() if self.measured == "absmax" else sigma.square().mean().sqrt()
        return together.reshape(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize: `[..., features]` to the same shape, rotated domain, autocast dtype where active."""
        rows = self.rows_of(x)
        self.see_first(rows)
        dtype = result_dtype(x)
        norm = self.normaliser(rows, training=self.training)
        return self.fake_quantize(rows, norm, dtype).reshape(x.shape)

    @property
    def keeps_bytes(self) -> bool:
        """Whether `coded` keeps less for the backward than `forward` does."""
        return False

    def coded(self, x: Tensor) -> Coded:
        """`forward`, as codes that a product on integers takes: `[..., features]`, of at most 128 levels.

        Other normalisers than `norm`.
        """
        rows = self.rows_of(x)
        self.see_first(rows)
        norm = self.normaliser(rows, training=self.training)
        return self.coded_rows(rows, norm, result_dtype(x))

    def coded_rows(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Coded:
        """`coded` of `[rows, features]`; gradients are those of `fake_quantize`, to `dtype`."""
        value = self.fake_quantize(rows, norm, dtype)
        with torch.no_grad():
            codes = self.codes_of(rows, norm.r).view(torch.int8)
            row_scales = row_scale(norm.r, len(rows), norm.sigma if self.rescale else None)
        return Coded(value, codes, thresholds_of_codes(self.levels.n), self.scale(), row_scales)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and what each row's result is multiplied with. As in evaluation, whatever the mode.

        Like `forward`, it sets the scales where this is the first batch.

        Args:
            x: `[..., features]`.

        Returns:
            uint8 codes `[..., features]`, and fp32 row scales `[..., 1]` (of samples `[samples, 1]`): 1.0, or sigma
            where `rescale`; NaN for a row with a non-finite entry.
        """
        rows = self.rows_of(x)
        self.see_first(rows)
        norm = self.normaliser(rows, training=False)
        codes = self.codes_of(rows, norm.r)
        row_scales = row_scale(norm.r, len(rows), norm.sigma if self.rescale else None)
        return codes.reshape(x.shape), row_scales.reshape(self._shape_of_marks(x))

    def codes_of(self, rows: Tensor, r: Tensor) -> Tensor:
        """uint8 codes of `[rows, features]`, normalised by `r`."""
        return encode(rows, r, self.levels.thresholds, self.block)

    def rotate(self, x: Tensor) -> Tensor:
        """`[..., features]` in the rotated domain and not quantized: the other side of a product with this one."""
        return rotate_vectors(self.rows_of(x), self.block).reshape(x.shape)

    def table(self) -> Tensor | None:
        """The values of the codes, rising, `[n]`, where they are not evenly spaced."""
        return None

    @torch.no_grad()
    def packed_scales(self, x: Tensor, row_scales: Tensor) -> Tensor:
        """What levels of a weight are worth, as a packed layer stores it: fp32 `[rows]`, or `[rows, groups]`.

        Args:
            x: the weight, `[rows, features]`.
            row_scales: what `encode` gave for it.
        """
        del x
        return (self.scale() * row_scales).reshape(-1).to(torch.float32)

    def codes(self, x: Tensor) -> Tensor:
        """Only the codes of `encode`."""
        return self.encode(x)[0]

    def why_not_packed(self) -> str | None:
        """None where it can be packed into integers and run causally, else the reason and the way out."""
        if not self.on_grid:
            return (
                f"{self.method} needs a float product: its levels are not evenly spaced; linear layers have one with "
                "weight_only='float'"
            )
        if self.granularity == "tensor" and self.rows is None:
            return (
                "granularity='tensor' looks at future tokens and at the rest of the batch; "
                "train with granularity='token' or 'ema'"
            )
        if self.rows is None and not self.is_set:  # a weight's scale follows from the weight
            return "its scale is not set yet; run one batch through the model first, or bb.calibrate(model, batches)"
        if not self.levels.fits_int8:
            return f"{self.levels.n} levels with zero point {self.levels.zero_point} do not fit int8"
        return None

    @torch.no_grad()
    def normaliser(self, rows: Tensor, training: bool) -> Normaliser:  # noqa: ARG002 (for methods with a running scale)
        """What `[rows, features]` are multiplied with, NaN for groups that are not finite."""
        work = compute_dtype(rows)
        if self.normalise == "static":
            r = static_normaliser(self.rstd(), rows, self.block).to(work)
            return Normaliser(self._checked(r, rows), None, torch.zeros_like(r))
        return self.normaliser_of(self.measure(rows), rows)

    def normaliser_of(self, sigma: Tensor, rows: Tensor) -> Normaliser:
        """The normaliser that follows from fp64 `sigma`, `[rows, 1]` or `[1, 1]`."""
        work = compute_dtype(rows)
        r = self._checked(normaliser(sigma, self.block).to(work), rows)
        return Normaliser(r, sigma.clamp(min=SIGMA_FLOOR), (sigma > SIGMA_FLOOR).to(work))

    def _choose_granularity(self, asked: Granularity | None) -> Granularity:
        weight = self.rows is not None
        offered = self.weight_granularities if weight else self.activation_granularities
        if not offered:
            raise BellboxError(
                f"{self.method} quantizes weights only: choose another method for activations, or weight_only"
            )
        if asked is not None and asked not in offered:
            role = "weights" if weight else "activations"
            raise BellboxError(
                f"granularity {asked!r} does not fit {role} of {self.method}: {' or '.join(offered)}"
            )
        return asked or offered[0]

    def see_first(self, rows: Tensor) -> None:
        """Set what is learned and not set yet from the first rows that come."""

    def rows_of(self, x: Tensor) -> Tensor:
        """An input or a weight as the rows that are coded, signs changed: `[rows, features]`.

        Raises:
            BellboxError: another last dimension, or no floats.
        """
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] != self.features:
            where = f" of {self.name}" if self.name else ""
            raise BellboxError(
                f"input{where} has shape {tuple(x.shape)} and dtype {x.dtype}: "
                f"a float tensor with last dimension {self.features} is needed"
            )
        x = x if self.signs is None else x * self.signs
        return x.flatten(1) if self.samples else x.reshape(-1, self.features)

    def _shape_of_marks(self, x: Tensor) -> tuple[int, ...]:
        return (len(x), 1) if self.samples else (*x.shape[:-1], 1)

    def _checked(self, r: Tensor, rows: Tensor) -> Tensor:
        if debug_enabled() and rows.numel() and not bool(r.isfinite().all()):
            where = self.name or ("an activation" if self.rows is None else "a weight")
            raise BellboxError(f"{where}: the quantizer's input holds NaN or infinity (or an RMS above 1e30)")
        return r


def rotate_vectors(x: Tensor, block: int) -> Tensor:
    """The orthonormal rotation of `[..., features]`, in the autocast dtype where active."""
    if block == 1:
        return x
    return rotation(x, block**-0.5, block, result_dtype(x))


def _not_narrower(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` does to a tensor, but that fp32 does not become a type of half its size."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        narrower = tensor.dtype == torch.float32 and result.dtype in (torch.bfloat16, torch.float16)
        return tensor.to(result.device) if narrower else result

    return moved
