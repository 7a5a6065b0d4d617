"""BiLLM's binarization of a block of columns (arXiv 2402.04291), and plain rounding to two levels.

A few *salient* columns are binarized twice, the second time what the first left over; the other weights are split by
magnitude in two groups, and each group of a row becomes `mean + alpha * sign`. So every weight is a sign and one more
bit: the second sign in a salient column, the group in any other. Each row of a block has seven numbers:

    0, 1  mean and alpha of the small weights      4     mean of the salient weights (of both steps)
    2, 3  mean and alpha of the large ones         5, 6  alpha of the first and of the second step

How many columns are salient (fewer than 50), and where small ends, are found by search. Two variants:

- `released` does what the authors' code does: the searches minimise the error of binarizing the *saliences*
  w^2 / U_jj^2 as if these were the weights, the trial binarizes the other columns twice as well, the split is one of
  saliences, and there is at least one salient column.
- `clean` minimises what matters: the squared error of the weights, each column weighted by 1 / U_jj^2, of exactly the
  binarization that follows; weights are split by their own magnitude.

The seven numbers are rounded to fp16 here, not when they are stored, so that error feedback sees what will be stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Variant = Literal["released", "clean"]
Method = Literal["rtn", "billm", "dbellquant"]
"""Rounding to nearest, BiLLM, or BiLLM on weights that LTDB has transformed."""
BLOCK = 128
"""Columns of a block."""
MOST_SALIENT = 50
"""A block has fewer salient columns than this."""
_ROWS = 512
BILLM_SCALES, RTN_SCALES = 7, 2
"""Numbers that each row of a block has."""


@dataclass(frozen=True)
class Binarized:
    """Some columns of a weight matrix, as signs, bits and scales."""

    signs: Tensor
    """bool `[rows, columns]`: true for +1."""
    bits: Tensor | None
    """bool `[rows, columns]`: the second sign where the column is salient, else whether large; None for rounding."""
    salient: Tensor | None
    """bool `[columns]`; None for rounding."""
    scales: Tensor
    """Float `[rows, 7]` (see above), or `[rows, 2]` for rounding: mean and alpha."""


def decode(block: Binarized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights `[rows, columns]` that a block stands for: the one place where they are computed."""
    scales = block.scales.to(dtype).unsqueeze(-1)
    sign = block.signs.to(dtype).mul_(2).sub_(1)
    if block.bits is None or block.salient is None:
        return scales[:, 0] + sign * scales[:, 1]
    plain = torch.where(block.bits, scales[:, 2], scales[:, 0])
    plain = plain + sign * torch.where(block.bits, scales[:, 3], scales[:, 1])
    second = block.bits.to(dtype).mul_(2).sub_(1)
    return torch.where(block.salient, scales[:, 4] + sign * scales[:, 5] + second * scales[:, 6], plain)


def round_to_two(w: Tensor, scale_dtype: torch.dtype = torch.float16) -> Binarized:
    """Round to nearest with two levels a row, `mean +- mean |w - mean|`: the floor that BiLLM is compared with.

    Args:
        w: float `[rows, columns]`.
        scale_dtype: of the stored scales.
    """
    mean, alpha, deviation = _levels(w)
    return Binarized(deviation >= 0, None, None, torch.cat((mean, alpha), 1).to(scale_dtype))


def binarize(
    w: Tensor, diagonal: Tensor, variant: Variant = "clean", scale_dtype: torch.dtype = torch.float16
) -> Binarized:
    """Binarize the columns of one block.

    Args:
        w: float `[rows, columns]`.
        diagonal: `[columns]`, of the upper Cholesky factor U of the inverse Hessian.
        variant: `released` or `clean`, see above.
        scale_dtype: of the stored scales.
    """
    salience, released = (w / diagonal) ** 2, variant == "released"
    searched, cost = (salience, torch.ones_like(diagonal)) if released else (w, diagonal**-2)
    salient = _find_salient(searched, cost, salience, released)
    large = _find_large(searched, cost, salient, released)
    return _fill(w, salient, large, scale_dtype)


def _levels(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: mean `[rows, 1]`, mean distance from it `[rows, 1]`, and each entry minus the mean."""
    mean = x.mean(1, keepdim=True)
    deviation = x - mean
    return mean, deviation.abs().mean(1, keepdim=True), deviation


def _left_over(x: Tensor) -> Tensor:
    """What one binarization of the rows leaves."""
    _, alpha, deviation = _levels(x)
    return deviation - alpha * deviation.sign()


def _error(x: Tensor, cost: Tensor) -> Tensor:
    """Squared error of one binarization of the rows, each column weighted by its cost."""
    return (_left_over(x).square_() @ cost).sum()


def _find_salient(searched: Tensor, cost: Tensor, salience: Tensor, released: bool) -> Tensor:
    """bool `[columns]`: the number of most salient columns that gives the lowest error."""
    columns = searched.shape[1]
    order = salience.sum(0).argsort(descending=True, stable=True)
    x, cost = searched[:, order], cost[order]
    first = 1 if released else 0
    errors: list[Tensor] = []
    for count in range(first, max(min(MOST_SALIENT, columns), first + 1)):
        head, tail = x[:, :count], x[:, count:]
        error = x.new_zeros(())
        if count:
            error = error + _error(_left_over(head), cost[:count])
        if count < columns:
            error = error + _error(_left_over(tail) if released else tail, cost[count:])
        errors.append(error)
    salient = torch.zeros(columns, dtype=torch.bool, device=x.device)
    salient[order[: first + int(torch.stack(errors).argmin())]] = True
    return salient


def _find_large(searched: Tensor, cost: Tensor, salient: Tensor, released: bool) -> Tensor:
    """bool `[rows, columns]`: the weights of other columns at or above the best of 81 quantiles of magnitude."""
    rows, columns = searched.shape
    x = searched[:, ~salient]
    magnitude = x.abs()
    pool = magnitude.flatten()
    if released:  # the authors take quantiles over salient columns too, as zeros
        pool = torch.cat((pool, pool.new_zeros(rows * (columns - x.shape[1]))))
    large = torch.zeros_like(searched, dtype=torch.bool)
    if not x.numel():
        return large
    candidates = _quantiles(pool, torch.linspace(0.1, 0.9, 81, dtype=x.dtype, device=x.device))
    errors = torch.zeros_like(candidates)
    for part, sizes in zip(x.split(_ROWS), magnitude.split(_ROWS), strict=True):
        errors += _split_errors(part, sizes, candidates, cost[~salient])
    large[:, ~salient] = magnitude >= candidates[int(errors.argmin())]
    return large


def _quantiles(pool: Tensor, at: Tensor) -> Tensor:
    """Linearly interpolated quantiles (`torch.quantile` takes no more than 16 million numbers)."""
    ordered = pool.sort().values
    place = at * (len(ordered) - 1)
    low = place.floor().long()
    return torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(ordered) - 1)], place - low)


def _split_errors(x: Tensor, magnitude: Tensor, candidates: Tensor, cost: Tensor) -> Tensor:
    """For each candidate the squared error of binarizing each row's two groups by themselves: `[candidates]`.

    The search is where the time goes, so: few passes over rows that stay in the cache.
    """
    columns, total = x.shape[1], x.sum(1, keepdim=True)
    errors: list[Tensor] = []
    for limit in candidates:
        inside = (magnitude >= limit).to(x.dtype)
        count = inside.sum(1, keepdim=True)
        high, low = count.clamp(min=1), (columns - count).clamp(min=1)
        part = torch.linalg.vecdot(x, inside).unsqueeze(1)
        mean, other = part / high, (total - part) / low
        distance = torch.addcmul(other, inside, mean - other).sub_(x).abs_()
        part = torch.linalg.vecdot(distance, inside).unsqueeze(1)
        alpha, other = part / high, (distance.sum(1, keepdim=True) - part) / low
        errors.append((distance.sub_(torch.addcmul(other, inside, alpha - other)).square_() @ cost).sum())
    return torch.stack(errors)


def _fill(w: Tensor, salient: Tensor, large: Tensor, scale_dtype: torch.dtype) -> Binarized:
    """Binarize with given columns and groups; sign(0) is +1, where the authors' 0 would be a third level."""
    signs, bits = torch.zeros_like(w, dtype=torch.bool), large.clone()
    scales = w.new_zeros(len(w), BILLM_SCALES)
    plain = ~salient
    x = w[:, plain]
    if x.numel():
        sign = torch.zeros_like(x, dtype=torch.bool)
        for at, group in ((0, ~large[:, plain]), (2, large[:, plain])):
            count = group.sum(1, keepdim=True).clamp(min=1)
            mean = torch.where(group, x, 0).sum(1, keepdim=True) / count
            deviation = torch.where(group, x - mean, 0)
            scales[:, at], scales[:, at + 1] = (
                mean[:, 0],
                (deviation.abs().sum(1, keepdim=True) / count)[:, 0],
            )
            sign |= group & (deviation >= 0)
        signs[:, plain] = sign
    if salient.any():
        mean, alpha, deviation = _levels(w[:, salient])
        first = deviation >= 0
        left = deviation - torch.where(first, alpha, -alpha)
        mean_left, alpha_left, second = _levels(left)
        signs[:, salient], bits[:, salient] = first, second >= 0
        scales[:, 4:] = torch.cat((mean + mean_left, alpha, alpha_left), 1)
    return Binarized(signs, bits, salient, scales.to(scale_dtype))
