"""LLaMA and GPT, ResNet and ViT, small and plain, and the way to and from Hugging Face folders.

```python
from bellbox.models import build, preset

model = build(preset("tiny", vocab_size=2048), seed=0)
logits = model(input_ids)                              # [batch, tokens] int64 -> [batch, tokens, 2048]
```
"""

from __future__ import annotations

from typing import overload

import torch

from bellbox.models.cache import KVCache, SlotCache
from bellbox.models.config import (
    PRESETS,
    VISION_PRESETS,
    AnyConfig,
    GPTConfig,
    LlamaConfig,
    ModelConfig,
    ResNetConfig,
    VisionConfig,
    ViTConfig,
    any_config_from_dict,
    config_from_dict,
    preset,
    vision_preset,
)
from bellbox.models.gpt import GPT
from bellbox.models.hf import load_hf, save_hf
from bellbox.models.initial import lecun_
from bellbox.models.llama import Llama
from bellbox.models.resnet import ResNet
from bellbox.models.vit import ViT

__all__ = [
    "GPT",
    "PRESETS",
    "VISION_PRESETS",
    "AnyConfig",
    "GPTConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "ResNet",
    "ResNetConfig",
    "SlotCache",
    "ViT",
    "ViTConfig",
    "VisionConfig",
    "any_config_from_dict",
    "build",
    "config_from_dict",
    "lecun_",
    "load_hf",
    "preset",
    "save_hf",
    "vision_preset",
]


_MODELS = {LlamaConfig: Llama, GPTConfig: GPT, ResNetConfig: ResNet, ViTConfig: ViT}


@overload
def build(config: ModelConfig, seed: int | None = None) -> Llama | GPT: ...
@overload
def build(config: VisionConfig, seed: int | None = None) -> ResNet | ViT: ...
@overload
def build(config: AnyConfig, seed: int | None = None) -> Llama | GPT | ResNet | ViT: ...
def build(config: AnyConfig, seed: int | None = None) -> Llama | GPT | ResNet | ViT:
    """A freshly initialised model, in fp32 on PyTorch's default device.

    Args:
        config: its shape.
        seed: makes the initial weights a function of it, and leaves the global random state alone; None draws
            from the global state.
    """
    if seed is None:
        return _MODELS[type(config)](config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)
