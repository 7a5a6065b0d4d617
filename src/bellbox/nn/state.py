"""State of a prepared layer: its record, and how it is brought into another recipe.

Each fake-quantized layer puts a record of 128 bytes into its state dict, beside its tensors: method, levels, zero
point, rotation and granularity of weight and input, and whether the weight is stored rotated. A state dict is
looked at as a whole, layer by layer, before anything is copied: what is equal is copied, what can be converted is
converted, and what is another function is refused by name, `strict=False` or not.

A weight that is stored rotated has another name, `rotated_weight`, so that no serializer can lose that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.nn.quantized import EXTRA_STATE, ROTATED, QuantizedLayer, record_of
from bellbox.nn.quantized_table import QuantizedTable
from bellbox.nn.record import Record, Side
from bellbox.nn.tools import is_guard
from bellbox.quantizers.base import Quantizer
from bellbox.quantizers.learned import LearnedQuantizer


def _differences(mine: Side | None, given: Side | None, rotation: bool) -> list[str]:
    """Fields that make another function, `name A there, B here`; block and signs only where `rotation`."""
    if mine is None or given is None:
        return [] if mine is given else [f"{'nothing' if given is None else given.method} there"]
    found: list[str] = []
    for each in dataclasses.fields(Side):
        there, here = getattr(given, each.name), getattr(mine, each.name)
        if there != here and (rotation or each.name not in ("block", "signs")):
            label = {"twice_zero_point": "zero point", "options": "options"}.get(each.name, each.name)
            if each.name == "twice_zero_point":
                there, here = there / 2, here / 2
            found.append("other options" if each.name == "options" else f"{label} {there} there, {here} here")
    return found


def adopt(layer: QuantizedLayer, state: MutableMapping[str, Any], prefix: str, name: str) -> None:
    """Bring a layer's part of a state into this layer's form, in place; see the module.

    Args:
        layer: that the state is to be loaded into.
        state: tensors by name, those of this layer beginning with `prefix`.
        prefix: with its last dot.
        name: of the layer, for messages.

    Raises:
        BellboxError: the state is that of another function.
    """
    mine, key, turned = record_of(layer), prefix + EXTRA_STATE, prefix + ROTATED
    plain = layer.weight_key(prefix)
    if is_guard(state.get(plain)):
        del state[plain]
    has_quantizer = any(
        each.startswith((prefix + "weight_quantizer.", prefix + "activation_quantizer.")) for each in state
    )
    if key in state:
        _adopt_recorded(layer, mine, Record.unpack(state[key], name), state, prefix, name)
    elif plain in state and has_quantizer and mine.rotated:
        state[turned] = state.pop(plain)  # before there were records, rotated weights were called `weight`
    elif plain in state and not has_quantizer:
        _adopt_plain(layer, mine, state, prefix)
    elif turned in state and not mine.rotated:
        raise BellboxError(
            f"{name}: the state's weight is rotated, without a record of how: load it as it was saved"
        )
    if plain in state or turned in state or key in state:
        state[key] = mine.pack()


def _beside(stored: Tensor, given: Tensor) -> Tensor:
    """A weight of a state in the dtype and on the device of a layer, unless that has no memory yet."""
    return given.to(given.device if stored.is_meta else stored.device, stored.dtype)


def _adopt_recorded(
    layer: QuantizedLayer,
    mine: Record,
    given: Record,
    state: MutableMapping[str, Any],
    prefix: str,
    name: str,
) -> None:
    same_rotation = mine.rotated == given.rotated
    for side, one, other in (("weight", mine.weight, given.weight), ("input", mine.input, given.input)):
        found = _differences(one, other, rotation=same_rotation or side == "input")
        if found:
            raise BellboxError(
                f"{name}: the state is of another recipe: {side}: {'; '.join(found)}; prepare the model with the "
                "recipe that it was saved with"
            )
    if same_rotation:
        return
    there, here = (
        prefix + (ROTATED if given.rotated else "weight"),
        prefix + (ROTATED if mine.rotated else "weight"),
    )
    if there in state:
        stored = layer.stored_weight
        with torch.no_grad():
            state[here] = layer.turned(_beside(stored, state.pop(there)), back=given.rotated)


def _adopt_plain(layer: QuantizedLayer, mine: Record, state: MutableMapping[str, Any], prefix: str) -> None:
    """A plain layer's weight: rotated where that is stored, and the scales are set anew from what comes."""
    if mine.rotated:
        stored = layer.stored_weight
        with torch.no_grad():
            state[prefix + ROTATED] = layer.turned(_beside(stored, state.pop(prefix + "weight")))
    owned = layer._modules.get("activation_quantizer")
    for part, module in (("weight_quantizer", layer.weight_quantizer), ("activation_quantizer", owned)):
        if module is None:
            continue
        for inner, quantizer in module.named_modules():
            if isinstance(quantizer, Quantizer):
                at = f"{prefix}{part}.{inner}." if inner else f"{prefix}{part}."
                own = quantizer.own_scales() if isinstance(quantizer, LearnedQuantizer) else {}
                for leaf, value in quantizer.state_dict().items():
                    state.setdefault(at + leaf, torch.full_like(value, math.nan) if leaf in own else value)


def _adopt_table(table: QuantizedTable, state: MutableMapping[str, Any], prefix: str, name: str) -> None:
    """Likewise of an embedding or a head: a plain one's weight is taken as it is."""
    key, mine = prefix + EXTRA_STATE, table.record()
    if key in state:
        found = _differences(mine.weight, Record.unpack(state[key], name).weight, rotation=True)
        if found:
            found = [each.replace("block", "group") for each in found]
            raise BellboxError(
                f"{name}: the state is of another recipe: {'; '.join(found)}; prepare the model with the "
                "embedding_bits and embedding_group that it was saved with"
            )
    elif prefix + "weight" in state:
        state[key] = mine.pack()


def adopt_all(model: nn.Module, state: MutableMapping[str, Any], prefix: str = "") -> None:
    """`adopt` for every fake-quantized layer of a model, and every fake-quantized embedding and head.

    Raises:
        BellboxError: the first layer whose state is that of another function; nothing was copied yet.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedTable):
            _adopt_table(module, state, f"{prefix}{name}." if name else prefix, name or "the embedding")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            adopt(module, state, f"{prefix}{name}." if name else prefix, name or "the layer")


_HANDLE = "_bellbox_looks"


def _before_loading(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    adopt_all(module, state_dict, prefix)


def look_before_loading(model: nn.Module) -> None:
    """Have a model look at a state dict as a whole before it takes anything of it."""
    for module in (model, *(m for m in model.modules() if isinstance(m, QuantizedLayer | QuantizedTable))):
        if _HANDLE not in module.__dict__:
            handle = module.register_load_state_dict_pre_hook(_before_loading)
            object.__setattr__(module, _HANDLE, handle)


def look_no_more(model: nn.Module) -> None:
    """The way back from `look_before_loading`."""
    for module in model.modules():
        handle = module.__dict__.pop(_HANDLE, None)
        if handle is not None:
            handle.remove()
