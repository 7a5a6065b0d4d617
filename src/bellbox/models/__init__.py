"""LLaMA and GPT, small and plain, and the way to and from Hugging Face folders.

```python
from bellbox.models import build, preset

model = build(preset("tiny", vocab_size=2048), seed=0)
logits = model(input_ids)                              # [batch, tokens] int64 -> [batch, tokens, 2048]
```
"""

from __future__ import annotations

import torch

from bellbox.models.cache import KVCache
from bellbox.models.config import (
    PRESETS,
    GPTConfig,
    LlamaConfig,
    ModelConfig,
    config_from_dict,
    preset,
)
from bellbox.models.gpt import GPT
from bellbox.models.hf import load_hf, save_hf
from bellbox.models.llama import Llama

__all__ = [
    "GPT",
    "PRESETS",
    "GPTConfig",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "ModelConfig",
    "build",
    "config_from_dict",
    "load_hf",
    "preset",
    "save_hf",
]


def build(config: ModelConfig, seed: int | None = None) -> Llama | GPT:
    """A freshly initialised model, in fp32 on PyTorch's default device.

    Args:
        config: its shape.
        seed: makes the initial weights a function of it, and leaves the global random state alone; None draws
            from the global state.
    """
    if seed is None:
        return Llama(config) if isinstance(config, LlamaConfig) else GPT(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)
