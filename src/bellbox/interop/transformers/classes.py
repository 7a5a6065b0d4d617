"""The class that a model with low-bit layers gets: its own, with what Bellbox adds.

Hooks, attributes and `isinstance` stay; so does the name, which transformers writes into `config.json`.
"""

from __future__ import annotations

from typing import Any

from bellbox.interop.transformers.arithmetic import with_bellbox_arithmetic
from bellbox.interop.transformers.decoding import ShortDecoding
from bellbox.interop.transformers.saving import SavedByBellbox
from bellbox.interop.transformers.steps import FAMILIES, why_no_steps
from bellbox.nn import CodedLayer
from bellbox.nn.adopted import class_for


class PackedModel(SavedByBellbox):
    """Of a model with packed layers."""

    def generation_report(self) -> str | None:
        """How `generate` decodes, in words; None of a model that generates nothing."""
        model: Any = self
        if not model.can_generate():
            return None
        why = why_no_steps(model)
        return "fused steps" if why is None else f"transformers' own loop, layer by layer: {why}"


class PackedDecoder(PackedModel, ShortDecoding):
    """Of a language model whose decode step is fused."""


def adopt(model: Any) -> None:
    """Change the class of a `PreTrainedModel` with low-bit layers, in place."""
    own = type(model)
    packed = any(isinstance(module, CodedLayer) for module in model.modules())
    if issubclass(own, SavedByBellbox):
        own = own.__dict__["_made_of"][1]  # a prepared model that was packed since
    kind = SavedByBellbox if not packed else PackedDecoder if own.__name__ in FAMILIES else PackedModel
    made = class_for(kind, own)
    made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__
    model.__class__ = made
    if packed:
        with_bellbox_arithmetic(model)
