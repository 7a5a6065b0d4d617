"""Modules that have a layer's tensors as the file names them, while transformers loads them into their places.

transformers reads tensors one by one into modules that have them under the file's names, moves them to their devices
and, where it thinks that it should, initializes modules by their class. So a low-bit layer stands aside meanwhile: what
stands in its place is no layer of torch's, has exactly the tensors of the file in exactly their dtypes, and is not
initialized. Afterwards the layer takes them. Code of a model that initializes its layers from outside gets the owner's
layer's attributes to see, whose weights are marked as done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bellbox.nn.quantized import EXTRA_STATE

Value = TypeVar("Value")


class Stored(nn.Module):
    """The tensors of one place, by their names below it; what lies deeper is a `Stored` of its own.

    Args:
        tensors: by dotted names; only shapes and dtypes are taken.
        owners: the module that stands aside, if there was one.
    """

    def __init__(self, tensors: Mapping[str, Tensor], owners: nn.Module | None = None) -> None:
        super().__init__()
        self.__dict__["owners"] = owners  # no child
        for each in () if owners is None else (*owners.parameters(), *owners.buffers()):
            each._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        self._is_hf_initialized = True  # transformers' own mark of a module that it need not initialize
        self._extra: Tensor | None = None
        deeper: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, dot, rest = name.partition(".")
            if dot:
                deeper.setdefault(first, {})[rest] = tensor
            elif first == EXTRA_STATE:
                self._extra = _like(tensor)
            else:
                self._buffers[first] = _like(tensor)
        for name, inside in deeper.items():
            self._modules[name] = Stored(inside)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            owners = self.__dict__.get("owners")
            if owners is None:
                raise
            return getattr(owners, name)

    def get_extra_state(self) -> Tensor:
        """The record of a fake-quantized layer."""
        assert self._extra is not None
        return self._extra

    def set_extra_state(self, state: Any) -> None:
        """See `get_extra_state`."""
        self._extra = state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        del keep_vars  # what is loaded is no graph's
        for name, tensor in self._buffers.items():
            destination[prefix + name] = tensor
        if self._extra is not None:
            destination[prefix + EXTRA_STATE] = self._extra

    def tensors(self) -> dict[str, Tensor]:
        """All of them by their names below this place."""
        return dict(self.state_dict(keep_vars=True))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def below(named: Mapping[str, Value], name: str) -> dict[str, Value]:
    """What lies in a place, tensors or descriptions, by its names below it."""
    prefix = f"{name}."
    return {key[len(prefix) :]: value for key, value in named.items() if key.startswith(prefix)}


def tie_on_meta(model: Any) -> None:
    """Tie what the model's class says is tied; transformers does so only after loading."""
    for target, source in model.all_tied_weights_keys.items():
        parent, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_parameter(source))


def untie(model: Any, places: Iterable[str]) -> None:
    """Have transformers not tie what lies in these places: that is done with the layers."""
    inside = tuple(f"{name}." for name in places)
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if not target.startswith(inside) and not source.startswith(inside)
    }


def pass_over(model: Any, names: Iterable[str]) -> None:
    """Have transformers not report tensors of the file that are left out on purpose (`formats.guard`)."""
    model._keys_to_ignore_on_load_unexpected = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *(rf"{re.escape(name)}$" for name in names),
    }


@contextmanager
def plain_dtype() -> Iterator[None]:
    """fp32 by default again: transformers builds a model with the default dtype that it shall have."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
