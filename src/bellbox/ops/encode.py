"""From float rows to codes: rotate, normalise, compare with thresholds.

The evaluation path of every backend must give the codes that this reference gives, so each step is pinned: the
order of additions (`hadamard`), sums of squares in fp64, one rounding of the normaliser to fp32, comparisons
instead of erf.

On a CPU the rows are worked on in chunks that stay in the cache, with scratch memory made once a call: fresh
pages cost more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bellbox.core.hadamard import butterfly, butterfly_between
from bellbox.errors import BellboxError
from bellbox.ops.batching import rows_together
from bellbox.ops.dispatch import Operation
from bellbox.ops.preconditions import check_rows

SIGMA_FLOOR = 1e-8
# Above it the fp32 additions of a rotation could overflow (sums reach sigma sqrt(features block)), and inf - inf
# would be coded silently: such a group counts as not finite.
SIGMA_CEILING = 1e30
# 2^18 fp32 values are 1 MiB a buffer: the buffers of a chunk fit the second-level caches of two cores.
CHUNK_ELEMENTS = 1 << 18


def chunks(x: Tensor) -> Iterator[slice]:
    """Slices of rows: cache-sized on a CPU, all rows at once elsewhere."""
    rows, columns = x.shape
    step = max(1, CHUNK_ELEMENTS // max(1, columns)) if x.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp32 inside whatever comes in (bf16 flips up to 3 % of the codes); fp64 stays fp64, for proofs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def result_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where that is active (never on a device without values), else that of `x`."""
    return autocast_dtype(
        "cpu" if x.is_cpu else x.device.type, x.dtype
    )  # the former is quicker, and every small layer asks


def autocast_dtype(device: str, otherwise: torch.dtype) -> torch.dtype:
    """The autocast dtype of a kind of device where that is active (never of one without values), else the other."""
    active = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if active else otherwise


def _reference_rms(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)
    return norm / math.sqrt(max(1, x.shape[-1]))


row_rms = Operation(
    "row_rms(Tensor x) -> Tensor",
    _reference_rms,
    lambda x: x.new_empty((*x.shape[:-1], 1), dtype=torch.float64),
)
"""See `row_sigma`."""
rows_together(row_rms, (0,))


def row_sigma(rows: Tensor) -> Tensor:
    """RMS of each row, fp64 `[rows, 1]`, of `[rows, features]`; NaN or infinite where an entry is."""
    return row_rms(rows)


def row_absmax(rows: Tensor) -> Tensor:
    """Largest magnitude of each row, fp64 `[rows, 1]`, of `[rows, features]`; NaN or infinite where an entry is."""
    return rows.abs().amax(-1, keepdim=True).to(torch.float64)


MEASURES = {"rms": row_sigma, "absmax": row_absmax, "norm": row_sigma}
"""What a row may be divided by, by the name that the packed format has for it."""


def normaliser(sigma: Tensor, block: int) -> Tensor:
    """`1 / (max(sigma, 1e-8) sqrt(block))` in the dtype of `sigma`; NaN where sigma is NaN or above 1e30."""
    inverse = 1 / sigma.clamp(min=SIGMA_FLOOR)
    return torch.where(sigma <= SIGMA_CEILING, inverse, math.nan) / math.sqrt(block)


def static_normaliser(inverse_sigma: Tensor, rows: Tensor, block: int) -> Tensor:
    """A fixed 1/sigma for all rows, fp64 `[rows, 1]`; NaN for rows whose own RMS is NaN or above 1e30."""
    fixed = inverse_sigma.to(torch.float64) / math.sqrt(block)
    return torch.where(row_sigma(rows) <= SIGMA_CEILING, fixed, math.nan)


def row_scale(r: Tensor, rows: int, sigma: Tensor | None = None) -> Tensor:
    """What a row's product is multiplied with, fp32 `[rows, 1]`: 1.0, or NaN where the normaliser `r` is.

    With `sigma`, fp64 of the shape of `r`: `max(sigma, 1e-8)` in place of 1.0. A comparison would swallow a NaN; this
    keeps it.
    """
    row_scales = (r - r + 1).to(torch.float32)
    if sigma is not None:
        row_scales = row_scales * sigma.clamp(min=SIGMA_FLOOR).to(torch.float32)
    return row_scales.expand(rows, 1)


def kept_norm(rows: Tensor, levels: Tensor, r: Tensor) -> Tensor:
    """What levels are multiplied with to have the L2 norm of their row again, fp32 `[rows, 1]`.

    Args:
        rows: float `[rows, features]`.
        levels: what they are coded as, of the same shape; a row of zeros gets 0.
        r: the normaliser, NaN where a row is not finite; so is the result.
    """
    given, coded = (
        torch.linalg.vector_norm(each, dim=-1, keepdim=True, dtype=torch.float64) for each in (rows, levels)
    )
    kept = torch.where(coded > 0, given / coded, 0.0)
    return (kept * (r - r + 1)).to(torch.float32)


def rotate_normalise(
    x: Tensor, r: Tensor, block: int, scratch: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`butterfly(x) * r`: the value that thresholds are compared with.

    Args:
        x: `[rows, features]`, any floating dtype.
        r: `[rows, 1]` or `[1, 1]`, compute dtype, 1 / (sigma * sqrt(block)).
        block: rotation block; divides features.
        scratch: two buffers of that shape and the compute dtype to work in, or None to allocate.

    Returns:
        Compute dtype, the shape of `x`.
    """
    x = x.to(compute_dtype(x))
    if scratch is None:
        return butterfly(x, block) * r
    if block == 1:
        return torch.mul(x, r, out=scratch[0])
    return butterfly_between(x.contiguous(), block, scratch).mul_(r)


def count_reached(v: Tensor, thresholds: Sequence[float], out: Tensor, scratch: Tensor) -> Tensor:
    """Codes of `v`, as floats, into `out`; all three share shape and dtype.

    Comparing into floats is vectorised where comparing into booleans is not.
    """
    torch.ge(v, thresholds[0], out=out)
    for threshold in thresholds[1:]:
        out += torch.ge(v, threshold, out=scratch)
    return out


class Scratch:
    """Buffers for one chunk of `x`, made once a call and sliced for the last, shorter chunk."""

    def __init__(self, x: Tensor, floats: int, dtype: torch.dtype) -> None:
        first = next(chunks(x), slice(0, 0))
        shape = (first.stop - first.start, x.shape[1])
        self._floats = [torch.empty(shape, dtype=dtype, device=x.device) for _ in range(floats)]

    def rows(self, rows: slice) -> list[Tensor]:
        """The buffers, as long as the chunk `rows`."""
        return [buffer[: rows.stop - rows.start] for buffer in self._floats]


def per_row(value: Tensor, rows: slice) -> Tensor:
    """The part of `[rows, 1]` for a chunk, or all of a common `[1, 1]`."""
    return value if len(value) == 1 else value[rows]


def reference_encode(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    """Codes of rows: rotate, normalise, count the thresholds that are reached.

    Args:
        x: `[rows, features]`, any floating dtype.
        r: `[rows, 1]` or `[1, 1]`, compute dtype, 1 / (sigma * sqrt(block)).
        thresholds: n-1 rising fp32 numbers.
        block: rotation block.

    Returns:
        uint8 `[rows, features]`. Rows with a NaN in `x` or `r` get code 0; the caller's row scales make them NaN.
    """
    check_rows(x, block, r)
    if len(thresholds) > 255:
        raise BellboxError(f"{len(thresholds)} thresholds: a code of a byte counts up to 255")
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scratch = Scratch(x, 4, compute_dtype(x))
    for rows in chunks(x):
        a, b, c, d = scratch.rows(rows)
        v = rotate_normalise(x[rows], per_row(r, rows), block, (a, b))
        codes[rows] = count_reached(v, thresholds, c, d)
    return codes


def _fake(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    del r, thresholds, block
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


encode = Operation(
    "encode(Tensor x, Tensor r, float[] thresholds, int block) -> Tensor", reference_encode, _fake
)
"""See `reference_encode`."""
rows_together(encode, (0, 1))
