"""AutoRound: roundings and clips of each block learned by signed gradient descent on its outputs; symmetric groups."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from bellbox.comparison.baselines.baseline import Baseline, plain_transformer
from bellbox.comparison.baselines.job import TOKENIZER, Job
from bellbox.comparison.baselines.widen import widened
from bellbox.errors import require
from bellbox.formats.binarized import narrowed
from bellbox.utils.files import read_tensors, write_tensors


def _make(job: Job, folder: Path) -> None:
    kind = require("auto_round", "baselines").AutoRound
    transformers = require("transformers", "baselines")
    batches = job.calibration_batches()
    fit = kind(
        plain_transformer(job.checkpoint, torch.float32),
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(job.checkpoint / TOKENIZER)),
        bits=4,
        group_size=job.group,
        sym=True,
        iters=job.iterations,
        nsamples=len(batches),
        seqlen=batches[0]["input_ids"].shape[1],
        batch_size=min(8, len(batches)),
        dataset=batches,
        device_map="cpu",
        enable_torch_compile=False,
    )
    fit.quantize_and_save(str(folder / "made"), format="auto_round")
    _move_up(folder)
    _narrow(folder / "model.safetensors")


def _move_up(folder: Path) -> None:
    """Out of the folder of a name of its own that the package makes."""
    (config,) = (folder / "made").rglob("config.json")
    for file in config.parent.iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(folder / "made")


def _narrow(file: Path) -> None:
    """What the package widens to fp32 on a processor without bf16, back in bf16 where that is exact."""
    tensors = {
        name: narrowed(value) if value.is_floating_point() else value
        for name, value in read_tensors(file).items()
    }
    write_tensors(file, tensors, {"format": "pt"})


def _load(folder: Path, job: Job) -> nn.Module:  # noqa: ARG001
    require("auto_round", "baselines")
    transformers = require("transformers", "baselines")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    return widened(model, lambda module: hasattr(module, "qweight"))


BASELINE = Baseline("autoround", "AutoRound", _make, _load, 4, module="auto_round", package="auto-round")
