"""The programs of examples/ do what they say.

distill_stories.py is run by tests/interop/test_tutorial.py, onnx_generate.py by tests/interop/test_onnx_models.py.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.quantizers import METHODS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> Any:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look for the module of a class
    specification.loader.exec_module(module)
    return module


def test_a_plain_loop(tmp_path: Path) -> None:
    found = example("plain_loop").main(["--out", str(tmp_path / "m"), "--steps", "100"])
    assert found["equal"] == 1
    assert found["last"] < 0.6 * found["first"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = example("hf_model").main(["--out", str(tmp_path / "m"), "--steps", "120"])
    assert found["last"] < 0.5 * found["first"]
    assert found["said"] == [1, 4, 7, 10, 13, 16, 19, 22]


def test_a_vision_net(tmp_path: Path) -> None:
    found = example("vision_net").main(["--out", str(tmp_path / "m"), "--steps", "60"])
    assert found["equal"]
    assert found["trained"] > 0.8
    assert abs(found["trained"] - found["folded and fused"]) < 0.02


@pytest.fixture
def own() -> Iterator[Any]:
    yield example("own_method")
    METHODS.pop("midpoint")


def test_a_method_of_ones_own(own: Any, tmp_path: Path) -> None:
    found = own.main(["--out", str(tmp_path / "m"), "--steps", "60"])
    assert found["equal"]
    assert found["last"] < 0.8 * found["first"]


NODE = shutil.which("node")
RECIPES = {
    "1 bit": bb.Recipe.bbq(1),
    "2 bits": bb.Recipe.bbq(2),
    "3 bits": bb.Recipe.bbq(3),
    "4 bits": bb.Recipe.bbq(4),
    "ternary": bb.Recipe.bbq(levels=3),
    "signs": bb.Recipe.of("bbq", 2, options={"signs": True}),
    "static": bb.Recipe.of("bbq", 2, granularity="ema"),
    "sigma follows": bb.Recipe.of("quest", 2),
    "largest magnitude": bb.Recipe.of("rtn", 4),
    "learned": bb.Recipe.of("lsq", 2),
    "kept norm": bb.Recipe.cewt(2),
}


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_javascript_reads_the_packed_file_to_the_same_bits(recipe: bb.Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bb.prepare(nn.Sequential(nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4)), recipe)
    x = torch.randn(6, 32) * torch.tensor([[1.0], [10.0], [0.01], [1.0], [3.0], [0.0]])
    model(x)
    packed = bb.convert(model.eval())
    bb.save(packed, tmp_path / "m")
    with torch.no_grad():
        expected = packed[0](x)
    done = read(tmp_path / "m", "0", x)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


def read(folder: Path, name: str, x: torch.Tensor) -> subprocess.CompletedProcess[str]:
    words = [str(NODE), str(EXAMPLES / "packed_reader.mjs"), str(folder), name]
    return subprocess.run(words, input=json.dumps(x.tolist()), capture_output=True, text=True, check=False)


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_javascript_refuses_what_is_damaged(tmp_path: Path) -> None:
    model = bb.prepare(nn.Sequential(nn.Linear(32, 9)), bb.Recipe.of("bbq", 2, keep_ends=False))
    x = torch.randn(2, 32)
    model(x)
    bb.save(bb.convert(model.eval()), tmp_path / "m")
    assert "no layer 7; there are: 0" in read(tmp_path / "m", "7", x).stderr
    assert "are needed" in read(tmp_path / "m", "0", x[:, :8]).stderr
    weights = tmp_path / "m" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    damaged = read(tmp_path / "m", "0", x)
    assert damaged.returncode == 2
    assert "model.safetensors is damaged" in damaged.stderr
