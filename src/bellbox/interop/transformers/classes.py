"""The class that a model with low-bit layers gets: its own, with what Bellbox adds.

Hooks, attributes and `isinstance` stay; so does the name, which transformers writes into `config.json`.
"""

from __future__ import annotations

from typing import Any

from bellbox.formats.description import RMS_NORM
from bellbox.interop.transformers.decoding import ShortDecoding, with_bellbox_norms
from bellbox.interop.transformers.saving import SavedByBellbox
from bellbox.interop.transformers.steps import FAMILIES
from bellbox.nn import CodedLayer
from bellbox.nn.adopted import class_for


class PackedDecoder(SavedByBellbox, ShortDecoding):
    """Of a language model whose decode step is fused."""


def adopt(model: Any) -> None:
    """Change the class of a `PreTrainedModel` with low-bit layers, in place."""
    own = type(model)
    packed = any(isinstance(module, CodedLayer) for module in model.modules())
    if issubclass(own, SavedByBellbox):
        own = own.__dict__["_made_of"][1]  # a prepared model that was packed since
    kind = PackedDecoder if packed and own.__name__ in FAMILIES else SavedByBellbox
    made = class_for(kind, own)
    made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__
    model.__class__ = made
    if packed and getattr(model.config, RMS_NORM, None) == "bellbox" and model.config.model_type == "llama":
        with_bellbox_norms(model)
