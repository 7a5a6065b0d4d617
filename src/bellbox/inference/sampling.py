"""The next token from logits: by likelihood or drawn, the same one for the same seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bellbox.errors import BellboxError

_MOSTLY = 512
"""Tokens, among which those of a top_p mostly are."""


def generator_for(seed: int | None, device: torch.device | str = "cpu") -> torch.Generator:
    """Where the samples of a sequence come from; a fresh seed where None.

    Raises:
        BellboxError: a seed beyond 64 bits.
    """
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    elif not -(2**63) <= seed < 2**64:
        raise BellboxError(f"seed is {seed}; it must be a number of 64 bits")
    else:
        generator.manual_seed(seed)
    return generator


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse what `generate` cannot sample with.

    Raises:
        BellboxError: a value out of range.
    """
    if max_new_tokens < 1:
        raise BellboxError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not 0 <= temperature < math.inf:
        raise BellboxError(f"temperature is {temperature}; it must be finite and at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise BellboxError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise BellboxError(f"top_p is {top_p}; it must be above 0 and at most 1")


def require_finite(logits: Tensor, number: int) -> None:
    """Refuse to sample from NaN or infinity.

    Raises:
        BellboxError: there is one; `number` is that of the new token.
    """
    # The sum is quicker, and finite only where all of them are.
    if not math.isfinite(logits.sum()) and not torch.isfinite(logits).all():
        raise BellboxError(f"the model's logits for new token {number} are not finite; is it trained?")


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row; the arguments are those of `generate`.

    Args:
        logits: `[B, V]`, finite.

    Returns:
        `[B]` int64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights, tokens = _weights(logits, temperature, top_k, top_p)
    sums = weights.cumsum(dim=-1)
    # One number a row: a number a token, as torch.multinomial draws, costs more than the step of a small model.
    whole = sums[:, -1:]
    drawn = torch.rand(whole.shape, dtype=torch.float64, device=whole.device, generator=generator) * whole
    place = torch.searchsorted(sums, drawn.minimum(whole.nextafter(torch.zeros_like(whole))), right=True)
    return (place if tokens is None else tokens.gather(-1, place))[:, 0]


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """What `sample` draws from: `[B, V]` float64, zero outside the chosen tokens; `temperature` above 0."""
    weights, tokens = _weights(logits, temperature, top_k, top_p)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    if tokens is None:
        return weights
    return torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter(-1, tokens, weights)


def _weights(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor | None]:
    """Weights of tokens that are drawn in proportion to them, float64 `[B, m]`, and which tokens; None for all."""
    # The largest logit becomes 0 first, so that no temperature, however small, overflows or gives 0/0.
    scaled = logits.to(torch.float64, copy=True)
    scaled.sub_(logits.amax(dim=-1, keepdim=True))
    if temperature != 1:
        scaled.div_(temperature)
    if top_k is None and top_p is None:
        return scaled.exp_(), None
    count = scaled.shape[-1] if top_k is None else min(top_k, scaled.shape[-1])
    if top_p is None:
        values, tokens = _likeliest(scaled, count)
        return values.exp(), tokens
    # Mostly few of the likeliest reach the sum, and to sort all takes as long as a step of a small model.
    whole = scaled.exp().sum(dim=-1, keepdim=True) if top_k is None else None
    for some in (min(count, _MOSTLY), count):
        values, tokens = _likeliest(scaled, some)
        weights = values.exp()
        least = top_p * (weights.sum(dim=-1, keepdim=True) if whole is None or some == count else whole)
        if some == count or (whole is not None and bool((weights.sum(dim=-1, keepdim=True) >= least).all())):
            break
    before = weights.cumsum(dim=-1) - weights
    return weights.masked_fill(before >= least, 0.0), tokens


def _likeliest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in falling order, and where they stand; the same ones among ties every time."""
    if 8 * count > scaled.shape[-1]:
        values, tokens = scaled.sort(dim=-1, descending=True, stable=True)
        return values[:, :count], tokens[:, :count]
    return scaled.topk(count, dim=-1)
