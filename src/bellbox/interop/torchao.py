"""torchao's `quantize_` with the layers of Bellbox: the two steps that its `QATConfig` has.

```python
from torchao import quantize_

config = bb.interop.TorchAOConfig(bits=2)
quantize_(model, config, filter_fn=bb.interop.torchao_filter(model, config))      # then train as usual
quantize_(model, dataclasses.replace(config, step="convert"))                     # packed integers, in place
```

`quantize_` hands over one layer after the other, where `bellbox.prepare` looks at the whole model. So what follows from
the whole is not there, and none of it changes a code:

- Which layers: torchao's own filter takes every `nn.Linear`, heads too; `torchao_filter` takes those that `prepare`
  would.
- Weights stay as they are and are rotated in each forward: one layer cannot see whether another reads its weight.
- Layers that read one input (q, k, v) quantize it each for themselves, and learn a scale each.

A model prepared this way may as well be packed whole, by `bellbox.convert`, which has siblings share again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from bellbox.convert import convert, new_layers, prepare
from bellbox.errors import BellboxError, require
from bellbox.nn import QuantizedLayer, without_fused_paths
from bellbox.nn.adopted import become
from bellbox.recipe import Recipe

Step = Literal["prepare", "convert"]
_core = require("torchao.core.config", "torchao")
_registry = require("torchao.quantization.transform_module", "torchao")


@dataclasses.dataclass
class TorchAOConfig(_core.AOBaseConfig):
    """What `torchao.quantize_` is to make of each layer.

    Raises:
        BellboxError: a step, method or number that there is not.
    """

    bits: int | None = None
    """Of weights and inputs, 1 to 8; the method's own choice where None, mostly 2."""
    method: str = "bbq"
    """One of `bellbox.quantizers.METHODS`."""
    step: Step = "prepare"
    """`prepare` before training, `convert` after it."""
    levels: int | None = None
    """Number of levels instead of bits; 3 is ternary."""
    block: int | None = None
    """Largest Hadamard block."""
    weight_only: Literal["float", "int8"] | None = None
    """Quantize weights only, and leave inputs in `float` or round them to 8 bits."""
    options: Mapping[str, bool | float | str] | None = None
    """Options of the method."""

    def __post_init__(self) -> None:
        if self.step not in ("prepare", "convert"):
            raise BellboxError(f"TorchAOConfig: the step is {self.step!r}; there are prepare and convert")
        self.recipe()

    def recipe(self, **choices: Any) -> Recipe:
        """The recipe that `bellbox.prepare` takes for the same: unrotated weights, an input each."""
        common = {name: getattr(self, name) for name in ("levels", "block", "weight_only", "options")}
        common |= {"weights_rotated": False, "share_inputs": False, **choices}
        if self.method == "bbq":
            return Recipe.bbq(self.bits, **common)
        return Recipe.of(self.method, self.bits, **common)


def torchao_filter(model: nn.Module, config: TorchAOConfig) -> Callable[[nn.Module, str], bool]:
    """A `filter_fn` for `torchao.quantize_`: the layers that `bellbox.prepare` would take, or that were prepared.

    It also has torch's own transformer layers call their linear layers in evaluation, where they would read the weights
    past them.

    Args:
        model: that `quantize_` is called with.
        config: likewise.

    Raises:
        BellboxError: in the step `prepare`, a model that `bellbox.prepare` refuses.
    """
    if config.step == "convert":
        return lambda module, _: isinstance(module, QuantizedLayer)
    chosen = {
        id(plain) for plain, made in new_layers(model, config.recipe()) if isinstance(made, QuantizedLayer)
    }
    without_fused_paths(model)
    return lambda module, _: id(module) in chosen


def _transform(module: nn.Module, config: TorchAOConfig) -> nn.Module:
    """One layer, which stays the object that it is."""
    if config.step == "prepare":
        return prepare(module, config.recipe(keep_ends=False))
    if not isinstance(module, QuantizedLayer):
        return module
    inputs = module.activation_quantizer
    if inputs is not None and not inputs.quantizer.is_set:
        raise BellboxError(
            "TorchAOConfig(step='convert'): no data ever reached a layer of shape "
            f"{module.row_count} x {module.row_length}; run a batch first, or pack the whole model by bellbox.convert"
        )
    training = module.training
    become(module, convert(module))
    return module.train(training)


_registry.register_quantize_module_handler(TorchAOConfig)(_transform)
