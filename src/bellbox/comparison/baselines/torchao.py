"""torchao's int4 weights for the CPU: 4-bit codes with scales and zero points of groups, rounded to nearest.

Its kernel takes rows in sixteens and whole groups; layers of other shapes stay as they are, and so does the head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bellbox.comparison.baselines.baseline import Baseline, dtype_of, plain_transformer
from bellbox.comparison.baselines.job import Job
from bellbox.comparison.baselines.widen import widened
from bellbox.errors import require
from bellbox.recipe import is_head

_FILE = "pytorch_model.bin"
_ROWS = 16


def _make(job: Job, folder: Path) -> None:
    model = plain_transformer(job.checkpoint, dtype_of(job))
    quantize = require("torchao.quantization", "baselines").quantize_
    int4 = require("torchao.prototype.quantization.int4.inference_workflow", "baselines")

    def fits(module: nn.Module, name: str) -> bool:
        fit = isinstance(module, nn.Linear) and not (
            module.in_features % job.group or module.out_features % _ROWS
        )
        return fit and not is_head(name)

    quantize(model, int4.PrototypeInt4WeightOnlyConfig(group_size=job.group), filter_fn=fits)
    torch.save(model.state_dict(), folder / _FILE)
    model.config.save_pretrained(folder)


def _load(folder: Path, job: Job) -> nn.Module:
    kinds = require("torchao.prototype.quantization.int4.int4_opaque_tensor", "baselines")
    transformers = require("transformers", "baselines")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype_of(job))
    state: dict[str, Any] = torch.load(folder / _FILE, weights_only=True)
    model.load_state_dict(state, assign=True)
    model.tie_weights()

    def own(module: nn.Module) -> bool:
        return isinstance(getattr(module, "weight", None), kinds.Int4OpaqueTensor)

    return widened(model, own, dtype_of(job))


BASELINE = Baseline("torchao", "torchao int4", _make, _load, 4, module="torchao", package="torchao")
