"""The plain model behind a prepared one, for transformers' `save_pretrained`, as `from_pretrained` reads it.

A prepared model's own state has rotated weights and quantizers, of which `from_pretrained` would only report
missing keys and go on with random weights. So a prepared `PreTrainedModel` is given a quantizer in transformers'
sense that hands out the plain weights. `torch.save(model.state_dict())`, safetensors and `bellbox.save` keep what
they kept. A packed one's codes would be as unreadable, so it is given one that refuses, and says how it is saved.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.nn.quantized import EXTRA_STATE, QuantizedLayer
from bellbox.nn.quantized_table import QuantizedTable

logger = logging.getLogger("bellbox")
LEFT_OUT = (
    "save_pretrained writes the plain weights of a prepared model, without its learned scales; a Trainer resumes "
    "exactly with bellbox.interop.ExactCheckpoints before its class; torch.save(model.state_dict()) keeps everything"
)


class Allowing:
    """What a quantizer in transformers' sense answers of a model of ours, unless it says otherwise."""

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` writes it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether a trainer takes it: prepared as it is, packed with adapters around it."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether it trains without adapters."""
        return True


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as the model would have it without quantizers: plain weights under their plain names."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    own = tuple(
        f"{name}.{part}" if name else part
        for name in layers
        for part in ("weight_quantizer.", "activation_quantizer.", "_extra_state", "rotated_weight")
    )
    own += tuple(
        f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedTable)
    )
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(own)}
    for name, layer in layers.items():
        key = layer.weight_key(f"{name}." if name else "")
        if key not in state:
            state[key] = layer.turned(layer.stored_weight.detach(), back=True)
    return state


def have_plain_weights_saved(model: nn.Module) -> None:
    """Have a `PreTrainedModel` written by `save_pretrained` as the plain model that it was; others are left alone.

    Likewise one within another module, such as what peft puts around a model.
    """
    for each in _pretrained(model):
        if getattr(each, "hf_quantizer", None) is None:
            each.hf_quantizer = _plain_weights()


def refuse_plain_saving(model: nn.Module) -> None:
    """Have `save_pretrained` of a packed `PreTrainedModel` refuse: what it wrote by itself, nobody could read."""
    for each in _pretrained(model):
        if getattr(each, "hf_quantizer", None) is None:
            each.hf_quantizer = _packed_layers()


def _pretrained(model: nn.Module) -> Iterator[Any]:
    """The models of transformers in a model, outermost ones, where that is imported at all."""
    kind = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    return iter(()) if kind is None else _outermost(model, kind)


def _outermost(model: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    """The modules of a class that lie in no other one of it."""
    if isinstance(model, kind):
        yield model
    else:
        for child in model.children():
            yield from _outermost(child, kind)


def saved_as_plain(model: nn.Module) -> bool:
    """Whether `save_pretrained` would write a model as the plain one that it was."""
    return type(model.__dict__.get("hf_quantizer")).__name__ == "PlainWeights"


def stop_saving_plain_weights(model: nn.Module) -> None:
    """The way back from `have_plain_weights_saved`."""
    for module in model.modules():
        if saved_as_plain(module):
            del module.hf_quantizer


def _plain_weights() -> Any:
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class PlainWeights(Allowing, HfQuantizer):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hands out the weights of a prepared model as if it were not prepared."""

        has_said = False
        """Whether somebody was told what is left out."""

        def __init__(self) -> None:
            super().__init__(QuantizationConfigMixin(quant_method="bellbox"))  # pyright: ignore[reportArgumentType]

        def get_state_dict_and_metadata(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, model: Any
        ) -> tuple[dict[str, Tensor], dict[str, Any]]:
            """The plain state."""
            if not self.has_said:
                self.has_said = True
                logger.warning(LEFT_OUT)
            return plain_state(model), {}

        def __reduce__(self) -> Any:
            """A copy is made anew: the class is no attribute of a module."""
            return _plain_weights, ()

    return PlainWeights()


def _packed_layers() -> Any:
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class PackedLayers(Allowing, HfQuantizer):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuses to have packed layers written as if they were plain ones."""

        def __init__(self) -> None:
            super().__init__(QuantizationConfigMixin(quant_method="bellbox"))  # pyright: ignore[reportArgumentType]

        def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
            """No.

            Raises:
                BellboxError: always, with the way out.
            """
            raise BellboxError(
                "save_pretrained knows nothing of packed layers: save this model by "
                "bellbox.interop.transformers.save_transformers(model, folder), or by bellbox.save"
            )

        @property
        def is_qat_trainable(self) -> bool:
            """No: by adapters around it."""
            return False

        def __reduce__(self) -> Any:
            """A copy is made anew: the class is no attribute of a module."""
            return _packed_layers, ()

    return PackedLayers()
