"""A loaded model is its own: what becomes of its file afterwards does not reach it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.models import GPT, Llama, build, preset, save_hf
from bellbox.ptq import Job, Settings, binarize_folder

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 96,
}  # fmt: skip
IDS = torch.arange(16).reshape(2, 8)


def language(name: str, **changes: int) -> Llama | GPT:
    return build(preset(name, **{**SMALL, **changes}), seed=0)


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


@pytest.mark.parametrize("spoil", [written_over, cut_short])
@pytest.mark.parametrize("embeddings", [None, "int8"])
def test_a_binarized_folder_that_changes_changes_no_loaded_model(
    spoil: Callable[[Path], None], embeddings: Literal["int8"] | None, tmp_path: Path
) -> None:
    _binarize(tmp_path)
    loaded = bb.load(tmp_path / "m", embeddings=embeddings)
    state = {key: value.clone() for key, value in loaded.state_dict().items()}
    with torch.no_grad():
        wanted = loaded(IDS)
        for file in (tmp_path / "m").glob("*.safetensors"):
            spoil(file)
        assert [key for key, value in loaded.state_dict().items() if not torch.equal(state[key], value)] == []
        assert torch.equal(loaded(IDS), wanted)


def _binarize(root: Path) -> None:
    """A small GPT with byte-level tokens, binarized into `m`."""
    tokenizer = Tokenizer.train(["It was a dark and cold night."], 257)
    save_hf(language("gpt-tiny", vocab_size=tokenizer.vocab_size), root / "hf")
    tokenizer.save(root / "hf" / "tokenizer.json")
    (root / "text").write_text("It was a dark and cold night; nobody knew the way home. " * 9)
    settings = Settings("billm", block=32)
    binarize_folder(Job(root / "hf", root / "m", root / "text", settings, samples=4, context=32), show=False)
