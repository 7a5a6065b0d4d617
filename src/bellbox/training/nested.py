"""Which widths of a nested model a step trains: a function of the configuration and the step alone.

So all processes train the same width, and a run that goes on trains the ones that it would have trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from bellbox.runs.config import QuantizationSection


def widths_of_step(section: QuantizationSection, seed: int, step: int) -> tuple[int | None, ...]:
    """Bits of the widths whose losses a step adds up; `(None,)` where the model has one width.

    Drawn ones come in turns: in the steps that could train each width once, each is trained once, in an order that is
    drawn.

    Args:
        section: of the step's phase.
        seed: of the run.
        step: counted from 0.
    """
    if not section.nested:
        return (None,)
    if section.nested_schedule == "sum":
        return tuple(section.nested)
    draws = section.nested_draws
    turn, place = divmod(step * draws, len(section.nested))
    drawn = _shuffled(section.nested, seed, turn)[place : place + draws]
    return tuple(sorted(drawn, reverse=True))


def _shuffled(widths: Sequence[int], seed: int, turn: int) -> list[int]:
    """By a hash, which no version of a library changes."""
    return sorted(widths, key=lambda bits: hashlib.sha256(f"{seed} {turn} {bits}".encode()).digest())
