"""Content of a report beyond the run's own record; every part may be absent."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bellbox.report.record import RunRecord


@dataclass(frozen=True)
class LayerValues:
    """The weights of one layer on their way from the bell to the codes."""

    name: str
    """Dotted name of the layer."""
    normalised: np.ndarray
    """Float, any shape: weights after rotation and normalisation, about standard normal."""
    codes: np.ndarray
    """Unsigned integers 0..n-1, the same shape."""
    thresholds: tuple[float, ...]
    """The n-1 decision boundaries on `normalised`."""
    integers: tuple[int, ...]
    """The integer that each of the n codes stands for in the matrix product."""


@dataclass(frozen=True)
class SizeRow:
    """One row of the size table, bytes."""

    part: str
    parameters: int
    fp32: int
    bf16: int
    packed: int


@dataclass(frozen=True)
class Sample:
    """A generated text."""

    prompt: str
    continuation: str
    settings: str
    """How it was made, in a few words."""


@dataclass(frozen=True)
class Verification:
    """The outcome of comparing the packed model with the trained one."""

    codes: int
    mismatches: int
    tokens: int
    logit_difference: float
    """Relative to the largest logit."""


@dataclass(frozen=True)
class ReportInput:
    """Everything that goes into a page."""

    record: RunRecord
    title: str = ""
    """The heading; the run's name where empty."""
    step: int | None = None
    """Step of the checkpoint that the arrays come from."""
    model: str = ""
    """The model in one line."""
    unigram_bits_per_byte: float | None = None
    unigram_loss: float | None = None
    """Nats per token."""
    levels: int | None = None
    """Number of levels of the weights, the largest where layers differ; None in full precision."""
    layer: LayerValues | None = None
    weight_gamma: dict[str, np.ndarray] = field(default_factory=dict)
    """Learned scales of each layer's rows."""
    activation_gamma: dict[str, float] = field(default_factory=dict)
    """Learned scale of each layer input."""
    sizes: list[SizeRow] = field(default_factory=list)
    verification: Verification | None = None
    sample: Sample | None = None
