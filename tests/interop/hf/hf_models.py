"""A small packed LLaMA, as Bellbox has it and as transformers loads it; what tests of transformers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bellbox as bb
from bellbox.inference.generation import generate
from bellbox.models import GPT, GPTConfig, Llama, LlamaConfig, build

IDS = torch.arange(2, 34).reshape(2, 16)
LLAMA = LlamaConfig(97, 32, 48, 2, 4, 2, max_position_embeddings=64)


def packed_model(
    config: LlamaConfig | GPTConfig = LLAMA, recipe: bb.Recipe | None = None, embeddings: Any = "fp32"
) -> Llama | GPT:
    """A packed model at random, whose scales have seen data."""
    torch.manual_seed(0)
    model = build(config)
    gains = torch.Generator().manual_seed(1)
    for name, each in model.named_parameters():
        # Without them the sum over a LayerNorm's row is zero but for rounding, which is a threshold (docs/interop.md).
        if each.dim() == 1 and "ln_" in name:
            each.data.add_(0.1 * torch.randn(each.shape, generator=gains))
    bb.prepare(model, recipe or bb.Recipe.bbq(2))
    with torch.no_grad():
        model(IDS)
    return bb.convert(model, embeddings)


def greedy(model: Any, ids: Tensor, new: int = 12, **more: Any) -> Tensor:
    """New tokens of transformers' `generate`."""
    more = {"do_sample": False, "pad_token_id": 0, **more}
    return model.generate(ids, max_new_tokens=new, **more)[:, ids.shape[1] :]


def bellbox_greedy(model: Any, ids: Tensor, new: int = 12) -> Tensor:
    """New tokens of Bellbox's."""
    return torch.stack(list(generate(model, ids, new, temperature=0)), 1)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    """Of a model of either."""
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits
