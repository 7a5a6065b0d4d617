"""torchtitan trains a low-bit model: a converter that prepares one of its models with a recipe.

```python
from bellbox.interop.torchtitan import LowBitConverter

config.model_spec = model_registry("debugmodel", converters=[LowBitConverter.Config(method="cewt", bits=2)])
```

FSDP2, activation checkpointing, checkpoints and data stay torchtitan's own. Its models are built without memory and
get their weights later, so scales of weights are set when those are there. Nothing calibrates inputs there: methods
whose scales of inputs a first batch sets are refused. Tensor parallelism is refused too: it cuts the rows that a
token's sigma and rotation belong to. Written for torchtitan 0.3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bellbox.convert import prepare
from bellbox.core.sharded import whole, write_whole
from bellbox.errors import BellboxError, require
from bellbox.nn import quantized_layers
from bellbox.quantizers.learned import LearnedQuantizer
from bellbox.recipe import Recipe

_protocol: Any = require("torchtitan.protocols.model", "torchtitan")
_modules: Any = require("torchtitan.protocols.module", "torchtitan")


class LowBitConverter(_protocol.ModelConfigConverter):
    """Prepares the whole model when it is built; layers are chosen as `bellbox.prepare` chooses them.

    Raises:
        BellboxError: a recipe that cannot be made, or one whose inputs have scales that a first batch sets.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_protocol.ModelConfigConverter.Config):
        """What `Recipe.of` takes."""

        method: str = "cewt"
        """A method whose inputs need no calibration: cewt, quest, or bbq with the option zeta."""
        bits: int = 2
        """Of weights and inputs."""
        options: dict[str, Any] = field(default_factory=dict)
        """Of the method."""

    def __init__(self, config: Any) -> None:
        self.recipe = Recipe.of(config.method, bits=config.bits, options=config.options)
        probe = prepare(nn.Sequential(nn.Linear(8, 8)), self.recipe)
        for _, layer in quantized_layers(probe):
            inputs = layer.activation_quantizer
            if inputs is not None and not inputs.quantizer.is_set:
                raise BellboxError(
                    f"{config.method} sets scales of inputs from a first batch, which torchtitan has no place for; "
                    "take cewt, quest, or bbq with options={'zeta': 1.694}"
                )

    def convert(self, model_config: Any) -> Any:
        """The model's configuration, which builds it prepared."""
        kind, recipe = type(model_config), self.recipe

        class LowBit(kind):
            def build(self, **kwargs: Any) -> Any:
                model = kind.build(self, **kwargs)
                prepare(model, recipe)
                return _as_titan(model)

            def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
                if config.parallelism.tensor_parallel_degree > 1:
                    raise BellboxError(
                        f"parallelism.tensor_parallel_degree is {config.parallelism.tensor_parallel_degree}: low-bit "
                        "layers need whole rows; take 1, and data_parallel_shard_degree for the rest"
                    )
                kind.update_from_config(self, config=config, **kwargs)

        LowBit.__name__ = LowBit.__qualname__ = f"LowBit{kind.__name__}"
        known = {
            each.name: getattr(model_config, each.name)
            for each in dataclasses.fields(model_config)
            if each.init
        }
        return LowBit(**known)


class _OfQuantizer(_modules.Module):
    """What torchtitan asks of each module: ours have no values of their own to draw."""

    def _init_self_parameters(self) -> None:
        pass


class _Root(_modules.Module):
    """A model that sets the scales of its weights once these are there."""

    def init_states(self, **kwargs: Any) -> None:
        super().init_states(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        set_weight_scales(self)  # pyright: ignore[reportArgumentType]


def _as_titan(model: nn.Module) -> nn.Module:
    """The same objects, each of a class that torchtitan takes."""
    for module in model.modules():
        if not isinstance(module, _modules.Module):
            module.__class__ = _joined(_OfQuantizer, type(module))
    model.__class__ = _joined(_Root, type(model))
    return model


_JOINED: dict[tuple[type, type], type] = {}


def _joined(first: type, kind: type) -> type:
    if (first, kind) not in _JOINED:
        _JOINED[first, kind] = type(kind.__name__, (first, kind), {"__module__": kind.__module__})
    return _JOINED[first, kind]


@torch.no_grad()
def set_weight_scales(model: nn.Module) -> None:
    """Set what quantizers of weights learn from whole weights, wherever their parts lie; all processes call it."""
    for _, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, LearnedQuantizer):
            continue
        rows = layer.rows_of(whole(layer.stored_weight.detach()))
        alone = type(quantizer)(quantizer.features, quantizer.spec, quantizer.rows).to(rows.device)
        assert isinstance(alone, LearnedQuantizer)
        alone.initialize(rows)
        given = alone.own_scales()
        for name, scale in quantizer.own_scales().items():
            write_whole(scale.detach(), given[name].detach())
        quantizer._forget()
