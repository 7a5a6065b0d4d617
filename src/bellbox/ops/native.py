"""The compiled CPU kernels: found lazily, called with plain addresses.

`bellbox._native` is built from `native/` when the package is installed; it picks the best instruction set that
the processor has, or the one that the environment variable BELLBOX_ISA names (amx, avx512, avx2, on ARM i8mm,
dotprod, neon; portable; reference for none of them). Where the module was not built (no compiler), everything runs
on the torch reference with the same results, only slower; `describe()` says which.

The compiled module checks what it is given (native/python), whoever calls; a ValueError says what does not fit.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.preconditions import check_rows
from bellbox.utils.files import one_line

TYPES = {torch.float32: 0, torch.bfloat16: 1}
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
        each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.suffix in (".h", ".cpp")
    )
    digests = "".join(
        hashlib.sha256((folder / each).read_bytes()).hexdigest()
        for each in files
        if not each.startswith(("tests/", "onnx/", "executorch/", "runtime/", "include/", "web/"))
    )
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
    return f"native {module.isa()}{'' if module.threads else ', on one thread (built without OpenMP)'}"


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


def serves(x: Tensor, *levels: int) -> bool:
    """Whether the kernels are there and take this tensor and these numbers of levels."""
    return x.is_cpu and x.dtype in TYPES and max(levels) <= MAX_LEVELS and available()


def _required() -> ModuleType:
    module = _module()
    assert module is not None  # callers have asked
    return module


@functools.lru_cache(maxsize=256)
def _table(thresholds: tuple[float, ...]) -> Tensor:
    return torch.tensor(thresholds, dtype=torch.float32, device="cpu")


def encode(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    """`bellbox::encode` on fp32 or bf16 rows; see `bellbox.ops.encode`."""
    check_rows(x, block, r)
    rows, features = x.shape
    codes = x.new_empty(rows, features, dtype=torch.uint8)
    if not codes.numel():
        return codes
    _required().encode(
        x.contiguous(),
        r.contiguous(),
        _table(tuple(thresholds)),
        rows,
        features,
        block,
        codes,
        torch.get_num_threads(),
    )
    return codes


def row_rms(x: Tensor) -> Tensor:
    """`bellbox::row_rms` of fp32 or bf16 rows; see `bellbox.ops.encode`."""
    out = x.new_zeros((len(x), 1), dtype=torch.float64)
    if x.numel():
        _required().row_rms(x.contiguous(), *x.shape, out, torch.get_num_threads())
    return out


def rotate(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    """`bellbox::rotate` on fp32 or bf16 rows; see `bellbox.ops.rotate`."""
    check_rows(x, block)
    out = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        _required().rotate(x.contiguous(), x.shape[-1], block, factor, out, torch.get_num_threads())
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
    check_rows(x, block, r, scale)
    rows, features = x.shape
    x, r, scale = x.contiguous(), r.contiguous(), scale.contiguous()
    x_hat, v = x.new_empty(rows, features, dtype=dtype), x.new_empty(rows, features, dtype=dtype)
    table = _table(tuple(thresholds))
    if not x_hat.numel():
        return x_hat, v
    _required().forward(x, rows, features, block, table, offset, r, scale, x_hat, v, torch.get_num_threads())
    return x_hat, v


def bbq_backward(
    grad: Tensor, v: Tensor, x_hat: Tensor, r: Tensor, gamma: Tensor, free: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """`bellbox::bbq_backward` for a statistic of rows; see `bellbox.ops.fake_quantize`."""
    rows, features = grad.shape
    grad, r, gamma, free = grad.contiguous(), r.contiguous(), gamma.contiguous(), free.contiguous()
    grad_x, dots = torch.empty_like(grad), grad.new_zeros(rows, 1, dtype=torch.float32)
    if not grad.numel():
        return grad_x, dots
    _required().backward(
        grad,
        v.contiguous(),
        x_hat.contiguous(),
        rows,
        features,
        block,
        r,
        gamma,
        free,
        grad_x,
        dots,
        torch.get_num_threads(),
    )
    return grad_x, dots


def keep(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    """`bellbox::keep` on fp32 or bf16 rows; see `bellbox.ops.kept`."""
    check_rows(x, block, r)
    kept = x.new_empty(x.shape, dtype=torch.int8)
    if kept.numel():
        table, threads = _table(tuple(thresholds)), torch.get_num_threads()
        _required().keep(x.contiguous(), *x.shape, block, table, r.contiguous(), kept, threads)
    return kept


def kept_codes(kept: Tensor, thresholds: Sequence[float]) -> Tensor:
    """`bellbox::kept_codes`."""
    codes = kept.new_empty(kept.shape, dtype=torch.uint8)
    if codes.numel():
        table, threads = _table(tuple(thresholds)), torch.get_num_threads()
        _required().encode(kept.contiguous(), _table((1.0,)), table, *kept.shape, 1, codes, threads)
    return codes


def decode_kept(
    kept: Tensor, scale: Tensor, thresholds: Sequence[float], offset: float, dtype: torch.dtype
) -> Tensor:
    """`bellbox::decode_kept` to fp32 or bf16."""
    out = kept.new_empty(kept.shape, dtype=dtype)
    if out.numel():
        table, threads, one = _table(tuple(thresholds)), torch.get_num_threads(), _table((1.0,))
        scale = scale.contiguous()
        _required().forward(kept.contiguous(), *kept.shape, 1, table, offset, one, scale, out, None, threads)
    return out


def bbq_backward_kept(
    grad: Tensor,
    kept: Tensor,
    r: Tensor,
    gamma: Tensor,
    free: Tensor,
    thresholds: Sequence[float],
    offset: float,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`bellbox::bbq_backward_kept` from and to fp32 or bf16."""
    check_rows(grad, block, r, gamma, free)
    grad_x = grad.new_empty(grad.shape, dtype=dtype)
    dots = grad.new_zeros(len(grad), 1, dtype=torch.float32)
    if grad.numel():
        of_rows = (r.contiguous(), gamma.contiguous(), free.contiguous())
        table, threads = _table(tuple(thresholds)), torch.get_num_threads()
        _required().backward_kept(
            grad.contiguous(),
            kept.contiguous(),
            table,
            offset,
            *grad.shape,
            block,
            *of_rows,
            grad_x,
            dots,
            threads,
        )
    return grad_x, dots


def kept_linear(
    kept: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor,
    thresholds: Sequence[float], weight_levels: int, weight_zero_point: float, act_zero_point: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`bellbox::kept_linear` to fp32 or bf16."""
    buffers = {
        "packed": weight.contiguous(), "weight_scale": weight_scale.reshape(-1).contiguous(), "bias": bias,
        "act_scale": act_scale.reshape(1), "act_thresholds": _table(tuple(thresholds)),
    }  # fmt: skip
    out = kept.new_empty((len(kept), weight_scale.numel()), dtype=dtype)
    if out.numel():
        numbers = (kept.shape[1], weight_levels, weight_zero_point, act_zero_point)
        _required().kept_linear(
            kept.contiguous(), row_scale.contiguous(), buffers, *numbers, out, torch.get_num_threads()
        )
    return out


def fingerprint(tensors: Iterable[Tensor | None]) -> tuple[int, ...] | None:
    """Numbers that are others, all but surely, where a byte is; None where the kernels are not there to take them.

    For what is derived from memory that anybody may write: no count of changes sees `.data`, another process or numpy.
    """
    module = _module()
    found: list[int] = []
    for tensor in tensors:
        if tensor is None:
            continue
        if module is None or not tensor.is_cpu or not tensor.is_contiguous():
            return None
        found.append(module.fingerprint(tensor.detach(), tensor.nbytes))
    return tuple(found)
