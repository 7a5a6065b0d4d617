"""The learning rate as a pure function of the step.

No state, hence nothing to save and nothing that a resumed run could get wrong. One cycle: a half cosine up
from `start_factor * peak` to the peak, a half cosine down to `end_factor * peak` (Smith and Topin, arXiv
1708.07120, in the form of `torch.optim.lr_scheduler.OneCycleLR`, which the BBQ authors train with).
"""

from __future__ import annotations

import math


def one_cycle(
    step: int,
    total_steps: int,
    peak: float,
    *,
    warmup: float = 0.1,
    start_factor: float = 0.01,
    end_factor: float = 0.1,
) -> float:
    """Learning rate of the optimizer step with number `step`.

    Args:
        step: 0 .. total_steps - 1.
        total_steps: optimizer steps of the whole run.
        peak: the highest learning rate.
        warmup: fraction of the steps spent rising; the peak lies at `warmup * total_steps - 1`, as in
            PyTorch.
        start_factor: first learning rate over the peak.
        end_factor: last learning rate over the peak.
    """
    top = max(warmup * total_steps - 1.0, 0.0)
    last = total_steps - 1.0
    if step < top:
        return _half_cosine(start_factor * peak, peak, step / top)
    if last <= top:
        return peak
    return _half_cosine(peak, end_factor * peak, (step - top) / (last - top))


def _half_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * fraction))
