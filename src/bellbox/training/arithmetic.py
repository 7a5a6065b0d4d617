"""What a run computes in, where its configuration leaves that open."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bellbox.nn.integer_product import on_kernels
from bellbox.runs.build import pick_device
from bellbox.runs.checkpoint import Checkpoints
from bellbox.runs.config import PAPER, TrainConfig
from bellbox.runs.config_file import load_config
from bellbox.runs.open import CONFIG_FILE
from bellbox.utils.processor import choose_precision

ON_INTEGERS = ("bbq", PAPER)
"""Methods whose training is faster on integers."""


def with_arithmetic(config: TrainConfig) -> tuple[TrainConfig, str]:
    """What a configuration leaves open as the folder's run began, else as what is fast here; and why that precision.

    That is `precision: auto`, and `quantization.integer_forward: null` where the method is named.
    """
    folder, section, why = Path(config.folder), config.quantization, ""
    saved = folder / CONFIG_FILE
    begun = saved.is_file() and bool(Checkpoints(folder / "checkpoints").steps())
    earlier = load_config(saved) if begun else None
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


def integers_pay(config: TrainConfig) -> bool:
    """Whether training on integers is faster: with BBQ, on the compiled kernels, in either precision."""
    fits = config.quantization.method in ON_INTEGERS and config.quantization.weight_only is None
    return fits and on_kernels(pick_device(config.device).type)
