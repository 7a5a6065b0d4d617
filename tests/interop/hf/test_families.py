"""Families of transformers through its own loader: prepare, train, convert, save, load; equal at every step.

Three by default, all of the zoo's models of transformers with BELLBOX_ZOO=all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo_check
import zoo_models
from torch import nn
from zoo_packages import package

import bellbox as bb

if package("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from bellbox.interop import BellboxConfig

WHOLE = os.environ.get("BELLBOX_ZOO") == "all"
FAST = ("Qwen2MoeForCausalLM", "GPT2LMHeadModel", "ConvNextForImageClassification")
ROUNDS = 10 if WHOLE else 2
"""Of two steps each, before and after the training form is saved."""

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]


@pytest.fixture
def quiet() -> None:
    transformers: Any = package("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def train(model: nn.Module, about: zoo_models.Model, rounds: int) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # masks of wav2vec
    for _ in range(rounds):
        zoo_check.train(model, about.inputs())


def same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        # NaN is a scale that no data reached yet
        equal = torch.equal(value.nan_to_num(7.5), second[name].nan_to_num(7.5))
        assert equal, name
        assert value.dtype == second[name].dtype, name


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@torch.no_grad()
def same(one: nn.Module, other: nn.Module, about: zoo_models.Model, exact: bool = True) -> None:
    outs = [zoo_check.run(model.eval(), about.inputs()) for model in (one, other)]
    zoo_check.same_outputs(*outs, exact)


@pytest.mark.parametrize(
    "about",
    [pytest.param(m, id=m.name) for m in zoo_models.TRANSFORMERS if WHOLE or m.name in FAST],
)
def test_a_family_by_from_pretrained_and_save_pretrained(about: zoo_models.Model, tmp_path: Path) -> None:
    kind: Any = getattr(package("transformers"), about.name)
    about.build().save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    config = BellboxConfig(bits=2, granularity="token")
    model = kind.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert zoo_check.left(model) == {
        name for name, _ in zoo_check.plain_layers(about.build()) if about.is_kept(name)
    }
    train(model, about, ROUNDS // 2)

    model.save_pretrained(tmp_path / "prepared")
    again = kind.from_pretrained(tmp_path / "prepared")
    same_state(model, again)
    same(model, again, about)
    for each in (model, again):
        train(each, about, ROUNDS - ROUNDS // 2)
    same_state(model, again)

    packed = bb.convert(again)
    packed.save_pretrained(tmp_path / "packed")
    loaded = kind.from_pretrained(tmp_path / "packed")
    same(loaded, packed, about)
    same(loaded, again, about, about.exact)
    loaded.save_pretrained(tmp_path / "second")
    same_files(tmp_path / "packed", tmp_path / "second")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # nobody reads config.json there
        kind.from_pretrained(tmp_path / "packed", config=about.build().config)
    other = bb.load(tmp_path / "packed", into=about.build())
    same(other, loaded, about)
