"""bitsandbytes' NF4: codes of 4 bits in groups of the flattened weight, one largest magnitude a group (in fp32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bellbox.comparison.baselines.baseline import Baseline, dtype_of
from bellbox.comparison.baselines.job import Job
from bellbox.comparison.baselines.widen import widened
from bellbox.errors import require

_KERNEL_OUTPUTS = 32
"""What the package's kernel for AVX-512 with bf16 takes at a time; it asserts instead of asking."""


def _make(job: Job, folder: Path) -> None:
    transformers = require("transformers", "baselines")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.checkpoint, dtype=dtype_of(job), quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(folder)


def _load(folder: Path, job: Job) -> nn.Module:
    transformers = require("transformers", "baselines")
    kind = require("bitsandbytes", "baselines").nn.Linear4bit
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(job), device_map="cpu")
    for module in model.modules():
        if isinstance(module, kind):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            if not _fits_kernel(module):
                module.support_avx512bf16_for_cpu = False  # decoded to fp32 then, as on other processors
    return widened(model, lambda module: isinstance(module, kind))


def _fits_kernel(layer: Any) -> bool:
    """Whether outputs come in whole tiles, and groups do not run across rows."""
    return not (
        layer.out_features % _KERNEL_OUTPUTS or layer.in_features % layer.weight.quant_state.blocksize
    )


BASELINE = Baseline(
    "bitsandbytes", "bitsandbytes NF4", _make, _load, 4, module="bitsandbytes", package="bitsandbytes"
)
