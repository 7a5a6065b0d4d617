"""Fused experts in a packed folder: what version 5 says of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from test_format_page import entries
from test_packed import rewrite, section_of
from torch import Tensor, nn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import PackedExperts, is_fused_experts


def one_by_one(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark a forward as transformers' interface does."""
    return wraps(forward)(lambda *given: forward(*given))


class Experts(nn.Module):
    """Experts as transformers has them, of a few numbers."""

    def __init__(self, count: int = 3, width: int = 8, transposed: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias = count, transposed, bias
        self.has_gate, self.has_post_expert_norm = False, False
        shapes = {"up_proj": (16, width), "down_proj": (width, 16)}
        for name, shape in shapes.items():
            matrices = torch.randn(count, *(shape[::-1] if transposed else shape))
            self.register_parameter(name, nn.Parameter(matrices))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(count, shape[0])))

    def act_fn(self, x: Tensor) -> Tensor:
        return x.relu()

    @one_by_one
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


class Mixture(nn.Module):
    def __init__(self, **choices: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.experts = nn.Linear(8, 8), Experts(**choices)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(2 * len(x)).reshape(-1, 2) % self.experts.num_experts
        return self.experts(self.before(x), index, torch.full(index.shape, 0.5))


ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def packed(**choices: Any) -> Mixture:
    model = bb.prepare(Mixture(**choices), bb.Recipe.bbq(2, keep_ends=False))
    model(ROWS)
    return bb.convert(model.eval())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bb.save(packed(), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_folder_of_version_5(transposed: bool, bias: bool, tmp_path: Path) -> None:
    choices = {"transposed": transposed, "bias": bias}
    assert is_fused_experts(Experts(**choices))
    model = packed(**choices)
    bb.save(model, tmp_path / "m")
    section = section_of(tmp_path / "m")
    assert section["version"] == 5
    assert section["experts"] == {"experts": {"count": 3, "projections": ["up_proj", "down_proj"]}}
    names = [f"experts.{stack}.{i}" for stack in ("up_proj", "down_proj") for i in range(3)]
    assert list(section["layers"]) == ["before", *names]
    entry = section["layers"]["experts.up_proj.2"]
    assert (entry["function"], entry["in_features"], entry["out_features"]) == ("packed_linear", 8, 16)
    assert (entry["bias"], entry["input"]) == (bias, "experts.up_proj.2")
    loaded = bb.load(tmp_path / "m", into=Mixture(**choices))
    assert isinstance(loaded.experts, PackedExperts)
    assert isinstance(loaded.experts, Experts)
    with torch.no_grad():
        assert torch.equal(loaded(ROWS), model(ROWS))
    bb.save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_example_of_the_page(tmp_path: Path) -> None:
    bb.save(nn.ModuleDict({"mlp": packed()}), tmp_path / "m")
    assert section_of(tmp_path / "m")["experts"] == entries()[3]


def test_a_model_without_experts_is_version_4_as_before(tmp_path: Path) -> None:
    model = bb.prepare(nn.Linear(8, 8), bb.Recipe.bbq(2, keep_ends=False))
    model(ROWS)
    bb.save(bb.convert(model.eval()), tmp_path / "m")
    assert section_of(tmp_path / "m")["version"] == 4
    assert "experts" not in section_of(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["experts"]["experts"].update(count=2), "are 2 in the file and 3 in the model"),
        (lambda c: c["experts"]["experts"].update(count=1 << 40), "experts.experts.count"),
        (lambda c: c["experts"]["experts"].update(projections=["down_proj"]), "up_proj.0' is one of experts that"),
        (lambda c: c["experts"]["experts"].update(projections=["gate_up_proj"]), "gate_up_proj.0' of the experts is"),
        (lambda c: c["experts"]["experts"].update(projections=["weight"]), "experts.experts.projections"),
        (lambda c: c["experts"].update(before={"count": 3, "projections": ["up_proj"]}), "'before' are none in the"),
        (lambda c: c.update(experts={}), "field 'experts'"),
        (lambda c: (c.update(version=4), c.pop("experts")), "up_proj.0' is one of experts that the file does not desc"),
        (lambda c: c["layers"].pop("experts.up_proj.1"), "layer 'experts.up_proj.1' of the experts is missing"),
        (lambda c: c["layers"].update({"experts.up_proj.3": c["layers"]["experts.up_proj.1"]}), "up_proj.3"),
        (lambda c: c["layers"]["experts.up_proj.1"].update(out_features=8), r"\(8, 8\) in the file and \(16, 8\)"),
        (lambda c: c["layers"]["experts.up_proj.1"].update(bias=False), "experts.up_proj.1.bias' is not in the model"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(folder: Path, change: Any, says: str) -> None:
    rewrite(folder, change)
    model = Mixture()
    with pytest.raises(BellboxError, match=says):
        bb.load(folder, into=model)
    assert is_fused_experts(model.experts)


def test_a_model_with_other_experts_is_refused(folder: Path) -> None:
    with pytest.raises(BellboxError, match="are 3 in the file and 4 in the model"):
        bb.load(folder, into=Mixture(count=4))
    with pytest.raises(BellboxError, match=r"in the file and"):
        bb.load(folder, into=Mixture(width=16))
    plain = Mixture()
    plain.experts.forward = plain.experts.act_fn  # type: ignore[method-assign]
    with pytest.raises(BellboxError, match="'experts' are none in the model"):
        bb.load(folder, into=plain)


def test_experts_that_are_packed_in_the_model_only_are_refused(tmp_path: Path) -> None:
    model = bb.prepare(Mixture(), bb.Recipe.bbq(2, keep_ends=False, keep=("experts.down_proj",)))
    model(ROWS)
    bb.save(bb.convert(model.eval()), tmp_path / "m")
    with pytest.raises(
        BellboxError, match="down_proj of experts 'experts' is packed in the model, not in the file"
    ):
        bb.load(tmp_path / "m", into=packed())
