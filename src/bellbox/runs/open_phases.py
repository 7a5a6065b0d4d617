"""Phases where a configuration leaves them open, or where a run goes on to more steps than it was begun for.

BBQ's codes of few bits are the upper part of those with one bit more. So a run that begins with one bit more keeps its
weights and its scales (`LearnedQuantizer.continue_from`) when the lowest bit goes, and has learned half of its steps on
a finer grid. docs/studies.md has what that brings at each width and budget.
"""

from __future__ import annotations

import dataclasses
import itertools

from bellbox.runs.config import PhasesSection, TrainConfig
from bellbox.runs.phases import phases_of, quantized_from, soft_steps

FEWEST_STEPS = 2048
"""Of the shortest run that begins with one bit more: with fewer, some widths gain and some lose."""
OWN_BITS = 2
"""Of BBQ, where a configuration names none."""
MOST_BITS = 3
"""The widest final width that does: at 4 bits nothing is left to gain."""


def with_phases(config: TrainConfig, begun: TrainConfig | None = None) -> TrainConfig:
    """A configuration with `phases.bits_before` written out.

    A run that goes on has the phases that it was begun with. Where it goes on to more steps, their borders stay, and
    the last one is longer.

    Args:
        config: as it was asked for.
        begun: the configuration of the run that goes on; None of a new one.
    """
    asked = config.phases
    if begun is not None:
        if asked.bits_before is None:
            widths = {
                "bits_before": begun.phases.bits_before or [],
                "shares": asked.shares or begun.phases.shares,
            }
            asked = dataclasses.replace(asked, **widths)
        same = asked == dataclasses.replace(begun.phases, bits_before=begun.phases.bits_before or [])
        phases = _stretched(begun, config.total_steps) if same else asked
        return dataclasses.replace(config, phases=phases)
    if asked.bits_before is not None:
        return config
    before = [] if asked.shares else _bits_before(config)
    shares = [0.5, 0.5] if before else asked.shares
    return dataclasses.replace(config, phases=dataclasses.replace(asked, bits_before=before, shares=shares))


def _bits_before(config: TrainConfig) -> list[int]:
    """One bit more, in what the studies are of: language models from random weights, BBQ on all bits, enough steps."""
    section = config.quantization
    bits = OWN_BITS if section.bits is None else section.bits
    other = (section.recipe, section.levels, section.weight_only, config.model.pretrained)
    studied = (
        config.task == "language"
        and section.method == "bbq"
        and bits <= MOST_BITS
        and not section.nested
        and all(each is None for each in other)
        and config.total_steps >= FEWEST_STEPS
    )
    return [bits + 1] if studied else []


def _stretched(begun: TrainConfig, total: int) -> PhasesSection:
    """Its phases in a run of `total` steps: each but the last one ends where it ended."""
    section = dataclasses.replace(begun.phases, bits_before=begun.phases.bits_before or [])
    start = quantized_from(begun)
    if total <= begun.total_steps or section == PhasesSection(bits_before=[]):
        return section
    ends = [phase.end for phase in phases_of(begun) if phase.end > start][:-1]
    borders = [start, *ends, total]
    shares = [(after - before) / (total - start) for before, after in itertools.pairwise(borders)]
    return dataclasses.replace(
        section,
        quantized=(total - start) / total,
        shares=shares if ends else [],
        soft=soft_steps(begun) / (total - start),
    )
