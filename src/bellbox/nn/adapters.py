"""A limit of peft's adapters on layers of codes: they cannot train a copy of one (`modules_to_save`).

A copy of a packed layer has no parameters, so peft would train nothing and say nothing. peft asks nobody before it
copies a module, but it registers the module under a known name in a wrapper; torch lets others see that.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from bellbox.errors import BellboxError


@cache
def refuse_as_modules_to_save(kind: type[nn.Module]) -> None:
    """Refuse, from the first call on, that layers of a class of codes become peft's `modules_to_save`."""
    register_module_module_registration_hook(partial(_refuse, kind))


def _refuse(kind: type[Any], holder: nn.Module, name: str, module: nn.Module | None) -> None:
    """The hook: a module has got a submodule of that name.

    Raises:
        BellboxError: it is one that peft is about to copy for training, and codes are in it.
    """
    if name != "original_module" or type(holder).__name__ != "ModulesToSaveWrapper" or module is None:
        return
    for inner, layer in module.named_modules():
        if isinstance(layer, kind):
            where = f"{inner}, " if inner else ""
            raise BellboxError(
                f"modules_to_save: there is nothing to train in a packed layer ({where}{type(layer).__name__}, "
                f"{layer.row_count} x {layer.row_length}); give it an adapter (target_modules), or train the prepared "
                "model"
            )
