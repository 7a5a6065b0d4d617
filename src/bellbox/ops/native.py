"""The compiled CPU kernels: found lazily, called with plain addresses.

`bellbox._native` is built from `native/` when the package is installed; it picks the best instruction set that
the processor has, or the one that the environment variable BELLBOX_ISA names (amx, avx512, avx2, portable; reference
for none of them). Where the module was not built (no compiler), everything runs on the torch reference with the same
results, only slower; `describe()` says which.

This module checks what the compiled code takes on trust: device, dtype, contiguity, sizes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bellbox.core.grid import Grid, Levels
from bellbox.errors import BellboxError
from bellbox.utils.files import one_line

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_transform = torch._C._functorch.maybe_current_level  # pyright: ignore[reportAttributeAccessIssue]
TYPES = {torch.float32: 0, torch.bfloat16: 1}
Normalise = Literal["rms", "absmax", "static"]
_NORMALISE: dict[Normalise, int] = {"rms": 0, "absmax": 1, "static": 2}
MAX_LEVELS = 16
"""The kernels serve 2 to 16 levels (1 to 4 bits); more run on the reference."""
MAX_INTEGER = 34
"""Largest magnitude of an activation's integer for which the 16-bit partial sums of AVX2 cannot overflow."""


@functools.cache
def _module() -> ModuleType | None:
    if os.environ.get("BELLBOX_ISA") == "reference":
        return None
    try:
        _native = importlib.import_module("bellbox._native")
    except ModuleNotFoundError as error:
        if error.name != "bellbox._native":
            raise
        return None  # it was not built: the package was installed without a compiler
    except ImportError as error:
        # Built, but not to be loaded here: falling back would be slow for no reason that anybody could see.
        raise BellboxError(
            f"the compiled kernels cannot be loaded ({one_line(error)}): install what is missing (on Debian, "
            "libgomp1), or set BELLBOX_ISA=reference to do without them"
        ) from None
    source = _source()
    if source is not None and getattr(_native, "source", None) != source:
        raise BellboxError(
            "the compiled kernels were built from another version of native/: rebuild them with "
            "`pip install --no-deps --editable .` in the checkout"
        )
    try:
        _native.isa()
    except RuntimeError as error:
        raise BellboxError(str(error)) from None
    return _native


def _source() -> str | None:
    """The digest of the sources beside this package, as CMakeLists.txt takes it; None where there are none."""
    folder = Path(__file__).parents[3] / "native"
    files = sorted(
        each
        for each in folder.glob("*")
        if each.suffix in (".h", ".cpp") and not each.name.startswith("check")
    )
    digests = "".join(hashlib.sha256(each.read_bytes()).hexdigest() for each in files)
    return hashlib.sha256(digests.encode()).hexdigest() if files else None


def compiled() -> ModuleType | None:
    """The compiled kernels, or None where they are not there."""
    return _module()


def available() -> bool:
    """Whether the compiled kernels are there."""
    return _module() is not None


def isa() -> str:
    """The instruction set in use; the compiled kernels must be there."""
    module = _module()
    assert module is not None
    return module.isa()


def describe() -> str:
    """One line for people: which kernels run, such as `native avx512` or `torch reference (...)`."""
    if os.environ.get("BELLBOX_ISA") == "reference":
        return "torch reference (BELLBOX_ISA=reference)"
    module = _module()
    if module is None:
        return (
            "torch reference (the compiled kernels were not built; install with a C++ compiler to get them)"
        )
    return f"native {module.isa()}"


def instruction_sets() -> list[str]:
    """What this processor can run, best first; empty where the kernels were not built."""
    module = _module()
    return module.available().split(", ") if module is not None else []


@contextmanager
def use(isa: str) -> Iterator[None]:
    """Run on one instruction set while the context is open, for tests and comparisons; all threads are affected.

    Raises:
        BellboxError: unknown, or this processor cannot run it.
    """
    module = _module()
    assert module is not None
    before = module.isa()
    try:
        module.use(isa)
    except RuntimeError as error:
        raise BellboxError(str(error)) from None
    try:
        yield
    finally:
        module.use(before)


def can_multiply(weight: Grid, activation: Levels) -> bool:
    """Whether the kernels are there and serve a product of such levels; others run on the reference."""
    largest = max(map(abs, (activation.integers[0], activation.integers[-1])))
    return available() and max(weight.n, activation.n) <= MAX_LEVELS and largest <= MAX_INTEGER


def takes(x: Tensor) -> bool:
    """Whether the kernels, where they are there, take this tensor."""
    return x.is_cpu and x.dtype in TYPES


def direct(x: Tensor) -> bool:
    """Whether the kernels, where they are there, take this tensor now, past torch's dispatcher.

    A compiler, a tracer, a mode (fake tensors, counters of operations), a subclass and a function transform (vmap)
    have to see an operation of torch; for nobody else is it worth the microseconds of being dispatched.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and x.is_cpu
        and x.dtype in TYPES
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and _transform() is None
    )


def serves(x: Tensor, *levels: int) -> bool:
    """Whether the kernels are there and take this tensor and these numbers of levels."""
    return takes(x) and max(levels) <= MAX_LEVELS and available()


@functools.lru_cache(maxsize=256)
def _table(thresholds: tuple[float, ...]) -> tuple[np.ndarray[Any, Any], int]:
    """The thresholds as fp32 in memory that stays where it is, and where that is (asking numpy is slow)."""
    table = np.asarray(thresholds, dtype=np.float32)
    return table, table.ctypes.data


class Coding:
    """How an input is coded, in the form that the kernels take; made once, since a decode step has no time for it.

    Args:
        levels: at most 16.
        block: rotation block; 1 for `absmax`.
        normalise: where sigma comes from: `rms` or `absmax` (largest magnitude) of each row, with a floor of 1e-8, or
            `static`, one number for all.
        rstd: 1/sigma of `static`; not looked at otherwise.
        rescale: the output follows sigma: row_scales are sigma, rounded to fp32, instead of 1. Not for `static`, whose
            sigma is one number: put it into the scale.

    Raises:
        BellboxError: one of these limits is broken.
    """

    def __init__(
        self, levels: Levels, block: int, normalise: Normalise, rstd: float = 0.0, rescale: bool = False
    ) -> None:
        if levels.n > MAX_LEVELS:
            raise BellboxError(f"the kernels code at most {MAX_LEVELS} levels, not {levels.n}")
        if normalise == "absmax" and block != 1:
            raise BellboxError(
                f"normalise='absmax' needs block=1, not {block}: it is taken before a rotation"
            )
        if normalise == "static" and rescale:
            raise BellboxError("a static sigma has no rescale: put it into the scale of the levels")
        module = _module()
        assert module is not None
        shift = int(levels.multiplier * levels.offset)
        self.levels = levels
        self.handle = module.Coding(
            block, levels.thresholds, _NORMALISE[normalise], rstd, rescale, levels.multiplier, shift
        )


def snapshot(tensors: dict[str, Tensor | None]) -> Callable[[dict[str, Tensor | None]], bool]:
    """Remember a module's tensors as they are now.

    Args:
        tensors: by name. Those made in inference mode count no changes and are recognised by identity alone.

    Returns:
        Whether a dictionary has these very tensors, not changed in place since.
    """
    module = _module()
    assert module is not None
    return module.Snapshot(tensors).holds


class Arena:
    """Memory for several weight matrices, one after another, on huge pages where the system gives them.

    Args:
        nbytes: of all of them, each as `packed_size` says.
    """

    def __init__(self, nbytes: int) -> None:
        module = _module()
        assert module is not None
        self.handle = module.Arena(nbytes)


def packed_size(levels: Grid, rows: int, columns: int) -> int:
    """Bytes that the codes of a weight matrix take in the machine's layout."""
    module = _module()
    assert module is not None
    return module.packed_size(_bits(levels), rows, columns)


def _bits(levels: Grid) -> int:
    return (levels.n - 1).bit_length()


class Weights:
    """A weight matrix in the machine's layout.

    Args:
        codes: uint8 `[rows, columns]` slabs from the first row to the last; each but the last has a multiple of 16
            rows. One at a time is looked at, so that an iterator never holds the whole matrix.
        columns: of the matrix.
        levels: what codes stand for; at most 16.
        scale: fp32 `[out]`, what one integer is worth.
        bias: fp32 `[out]`, or None.
        arena: where the codes go; memory of their own where None.
    """

    def __init__(
        self,
        codes: Iterable[Tensor],
        columns: int,
        levels: Grid,
        scale: Tensor,
        bias: Tensor | None,
        arena: Arena | None = None,
    ) -> None:
        module = _module()
        assert module is not None
        scale = scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        arena = arena or Arena(packed_size(levels, len(scale), columns))
        shift = int(levels.multiplier * levels.offset)
        pointer = 0 if bias is None else bias.data_ptr()
        self.rows, self.columns = len(scale), columns
        sizes = _bits(levels), self.rows, columns
        self.handle = module.PackedWeights(
            *sizes, levels.multiplier, shift, scale.data_ptr(), pointer, arena.handle
        )
        first = 0
        for slab in codes:
            slab = slab.contiguous()
            assert slab.shape[1] == columns
            assert first % 16 == 0
            assert first + len(slab) <= self.rows
            self.handle.fill(slab.data_ptr(), columns, first, len(slab))
            first += len(slab)
        assert first == self.rows

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.handle.nbytes


def encode(
    x: Tensor,
    levels: Levels,
    block: int,
    normalise: Normalise,
    rstd: float = 0.0,
    rescale: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Integer levels of rows, coded as `Coding` says.

    Args:
        x: `[rows, features]`, fp32 or bf16, on the CPU.
        levels: as in `Coding`, like all that follows.
        block: a power of two that divides `features`.
        normalise: where sigma comes from.
        rstd: 1/sigma of `static`.
        rescale: whether row_scales carry sigma.

    Returns:
        int8 `[rows, features]`, their int32 sums `[rows]`, and fp32 row_scales `[rows]`: 1, or sigma where `rescale`;
        NaN for a row that is not finite.
    """
    module = _module()
    assert module is not None
    x = x.contiguous()
    rows, features = x.shape
    padded = -(-features // 64) * 64
    integers = x.new_empty(rows, padded, dtype=torch.int8)
    sums, row_scales = x.new_empty(rows, dtype=torch.int32), x.new_empty(rows, dtype=torch.float32)
    module.encode(
        x.data_ptr(),
        TYPES[x.dtype],
        rows,
        features,
        features,
        Coding(levels, block, normalise, rstd, rescale).handle,
        integers.data_ptr(),
        padded,
        sums.data_ptr(),
        row_scales.data_ptr(),
        torch.get_num_threads(),
    )
    return integers[:, :features], sums, row_scales


class Siblings:
    """Weight matrices of one common input, multiplied with it in one call: an object made once, called often.

    Args:
        coding: of the input.
        weights: matrices with the same number of columns.
        act_scales: for each, what one integer of the activation is worth.
    """

    def __init__(self, coding: Coding, weights: Sequence[Weights], act_scales: Sequence[float]) -> None:
        module = _module()
        assert module is not None
        self._kept = coding, tuple(weights)  # the compiled object holds addresses only
        self.handle = module.Siblings(coding.handle, [each.handle for each in weights], list(act_scales))
        self.call: Callable[[Tensor, torch.dtype, int], list[Tensor]] = self.handle.__call__
        """Of an input `[..., columns]`, fp32 or bf16, on the CPU; the dtype of the results, fp32 or bf16; and how many
        threads to use: for each matrix `[..., rows]`."""


def rotate(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    """`bellbox::rotate` on fp32 or bf16 rows; see `bellbox.ops.rotate`."""
    module = _module()
    assert module is not None
    features = x.shape[-1]
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype)
    module.rotate(
        x.data_ptr(),
        TYPES[x.dtype],
        x.numel() // max(1, features),
        features,
        block,
        factor,
        out.data_ptr(),
        TYPES[dtype],
        torch.get_num_threads(),
    )
    return out


def bbq_forward(
    x: Tensor,
    r: Tensor,
    scale: Tensor,
    thresholds: Sequence[float],
    offset: float,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`bellbox::bbq_forward` on fp32 or bf16 rows; see `bellbox.ops.fake_quantize`."""
    module = _module()
    assert module is not None
    rows, features = x.shape
    x, r, scale = x.contiguous(), r.contiguous(), scale.contiguous()
    x_hat, v = torch.empty(rows, features, dtype=dtype), torch.empty(rows, features, dtype=dtype)
    _, table = _table(tuple(thresholds))
    module.forward(
        x.data_ptr(),
        TYPES[x.dtype],
        rows,
        features,
        block,
        table,
        len(thresholds) + 1,
        offset,
        r.data_ptr(),
        int(r.numel() > 1),
        scale.data_ptr(),
        int(scale.numel() > 1),
        x_hat.data_ptr(),
        v.data_ptr(),
        TYPES[dtype],
        torch.get_num_threads(),
    )
    return x_hat, v


def bbq_backward(
    grad: Tensor, v: Tensor, x_hat: Tensor, r: Tensor, gamma: Tensor, free: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """`bellbox::bbq_backward` for a granularity of rows; see `bellbox.ops.fake_quantize`."""
    module = _module()
    assert module is not None
    rows, features = grad.shape
    grad, r, gamma, free = grad.contiguous(), r.contiguous(), gamma.contiguous(), free.contiguous()
    grad_x, dots = torch.empty_like(grad), grad.new_empty(rows, 1, dtype=torch.float32)
    module.backward(
        grad.data_ptr(),
        v.data_ptr(),
        x_hat.data_ptr(),
        TYPES[grad.dtype],
        rows,
        features,
        block,
        r.data_ptr(),
        int(r.numel() > 1),
        gamma.data_ptr(),
        int(gamma.numel() > 1),
        free.data_ptr(),
        int(free.numel() > 1),
        grad_x.data_ptr(),
        dots.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x, dots
