"""What a run computes in, where its configuration leaves that open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from bellbox.nn.integer_product import on_kernels
from bellbox.runs.build import pick_device
from bellbox.runs.checkpoint import Checkpoints
from bellbox.runs.config import CEWT, PAPER, TrainConfig
from bellbox.runs.config_file import load_config
from bellbox.runs.open import CONFIG_FILE
from bellbox.runs.open_phases import with_phases
from bellbox.utils.processor import choose_precision

ON_INTEGERS = ("bbq", PAPER)
"""Methods whose training is faster on integers."""
EMBEDDING_BITS: Literal[4, 8, 32] = 8
"""Of a new run's embeddings and output layer."""


def with_arithmetic(config: TrainConfig) -> tuple[TrainConfig, str]:
    """What a configuration leaves open as the folder's run began, else as what is fast here; and why that precision.

    That is `precision: auto`, `quantization.integer_forward: null` where the method is named, and
    `phases.bits_before: null`.
    """
    section, why, earlier = config.quantization, "", begun(config)
    config = with_phases(config, earlier)
    if config.precision == "auto":
        if earlier is not None and earlier.precision != "auto":
            precision, why = earlier.precision, ": as the run was begun"
        else:
            precision, reason = choose_precision(pick_device(config.device))
            why = f": {reason}"
        config = dataclasses.replace(config, precision=precision)
    if section.integer_forward is None and section.recipe is None:
        # A run that does not say is of a version that trained on floats.
        chosen = integers_pay(config) if earlier is None else bool(earlier.quantization.integer_forward)
        section = dataclasses.replace(section, integer_forward=chosen)
        config = dataclasses.replace(config, quantization=section)
    return config, why


def begun(config: TrainConfig) -> TrainConfig | None:
    """The configuration of the run that stands in the folder, where one was begun."""
    folder = Path(config.folder)
    saved = folder / CONFIG_FILE
    return load_config(saved) if saved.is_file() and Checkpoints(folder / "checkpoints").steps() else None


def with_embeddings(config: TrainConfig) -> TrainConfig:
    """`quantization.embedding_bits: null` as `bellbox train` understands it: as the folder's run began, else by method.

    A new run's embeddings and output layer get the fewest bits whose cost no study could tell from zero
    (docs/studies.md); those of images, of full precision, and of what is as published are left alone.
    """
    section = config.quantization
    if (
        section.embedding_bits is not None
        or section.embedding_group is not None
        or section.recipe is not None
    ):
        return config
    earlier = begun(config)
    alone = (
        config.task == "vision" or section.method in ("none", PAPER, CEWT) or section.weight_only is not None
    )
    bits: Literal[4, 8, 32] = 32 if alone else EMBEDDING_BITS
    if earlier is not None:
        bits = earlier.quantization.embedding_bits or 32
    return dataclasses.replace(config, quantization=dataclasses.replace(section, embedding_bits=bits))


def integers_pay(config: TrainConfig) -> bool:
    """Whether training on integers is faster: with BBQ, on the compiled kernels, in either precision."""
    fits = config.quantization.method in ON_INTEGERS and config.quantization.weight_only is None
    return fits and on_kernels(pick_device(config.device).type)
