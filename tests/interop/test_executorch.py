"""Programs of ExecuTorch: lowered, and run by its own runtime where the kernels are built."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox as bb
from bellbox.cli import export_executorch
from bellbox.errors import BellboxError
from bellbox.models import ResNetConfig, ViTConfig, build, preset

KERNELS = Path(__file__).parents[2] / "build" / "executorch" / "libbellbox_executorch.so"
INSTALLED = importlib.util.find_spec("executorch") is not None


SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 300, "max_position_embeddings": 64}
IMAGES: dict[str, Any] = {"image_size": 16, "num_labels": 5}


def shape(kind: str) -> Any:
    if kind == "resnet":
        return ResNetConfig(width=16, stages=2, blocks=1, **IMAGES)
    if kind == "vit":
        return ViTConfig(**SMALL, patch_size=4, num_attention_heads=4, **IMAGES)
    return preset(kind, **TEXT)


def packed(kind: str, recipe: dict[str, Any], folder: Path) -> Path:
    model = build(shape(kind), seed=0)
    numbers = torch.Generator().manual_seed(1)
    for each in model.parameters():
        # Without them the sum over a LayerNorm's row is zero but for rounding, and that is a threshold.
        if each.dim() == 1:
            each.data.add_(0.1 * torch.randn(each.shape, generator=numbers))
    model = bb.prepare(model, bb.Recipe.bbq(**recipe)).eval()
    seen = torch.rand(8, 3, 16, 16, generator=numbers) if "image_size" in vars(model.config) else None
    bb.calibrate(model, [torch.arange(64).view(4, 16) if seen is None else seen])
    bb.save(bb.convert(model), folder)
    return folder


KINDS = [
    ("tiny", {"bits": 2, "embedding_bits": 8}, ("packed_linear", "table_rows", "int8_linear", "rms_norm")),
    ("tiny", {"bits": 1, "embedding_bits": 4}, ("packed_linear", "table_rows", "int4_linear", "rms_norm")),
    ("gpt-tiny", {"bits": 2}, ("packed_linear",)),
    ("resnet", {"bits": 2}, ("packed_conv2d",)),
    ("resnet", {"bits": 1}, ("packed_conv2d",)),
    ("vit", {"bits": 3}, ("packed_linear",)),
]


@pytest.mark.skipif(not INSTALLED, reason="executorch is not installed")
@pytest.mark.parametrize(("kind", "recipe", "operators"), KINDS)
def test_a_program_is_the_packed_model(
    kind: str,
    recipe: dict[str, Any],
    operators: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--kernels", str(KERNELS)] if KERNELS.is_file() else []
    folder = packed(kind, recipe, tmp_path / "packed")
    export_executorch.main([str(folder), str(tmp_path / "out"), *flags])
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "model.pte").stat().st_size > 10_000
    assert set(re.findall(r"bellbox::(\w+)\.out", said)) == set(operators)
    assert ("of them within 1e-5" in said) == bool(flags)
    assert ("not run" in said) != bool(flags)


@pytest.mark.skipif(not INSTALLED, reason="executorch is not installed")
@pytest.mark.parametrize("kind", ["tiny", "gpt-tiny"])
def test_a_program_with_a_cache_goes_on_with_a_text(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--kernels", str(KERNELS)] if KERNELS.is_file() else []
    folder = packed(kind, {"bits": 2, "embedding_bits": 8}, tmp_path / "packed")
    export_executorch.main([str(folder), str(tmp_path / "out"), "--cache", *flags])
    assert ("of them within 1e-5" in capsys.readouterr().out) == bool(flags)


@pytest.mark.skipif(not INSTALLED, reason="executorch is not installed")
def test_what_the_kernels_do_not_run_is_one_line(tmp_path: Path) -> None:
    any_size = build(ResNetConfig(width=16, stages=2, blocks=1, num_labels=5), seed=0)
    model = bb.prepare(any_size, bb.Recipe.bbq(2)).eval()
    bb.calibrate(model, [torch.rand(2, 3, 16, 16)])
    bb.save(bb.convert(model), tmp_path / "any")
    for recipe, words in (
        (
            {"bits": 4, "block": 1, "weight_only": "float"},
            "q_proj is or has a layer of low-bit weights alone",
        ),
        ({"bits": 2, "options": {"signs": True}}, "q_proj is or has random signs before its rotation"),
    ):
        folder = packed("tiny", recipe, tmp_path / "packed")
        with pytest.raises(BellboxError, match=words):
            export_executorch.main([str(folder), str(tmp_path / "out")])
        shutil.rmtree(folder)
    with pytest.raises(BellboxError, match="images of one size"):
        export_executorch.main([str(tmp_path / "any"), str(tmp_path / "out")])
    with pytest.raises(BellboxError, match="a cache is of language models"):
        export_executorch.main([str(tmp_path / "any"), str(tmp_path / "out"), "--cache"])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(INSTALLED, reason="executorch is installed")
def test_without_it_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(BellboxError, match=r"pip install 'bellbox\[executorch\]'"):
        export_executorch.main([str(tmp_path), str(tmp_path / "out")])
