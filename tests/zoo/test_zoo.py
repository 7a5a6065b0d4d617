"""Architectures of transformers, torchvision and timm: a dozen by default, all with BELLBOX_ZOO=all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import zoo_check
import zoo_models
from zoo_packages import package

import bellbox as bb

WHOLE = os.environ.get("BELLBOX_ZOO") == "all"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "model"),
    [
        pytest.param(
            library,
            model,
            id=model.name,
            marks=pytest.mark.xfail(strict=True, reason=model.fails) if model.fails else (),
        )
        for library, group in zoo_models.ALL.items()
        for model in group
        if WHOLE or model.fast
    ],
)
def test_a_model_of_the_zoo(library: str, model: zoo_models.Model, tmp_path: Path) -> None:
    if package(library) is None:
        pytest.skip(f"{library} is not installed")
    zoo_check.check(model, tmp_path)


def test_a_network_whose_layers_all_compute_otherwise_is_refused_by_name() -> None:
    timm = package("timm")
    if timm is None:
        pytest.skip("timm is not installed")
    with pytest.raises(
        bb.BellboxError, match="ScaledStdConv2d, a subclass of Conv2d with a forward of its own"
    ):
        bb.prepare(timm.create_model("nf_resnet26"), bb.Recipe.bbq(2))
