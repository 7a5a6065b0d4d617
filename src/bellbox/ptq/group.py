"""The layers that read one tensor: transformed together, binarized one by one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.core.binarize import BLOCK, Method, Variant
from bellbox.errors import BellboxError
from bellbox.formats.binarized import Quantization
from bellbox.models.blocks import Group
from bellbox.nn.binarized_linear import BinarizedLinear
from bellbox.ptq.feedback import binarize_matrix, output_error
from bellbox.ptq.hessian import InputStatistics, inverse_factor
from bellbox.ptq.ltdb import bells, double_bell, fold, learn_scale


@dataclass(frozen=True)
class Settings:
    """How weights are binarized."""

    method: Method = "dbellquant"
    """Rounding to nearest, BiLLM, or BiLLM on weights that LTDB has transformed."""
    variant: Variant = "clean"
    """As the authors' code, or cleaned up."""
    power: int = 2
    """Of LTDB's loss; 1 or 2."""
    exponent: float | None = None
    """Of LTDB's start, 0 to 1: how far outliers of the activations go into the weights; None for the variant's own."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, in units of its mean."""
    block: int = BLOCK
    """Columns that share scales."""
    activation_bits: int = 16
    """What each token of a layer's input is rounded to when the model runs; 16 for no rounding."""

    @property
    def quantization(self) -> Quantization:
        """What the folder says of it."""
        return Quantization(self.method, self.variant, self.power, self.block, self.activation_bits)

    def check(self) -> Settings:
        """Refuse what cannot be done; returns self.

        Raises:
            BellboxError: naming the setting and its limit.
        """
        for name, ok, limit in (
            ("power", self.power in (1, 2), "1 or 2"),
            ("exponent", self.exponent is None or 0 <= self.exponent <= 1, "from 0 to 1"),
            ("damping", 0 <= self.damping < float("inf"), "at least 0"),
            ("block", 8 <= self.block <= 1 << 16 and self.block % 8 == 0, "a multiple of 8, from 8 to 65536"),
            ("activation_bits", 2 <= self.activation_bits <= 16, "from 2 to 16"),
        ):
            if not ok:
                raise BellboxError(f"{name} is {getattr(self, name)}, must be {limit}")
        return self


@torch.no_grad()
def binarize_group(
    block: nn.Module, group: Group, seen: InputStatistics, settings: Settings, name: str
) -> tuple[dict[str, tuple[BinarizedLinear, float]], dict[str, Any] | None]:
    """Make binarized layers of a group's linear ones; the norm before them takes the inverse scale, where there is one.

    Args:
        block: that the group is of; only the norm and, with it, the linear layers' weights are changed.
        group: which layers.
        seen: their inputs on the calibration text.
        settings: how.
        name: of the block, for messages.

    Returns:
        by layer the new layer and the relative error of its outputs; and what LTDB did, None where it did nothing.

    Raises:
        BellboxError: a norm that takes no scale, a singular Hessian, weights beyond fp16.
    """
    layers: dict[str, nn.Linear] = {}
    for layer in group.layers:
        module = block.get_submodule(layer)
        assert isinstance(module, nn.Linear)
        layers[layer] = module
    hessian, learned = seen.hessian(), None
    if settings.method == "dbellquant" and group.norm is not None:
        norm = block.get_submodule(group.norm)
        learned, scale = _transform(norm, group, list(layers.values()), seen.largest, settings, name)
        hessian = hessian / torch.outer(scale, scale)
    first = f"{name}.{group.layers[0]}"
    upper = None if settings.method == "rtn" else inverse_factor(hessian, settings.damping, first)
    made: dict[str, tuple[BinarizedLinear, float]] = {}
    for layer, module in layers.items():
        blocks, weight = binarize_matrix(module.weight, upper, settings.variant, settings.block)
        if not bool(torch.isfinite(weight).all()):
            raise BellboxError(f"{name}.{layer}: its weights are too large for fp16 scales, or not finite")
        new = BinarizedLinear.from_blocks(blocks, module.bias, settings.block)
        made[layer] = new, output_error(module.weight, weight, hessian)
    return made, learned


def _transform(
    norm: nn.Module, group: Group, layers: list[nn.Linear], largest: Tensor, settings: Settings, name: str
) -> tuple[dict[str, Any], Tensor]:
    begun = time.monotonic()
    weights = [layer.weight for layer in layers]
    before = torch.cat(weights)
    learned = learn_scale(
        weights,
        largest,
        variant=settings.variant,
        exponent=settings.exponent,
        power=settings.power,
        block=settings.block,
    )
    fold(norm, layers, learned.scale, f"{name}.{group.norm}")
    after = torch.cat([layer.weight for layer in layers])
    record = {
        "norm": group.norm,
        "steps": learned.steps,
        "loss": learned.loss,
        "loss_untransformed": float(double_bell(before, settings.power, settings.block)[0]),
        "bells_before": bells(before, settings.block),
        "bells_after": bells(after, settings.block),
        "scale_spread": float(learned.scale.abs().max() / learned.scale.abs().min()),
        "seconds": time.monotonic() - begun,
    }
    return record, learned.scale
