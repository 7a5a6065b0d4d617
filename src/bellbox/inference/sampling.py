"""The next token from logits: by likelihood or drawn, the same one for the same seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.draw import draw, weights_of

Odds = tuple[float, int | None, float | None]
"""Temperature, top_k and top_p."""


@dataclass(frozen=True)
class Sampling:
    """How a text is continued; the arguments are those of `generate`.

    Raises:
        BellboxError: a value out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop_token: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BellboxError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise BellboxError(
                f"temperature is {self.temperature}; it must be finite and at least 0 (0 is greedy)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise BellboxError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise BellboxError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    @property
    def odds(self) -> Odds:
        """What the odds of tokens depend on."""
        return self.temperature, self.top_k, self.top_p


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


def require_finite(logits: Tensor, number: int) -> None:
    """Refuse to sample from NaN or infinity.

    Raises:
        BellboxError: there is one; `number` is that of the new token.
    """
    # The sum is quicker, and finite only where all of them are.
    if not math.isfinite(logits.sum()) and not torch.isfinite(logits).all():
        raise not_finite(number)


def not_finite(number: int) -> BellboxError:
    """What is said of logits for new token `number` that are not finite."""
    return BellboxError(f"the model's logits for new token {number} are not finite; is it trained?")


def finite_rows(logits: Tensor) -> list[bool]:
    """Of which rows of logits `[n, V]` all numbers are finite."""
    found = logits.sum(dim=-1).isfinite()
    return (found if found.all() else logits.isfinite().all(dim=-1)).tolist()


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token per row.

    Args:
        logits: `[B, V]`, finite.
        sampling: of all rows.
        generator: where the draws come from, on the device of the logits.

    Returns:
        `[B]` int64.
    """
    if not sampling.temperature:
        return logits.argmax(dim=-1)
    drawn = torch.rand(len(logits), dtype=torch.float64, device=logits.device, generator=generator)
    return draw(logits.float(), *_settings((sampling.odds,) * len(logits), logits.device), drawn)


def sample_each(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int]:
    """Draw one token for each row as `sample` does for that row alone.

    Args:
        logits: `[n, V]` on the CPU; of a row that is not finite the token means nothing.
        samplings: one for each row.
        generators: likewise.
    """
    if not any(each.temperature for each in samplings):
        return logits.argmax(dim=-1).tolist()
    drawn = [
        float(torch.rand((), dtype=torch.float64, generator=generator)) if each.temperature else 0.0
        for each, generator in zip(samplings, generators, strict=True)
    ]
    settings = _settings(tuple(each.odds for each in samplings), logits.device)
    return draw(logits.float(), *settings, torch.tensor(drawn, dtype=torch.float64)).tolist()


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What `sample` draws from: `[B, V]` float64, zero outside the chosen tokens; the temperature is above 0."""
    weights = weights_of(logits.float(), *_settings((sampling.odds,) * len(logits), logits.device)).double()
    return weights / weights.sum(dim=-1, keepdim=True)


@functools.lru_cache(maxsize=256)
def _settings(odds: tuple[Odds, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature, top_k and top_p of each row, as `ops.draw` takes them; from step to step they are the same."""
    temperature, top_k, top_p = zip(*odds, strict=True)
    limits = [0 if k is None else min(k, 2**62) for k in top_k]
    return (
        torch.tensor(temperature, dtype=torch.float64, device=device),
        torch.tensor(limits, dtype=torch.int64, device=device),
        torch.tensor([p or 1.0 for p in top_p], dtype=torch.float64, device=device),
    )
