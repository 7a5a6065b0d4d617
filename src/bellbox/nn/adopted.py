"""Layers that change their class in place, so that whoever holds one (a hook, an attribute, another module) still does.

A low-bit layer is its owner's own object with another class: hooks, attributes and other names of it stay. For a
subclass of `nn.Linear` or `nn.Conv2d` the class is made at run time, derived from the low-bit layer and the owner's
class, so that `isinstance` holds for both.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_classes: dict[tuple[type, type], type] = {}


def class_for(kind: type, plain: type) -> type:
    """The low-bit class `kind` for layers of class `plain`: `kind` itself for torch's own classes."""
    if issubclass(kind, plain):
        return kind
    if (kind, plain) not in _classes:
        name = f"{kind.__name__}_{plain.__name__}"
        body = {"__reduce_ex__": _reduce, "_made_of": (kind, plain), "__doc__": kind.__doc__}
        _classes[kind, plain] = type(name, (kind, plain), body)
    return _classes[kind, plain]


def plain_class_of(kind: Any) -> type:
    """The owner's class behind a low-bit one, as far as the class itself knows it."""
    made_of = kind.__dict__.get("_made_of")
    return kind.plain_kind if made_of is None else made_of[1]


def owners_class(layer: Any) -> type:
    """The owner's class of a layer, whether low-bit or not."""
    kind: Any = type(layer)
    return getattr(layer, "plain_class", None) or kind.__dict__.get("_made_of", (None, kind))[1]


def _reduce(layer: Any, protocol: Any) -> Any:
    """A class made at run time is made again where the layer is read."""
    del protocol
    return _remade, layer._made_of, layer.__getstate__() if hasattr(layer, "__getstate__") else layer.__dict__


def _remade(kind: type, plain: type) -> Any:
    made = class_for(kind, plain)
    return object.__new__(made)


def twin(layer: nn.Module, kind: type) -> Any:
    """A new object of another class with all that a layer has; dictionaries of tensors and modules are its own."""
    made = object.__new__(kind)
    made.__dict__.update(layer.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        made.__dict__[name] = layer.__dict__[name].copy()
    return made


def become(layer: nn.Module, other: nn.Module) -> None:
    """Turn a layer into what `other` is; `other` is not to be used afterwards."""
    layer.__dict__.clear()
    layer.__dict__.update(other.__dict__)
    layer.__class__ = type(other)
