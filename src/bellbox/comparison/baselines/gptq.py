"""GPTQ through gptqmodel: columns fixed one after another, their error fed to the later ones; symmetric groups.

Where groups do not divide a row, the package pads it. It compiles a small extension the first time, which takes a
minute or more, and needs a compiler and ninja.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from bellbox.comparison.baselines.baseline import Baseline
from bellbox.comparison.baselines.job import Job
from bellbox.comparison.baselines.widen import widened
from bellbox.errors import require


def _package() -> Any:
    os.environ.setdefault(
        "GPTQMODEL_CPU_WORKERS", "2"
    )  # with one, which it takes where there are two cores, it refuses
    return require("gptqmodel", "baselines")


def _make(job: Job, folder: Path) -> None:
    package = _package()
    config = package.QuantizeConfig(bits=4, group_size=job.group, device="cpu")
    model = package.GPTQModel.load(str(job.checkpoint), config)
    model.quantize(job.calibration_batches(), batch_size=1)
    model.save(str(folder))


def _load(folder: Path, job: Job) -> nn.Module:  # noqa: ARG001
    package = _package()
    model = package.GPTQModel.load(str(folder), device="cpu", backend=package.BACKEND.TORCH).model
    # Layers that are given fp32 multiply in it; in fp16, which they store, a CPU is some thirty times as slow.
    return widened(model, lambda module: hasattr(module, "qweight"))


BASELINE = Baseline(
    "gptq", "GPTQ", _make, _load, 4, module="gptqmodel", package="gptqmodel",
    install="pip install --no-deps gptqmodel (docs/baselines.md says what it needs beside that)",
)  # fmt: skip
