"""The next token of each sequence, drawn from its logits: the same one on every path.

A token's weight is a whole number, e^((logit - the largest) / temperature) in units so small that all of them together
fit 62 bits. Sums are then exact in any order, so that a token depends neither on the kernel nor on the sequences beside
it. The exponential is a polynomial in fp64 whose operations are each rounded by themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation

_WHOLE = 1.5 * 2**52
"""Adding it rounds to a whole number, which then stands in the low bits."""
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
_TERMS = 13
_LEAST = -700.0
OUT_OF_RANGE = "a setting that tokens are drawn by is out of range"
"""What is said of one."""


def check(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, drawn: Tensor) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: logits that are no fp32 matrix, or settings of another dtype or number.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.shape[1]:
        raise BellboxError(f"tokens are drawn from fp32 logits [n, vocabulary], not {logits.dtype} "
                           f"{tuple(logits.shape)}")  # fmt: skip
    settings = (
        (temperature, torch.float64),
        (top_k, torch.int64),
        (top_p, torch.float64),
        (drawn, torch.float64),
    )
    for each, dtype in settings:
        if each.shape != logits.shape[:1] or each.dtype != dtype:
            raise BellboxError(
                f"tokens of {len(logits)} rows are drawn by {dtype} settings, not {each.dtype} {tuple(each.shape)}"
            )


def weights_of(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """What each token is drawn in proportion to: whole numbers, int64 `[n, V]`; the arguments are those of `draw`."""
    top = logits.amax(dim=-1, keepdim=True).double()
    weights = _exponentials((logits.double() - top) / temperature[:, None])
    if not (top_k.any() or (top_p < 1).any()):
        return weights
    order = logits.argsort(dim=-1, descending=True, stable=True)
    count = torch.where(top_k > 0, top_k, logits.shape[1])[:, None]
    places = torch.arange(logits.shape[1], device=logits.device)
    weights = weights.gather(-1, order).masked_fill(places >= count, 0)
    before = weights.cumsum(dim=-1) - weights
    least = (top_p[:, None] * weights.sum(dim=-1, keepdim=True).double()).ceil().long()
    weights = weights.masked_fill((top_p[:, None] < 1) & (before >= least), 0)
    return torch.zeros_like(weights).scatter(-1, order, weights)


def _exponentials(x: Tensor) -> Tensor:
    """e^x of fp64 `[n, V]`, at most 0, in units of a power of two, to the nearest whole number."""
    unit = min(51, 62 - x.shape[1].bit_length())
    x = x.clamp(min=_LEAST)
    shifted = x * _LOG2_E + _WHOLE
    power = shifted - _WHOLE
    rest = (x - power * _LN2_HIGH) - power * _LN2_LOW
    total = torch.full_like(rest, 1 / math.factorial(_TERMS - 1))
    for term in range(_TERMS - 2, -1, -1):
        total = total * rest + 1 / math.factorial(term)
    exponent = (power.long() + unit) << 52
    return (total.view(torch.int64) + exponent).view(torch.float64).round().long()


def _reference(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, drawn: Tensor) -> Tensor:
    check(logits, temperature, top_k, top_p, drawn)
    in_range = (temperature >= 0) & temperature.isfinite() & (top_k >= 0) & (top_p > 0) & (top_p <= 1)
    if not (in_range & (drawn >= 0) & (drawn < 1)).all():
        raise BellboxError(OUT_OF_RANGE)
    usable = (logits < math.inf).all(dim=-1) & (logits > -math.inf).any(dim=-1)
    given = torch.where(usable[:, None], logits, 0.0)
    # Any temperature does for rows that take the likeliest.
    divisor = torch.where(temperature == 0, 1.0, temperature)
    weights = weights_of(given, divisor, top_k, top_p)
    whole = weights.sum(dim=-1)
    place = (drawn * whole.double()).long().minimum(whole - 1)
    found = torch.searchsorted(weights.cumsum(dim=-1), place[:, None], right=True)[:, 0]
    return torch.where(usable, torch.where(temperature == 0, given.argmax(dim=-1), found), -1)


def _fake(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, drawn: Tensor) -> Tensor:
    del temperature, top_k, top_p
    return drawn.new_empty(len(logits), dtype=torch.int64)


operation = Operation(
    "draw(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor drawn) -> Tensor",
    _reference,
    _fake,
)


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, drawn: Tensor) -> Tensor:
    """A token for each row; settings have one number for each row.

    Args:
        logits: `[n, V]` fp32.
        temperature: fp64, what logits are divided by; 0 takes the likeliest, the first among equal ones.
        top_k: int64, among so many of the likeliest, the first ones among equals; 0 for all.
        top_p: fp64 above 0, among the fewest likeliest of those that have this share of their weight; 1 for all.
        drawn: fp64 from 0 to below 1, which of the weights, in the order of the tokens.

    Returns:
        `[n]` int64; -1 where a logit is NaN or infinity, or all are minus infinity.

    Raises:
        BellboxError: shapes or dtypes that do not fit, or a setting out of range.
    """
    return operation.direct(logits, temperature, top_k, top_p, drawn)
