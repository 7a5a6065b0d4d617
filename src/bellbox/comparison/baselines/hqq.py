"""HQQ (half-quadratic quantization): 4-bit codes with scales and zero points of groups, fitted without data."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bellbox.comparison.baselines.baseline import Baseline, dtype_of, plain_transformer
from bellbox.comparison.baselines.job import Job
from bellbox.comparison.baselines.widen import widened
from bellbox.errors import require


def _make(job: Job, folder: Path) -> None:
    core, models = require("hqq.core.quantize", "baselines"), require("hqq.models.hf.base", "baselines")
    model, dtype = plain_transformer(job.checkpoint, dtype_of(job)), dtype_of(job)
    config = core.BaseQuantizeConfig(nbits=4, group_size=job.group)
    models.AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=dtype, device="cpu")
    models.AutoHQQHFModel.save_quantized(model, str(folder))


def _load(folder: Path, job: Job) -> nn.Module:
    core, models = require("hqq.core.quantize", "baselines"), require("hqq.models.hf.base", "baselines")
    dtype = dtype_of(job)
    model = models.AutoHQQHFModel.from_quantized(str(folder), compute_dtype=dtype, device="cpu")
    inside = None if dtype == torch.float32 else dtype
    return widened(model, lambda module: isinstance(module, core.HQQLinear), inside)


BASELINE = Baseline("hqq", "HQQ", _make, _load, 4, module="hqq", package="hqq")
