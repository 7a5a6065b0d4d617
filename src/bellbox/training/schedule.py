"""Learning rates and projections as pure functions of the step.

No state, hence nothing to save and nothing that a resumed run could get wrong. One cycle: a half cosine up
from `start_factor * peak` to the peak, a half cosine down to `end_factor * peak` (Smith and Topin, arXiv
1708.07120, in the form of `torch.optim.lr_scheduler.OneCycleLR`, which the BBQ authors train with).
"""

from __future__ import annotations

import math

from bellbox.runs.config import CewtSection, ResolvedConfig


def rates(config: ResolvedConfig, step: int) -> tuple[float, float]:
    """Learning rate of a step of a run, and that of its hyperball, in units of a weight's norm.

    The latter follows the former, but for what `optimizer.cewt` says of its own.

    Args:
        config: of the run.
        step: 0 .. total_steps - 1.
    """
    section, peak, cewt = config.schedule, config.optimizer.lr, config.optimizer.cewt
    both = {"start_factor": section.start_factor, "warmup": section.warmup, "end_factor": section.end_factor}
    lr = one_cycle(step, config.total_steps, peak, **both)
    assert cewt.lr is not None  # of a configuration that is resolved
    if cewt.end_factor is None and cewt.warmup is None:
        return lr, cewt.lr * lr / peak
    own = {key: value for key, value in vars(cewt).items() if key in both and value is not None}
    return lr, one_cycle(step, config.total_steps, cewt.lr, **{**both, **own})


def pull_share(config: ResolvedConfig, step: int) -> float:
    """Share of the way to the values of their codes by which a step of a run pulls weights; 0 where it does not.

    Args:
        config: of the run.
        step: 0 .. total_steps - 1.
    """
    cewt, total = config.optimizer.cewt, config.total_steps
    stretch = round(cewt.pull.last * total)
    risen = step + 1 - (total - stretch)
    if not cewt.pull.weight or risen <= 0:
        return 0.0
    lr, ball = rates(config, step)
    return min(1.0, (ball if cewt.hyperball else lr) * cewt.pull.weight * risen / stretch)


def projects(section: CewtSection, done: int, phase_end: int, total: int) -> bool:
    """Whether weights are projected by a step: every so many, and at the end of a phase, until a share of the steps.

    Args:
        section: of the run.
        done: steps that are done with this one.
        phase_end: how many are when its phase ends.
        total: of the whole run.
    """
    if not section.every or done > round(section.until * total):
        return False
    return done % section.every == 0 or done == phase_end


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
