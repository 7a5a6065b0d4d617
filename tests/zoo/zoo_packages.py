"""Packages that the zoo takes its models from: of the environment, or of `build/zoo` (`make zoo-packages`)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

APART = Path(__file__).parents[2] / "build" / "zoo"
_schemas: list[torch.library.Library] = []


def package(name: str) -> ModuleType | None:
    """An installed package, or None where it is absent."""
    try:
        if name in ("torchvision", "timm", "peft", "trl"):
            if APART.is_dir() and str(APART) not in sys.path:
                sys.path.append(str(APART))
            _declare_operators()
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (
            "timm",
            "torchvision",
            "transformers",
            "peft",
            "trl",
            "accelerate",
            "psutil",
            "datasets",
        ):
            raise
        return None


def _declare_operators() -> None:
    """Declare two operators that torchvision expects of its compiled part when it is imported.

    The wheels on PyPI are built for CUDA and their compiled part does not load beside a CPU build of torch; networks
    need none of it.
    """
    if _schemas:
        return
    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
