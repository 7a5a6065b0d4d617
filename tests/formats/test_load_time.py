"""What opening a packed model imports: torch's compiler would be more than half of the time to the first token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bellbox as bb
from bellbox.models import GPTConfig, LlamaConfig, ResNetConfig, ViTConfig, build

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=64, max_position_embeddings=16),
    "gpt": GPTConfig(**SIZES, max_position_embeddings=16),
    "resnet": ResNetConfig(width=16, stages=2, num_labels=4),
    "vit": ViTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=4
    ),
}
OPEN = """
import sys, torch, bellbox as bb
from bellbox.inference.generation import generate
model = bb.load(sys.argv[1])
if sys.argv[2] == "text":
    print(len(list(generate(model, torch.ones(1, 3, dtype=torch.int64), 4, seed=0))))
else:
    print(len(model(torch.zeros(1, 3, 8, 8))))
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules))
"""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_model_opens_and_runs_without_the_compiler(name: str, tmp_path: Path):
    model = bb.prepare(build(CONFIGS[name], seed=0), bb.Recipe.bbq(2))
    kind = "text" if name in ("llama", "gpt") else "image"
    model(
        torch.ones(1, 3, dtype=torch.int64) if kind == "text" else torch.rand(1, 3, 8, 8)
    )  # sets the scales
    bb.save(bb.convert(model), tmp_path / "packed")
    ran = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path / "packed", kind], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == ["4" if kind == "text" else "1", ""]


def test_what_has_no_memory_gets_it_and_the_rest_keeps_its_own():
    from bellbox.utils.skeleton import give_memory, on_meta

    with on_meta():
        layer = torch.nn.Linear(3, 2)
    assert all(p.is_meta for p in layer.parameters())
    kept = torch.ones(2)
    layer.bias = torch.nn.Parameter(kept)
    give_memory(layer, "cpu")
    assert not layer.weight.is_meta
    assert layer.weight.shape == (2, 3)
    assert layer.bias.data_ptr() == kept.data_ptr()
