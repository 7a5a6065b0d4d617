"""A loaded model is its own: what becomes of its file afterwards does not reach it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.models import GPT, Llama, build, preset

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96,
}  # fmt: skip
IDS = torch.arange(16).reshape(2, 8)


def language(name: str) -> Llama | GPT:
    return build(preset(name, **SMALL), seed=0)


def written_over(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\x11" * size)


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(16)


@pytest.mark.parametrize("spoil", [written_over, cut_short])
@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
@pytest.mark.parametrize("embeddings", ["fp32", "bf16", "int8"])
def test_a_file_that_changes_changes_no_loaded_model(
    spoil: Callable[[Path], None], into: bool, name: str, embeddings: str, tmp_path: Path
) -> None:
    model = bb.prepare(language(name), bb.Recipe.bbq(2))
    model(IDS)
    packed = bb.convert(model.eval(), embeddings)  # type: ignore[arg-type]
    bb.save(packed, tmp_path / "m")
    loaded = bb.load(tmp_path / "m", into=language(name)) if into else bb.load(tmp_path / "m")
    spoil(tmp_path / "m" / "model.safetensors")
    state, wanted = loaded.state_dict(), packed.state_dict()
    assert [key for key, value in wanted.items() if not torch.equal(state[key], value)] == []
    with torch.no_grad():
        assert torch.equal(loaded(IDS), packed(IDS))


def test_norms_buffers_and_weights_alone(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 16, 3),
            nn.Flatten(),
            nn.Linear(256, 64),
        )
        return nn.Sequential(*layers, nn.LayerNorm(64), nn.Linear(64, 4))

    recipe = bb.Recipe.of("nf", 4, weight_only="float", keep=("0", "2"))
    x = torch.randn(2, 3, 8, 8)
    model = bb.prepare(make(), recipe)
    model(x)
    packed = bb.convert(model.eval())
    bb.save(packed, tmp_path / "m")
    loaded = bb.load(tmp_path / "m", into=make())
    written_over(tmp_path / "m" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), packed(x))
