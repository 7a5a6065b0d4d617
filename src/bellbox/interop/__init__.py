"""Bellbox models in other people's programs: one part a program, imported where it is used.

Each part needs an extra of its own and says which one where it is missing. A program that cannot represent the
function gets a refusal, or "weights only" in so many words; never something that computes another thing.
"""

from __future__ import annotations

import importlib
from typing import Any

_PARTS = {
    "BellboxConfig": "transformers",
    "ExactCheckpoints": "trainer",
    "TorchAOConfig": "torchao",
    "torchao_filter": "torchao",
}
"""Public names, by the part that has them: importing a part imports its program."""


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return getattr(importlib.import_module(f"{__name__}.{_PARTS[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
