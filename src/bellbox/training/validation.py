"""One validation: the loss over the whole split in fp32 and what is measured of a model, at each width that it has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bellbox.nn import nested_widths, using_bits
from bellbox.runs.config import MecSection
from bellbox.training.distributed import World
from bellbox.training.measures import quantization_measures
from bellbox.training.mec import SpectrumMeter
from bellbox.training.tasks.base import Task


def validate(
    model: nn.Module, task: Task, mec: MecSection, world: World, device: torch.device
) -> tuple[dict[str, Any], float]:
    """Judge a model; it is left in evaluation mode.

    Args:
        model: with whole weights.
        task: that it is trained for.
        mec: which layer's features are looked at.
        world: the processes that share the work; all of them call it.
        device: of the model.

    Returns:
        the fields of its record, those of the widest width first and of each in `widths` where there are several; and
        the loss that it is judged by, the mean over the widths, as what is minimised.
    """
    model.eval()
    inputs = task.counted_inputs()
    if inputs is not None:
        inputs = inputs.to(device)
    with SpectrumMeter(model, mec, world) as spectrum:
        result = task.evaluate(model)
    result |= quantization_measures(model, lambda: None if inputs is None else model(inputs))
    result |= spectrum.fields()
    widths = _narrower_widths(model, task, inputs, result)
    losses = [each["loss"] for each in widths.values()] or [result["loss"]]
    return {**result, **({"widths": widths} if widths else {})}, sum(losses) / len(losses)


def _narrower_widths(
    model: nn.Module, task: Task, inputs: Tensor | None, widest: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The fields of a nested model's evaluation by its width, that of the widest known; of another model none."""
    bits = nested_widths(model)
    found = {str(each): widest for each in bits[:1]}
    for each in bits[1:]:
        with using_bits(model, each):
            record = task.evaluate(model)
            record |= quantization_measures(model, lambda: None if inputs is None else model(inputs))
        found[str(each)] = record
    return found
