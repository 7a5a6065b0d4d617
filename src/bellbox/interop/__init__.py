"""Bellbox models in other people's programs: one part a program, imported where it is used.

Each part needs an extra of its own and says which one where it is missing. A program that cannot represent the
function gets a refusal, or "weights only" in so many words; never something that computes another thing.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "BellboxConfig": "bellbox.interop.transformers",
    "ExactCheckpoints": "bellbox.interop.trainer",
    "TorchAOConfig": "bellbox.interop.torchao",
    "torchao_filter": "bellbox.interop.torchao",
}
"""Names that are taken from a part when somebody asks for them: importing a part imports its program."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
