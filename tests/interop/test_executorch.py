"""Programs of ExecuTorch: lowered, and run by its own runtime where the kernels are built."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox as bb
from bellbox.cli import export_executorch
from bellbox.errors import BellboxError
from bellbox.models import build, preset

KERNELS = Path(__file__).parents[2] / "build" / "executorch" / "libbellbox_executorch.so"
INSTALLED = importlib.util.find_spec("executorch") is not None


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    name, recipe = request.param
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = build(preset(name, vocab_size=300, max_position_embeddings=64, **sizes), seed=0)
    gains = torch.Generator().manual_seed(1)
    for each in model.parameters():
        # Without them the sum over a LayerNorm's row is zero but for rounding, and that is a threshold.
        if each.dim() == 1:
            each.data.add_(0.1 * torch.randn(each.shape, generator=gains))
    model = bb.prepare(model, bb.Recipe.bbq(**recipe)).eval()
    bb.calibrate(model, [torch.arange(64).view(4, 16)])
    bb.save(bb.convert(model), tmp_path / "packed")
    return tmp_path / "packed"


KINDS = [("tiny", {"bits": 2, "embedding_bits": 8}), ("gpt-tiny", {"bits": 2})]


@pytest.mark.skipif(not INSTALLED, reason="executorch is not installed")
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_a_program_is_the_packed_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--kernels", str(KERNELS)] if KERNELS.is_file() else []
    export_executorch.main([str(folder), str(tmp_path / "out"), *flags])
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "model.pte").stat().st_size > 10_000
    assert "bellbox::packed_linear.out" in said
    assert ("within 1e-5" in said) == bool(flags)
    assert ("not run" in said) != bool(flags)


@pytest.mark.skipif(INSTALLED, reason="executorch is installed")
def test_without_it_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(BellboxError, match=r"pip install 'bellbox\[executorch\]'"):
        export_executorch.main([str(tmp_path), str(tmp_path / "out")])
