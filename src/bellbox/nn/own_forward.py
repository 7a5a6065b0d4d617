"""A `forward` that somebody put on a model itself, as trainers do, and what a copy makes of it.

Such a function often keeps the model's first forward in a closure (TRL's fused head does). Python copies no closures:
the copy's forward would still run the model that was copied, with its weights and its speed.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

from torch import nn


def forget_forwards_of(model: nn.Module, copied: nn.Module) -> list[str]:
    """Give modules of a copy the forward of their class where their own one leads back to `model`.

    Returns:
        names of these modules, "" for `copied` itself.
    """
    originals = {id(module) for module in model.modules()} - {id(module) for module in copied.modules()}
    names: list[str] = []
    for name, module in copied.named_modules():
        own = module.__dict__.get("forward")
        if own is not None and _leads_to(own, originals):
            del module.__dict__["forward"]
            names.append(name)
    return names


def _leads_to(value: Any, modules: set[int]) -> bool:
    """Whether a function holds one of these modules in what it binds, wraps or closes over."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if id(each) in modules:
            return True
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, types.MethodType):
            waiting += [each.__self__, each.__func__]
        elif isinstance(each, functools.partial):
            waiting += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, types.FunctionType):
            for cell in each.__closure__ or ():
                with contextlib.suppress(ValueError):  # a cell that is not filled yet
                    waiting.append(cell.cell_contents)
            waiting.append(getattr(each, "__wrapped__", None))
    return False
