"""The phases of a run: full precision first, then quantized, perhaps with fewer bits from time to time.

Which phase a step belongs to is a pure function of the configuration and the step, like the learning rate: there
is nothing to save, and nothing that a resumed run could get wrong. At the border between two phases the
layers are prepared anew with the weights that they have (`convert.unprepare`, `convert.prepare`), so every method
can be scheduled without knowing of it. Scales that mean the same at both widths go on
(`LearnedQuantizer.continue_from`); others start as `prepare` sets them, those of activations with the first batch of
the phase.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

from bellbox.errors import BellboxError
from bellbox.runs.config import QuantizationSection, TrainConfig


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one quantization."""

    index: int
    """0 for the first."""
    start: int
    """First optimizer step, counted from 0."""
    end: int
    """One past the last step."""
    quantization: QuantizationSection
    """What the layers are prepared with; method `none` in full precision."""

    @property
    def label(self) -> str:
        """`full precision`, or method and width."""
        section = self.quantization
        if section.recipe is not None:
            return "quantized by the recipe"
        if section.method == "none":
            return "full precision"
        width = f"{section.bits} bits" if section.levels is None else f"{section.levels} levels"
        if section.nested:
            width = f"nested widths of {', '.join(map(str, section.nested))} bits"
        inputs = "" if section.activation_bits is None else f", inputs {section.activation_bits} bits"
        return f"{section.method}, {width}{inputs}"


def phases_of(config: TrainConfig) -> list[Phase]:
    """The phases of a run in their order; one where nothing is scheduled.

    Args:
        config: of the run.

    Raises:
        BellboxError: a schedule that the quantization does not allow, or phases without a step.
    """
    section, total = config.phases, config.total_steps
    final = config.quantization
    if final.method == "none" and final.recipe is None:
        if section.quantized != 1 or section.bits_before or section.shares:
            raise BellboxError(
                "phases: quantization.method is none, so nothing can be scheduled; leave it out"
            )
        return [Phase(0, 0, total, final)]
    if section.bits_before and final.recipe is not None:
        raise BellboxError(
            "phases.bits_before changes quantization.bits, but quantization.recipe names its own levels; "
            "leave one of them out"
        )
    start = quantized_from(config)
    stages = [
        *(
            dataclasses.replace(final, bits=bits, levels=None, nested=[])
            for bits in section.bits_before or []
        ),
        final,
    ]
    ends = [start + round(share * (total - start)) for share in itertools.accumulate(_shares(config))]
    borders = list(itertools.pairwise([start, *ends[:-1], total]))
    if start:
        stages.insert(
            0,
            dataclasses.replace(
                final,
                method="none",
                recipe=None,
                nested=[],
                embedding_bits=None,
                embedding_group=None,
                head_bits=None,
            ),
        )
        borders.insert(0, (0, start))
    phases = [Phase(i, *border, stage) for i, (border, stage) in enumerate(zip(borders, stages, strict=True))]
    empty = next((phase for phase in phases if phase.start >= phase.end), None)
    if empty is not None:
        raise BellboxError(
            f"phases: phase {empty.index + 1} ({empty.label}) gets none of the {total} steps; give it more of them"
        )
    return phases


def quantized_from(config: TrainConfig) -> int:
    """The first step that is quantized, counted from 0."""
    assert not isinstance(config.phases.quantized, str)
    return config.total_steps - round(config.phases.quantized * config.total_steps)


def soft_steps(config: TrainConfig) -> int:
    """In how many of the quantized steps, the first ones, weights harden (`phases.soft`)."""
    return round(config.phases.soft * (config.total_steps - quantized_from(config)))


def in_words(phases: list[Phase]) -> str:
    """`bbq, 3 bits from step 1, then bbq, 2 bits from step 301`."""
    return ", then ".join(f"{phase.label} from step {phase.start + 1}" for phase in phases)


def phase_at(phases: list[Phase], step: int) -> Phase:
    """The phase of optimizer step `step`, counted from 0."""
    return next(phase for phase in phases if step < phase.end)


def phase_after(phases: list[Phase], steps: int) -> Phase:
    """The phase that a model is in when `steps` steps are done: that of the last one."""
    return phase_at(phases, max(steps - 1, 0))


def _shares(config: TrainConfig) -> list[float]:
    shares, count = config.phases.shares, len(config.phases.bits_before or []) + 1
    if not shares:
        return [1 / count] * count
    if len(shares) != count or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise BellboxError(
            f"phases.shares is {shares}: must be {count} numbers that add up to 1, one for each of bits_before "
            "and one for the final bits"
        )
    return shares
