"""Weights that harden: what the forward and the gradient are, and when."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pieces import Cut, records

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers
from bellbox.quantizers import build_quantizer
from bellbox.quantizers.bbq import BBQ
from bellbox.runs.config import OptimizerSection, PhasesSection, QuantizationSection, TrainConfig
from bellbox.runs.config_file import config_from_dict
from bellbox.training import Trainer, load_run, train
from bellbox.training.soften import soften, softness

Tiny = Callable[..., TrainConfig]
HALF = PhasesSection(soft=0.5)


def test_softness_falls_from_one_to_zero_in_the_quantized_steps(tiny: Tiny) -> None:
    trainer = Trainer(tiny(steps=8, phases=HALF), show=False)
    found = [softness(trainer.config, step) for step in range(8)]
    assert found == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0, 0, 0])
    late = dataclasses.replace(trainer.config, phases=PhasesSection(quantized=0.5, soft=0.5))
    assert [softness(late, step) for step in range(8)] == pytest.approx([0, 0, 0, 0, 1, 0.5, 0, 0])


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
def test_a_soft_weight_is_the_mean_of_both_and_has_the_gradient_of_the_uncut_one(levels: int) -> None:
    spec = bb.QuantizerSpec("bbq", levels=levels, block=1)
    quantizer = build_quantizer(spec, 32, 6, "a weight")
    assert isinstance(quantizer, BBQ)
    torch.manual_seed(0)
    weight = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 32, dtype=torch.float64)
    quantizer.initialize(weight)
    with torch.no_grad():
        quantizer.gamma *= torch.linspace(0.5, 2, 6)[:, None]
    hard = quantizer(weight).detach()
    quantizer.soft = 0.75
    found = quantizer(weight)
    found.backward(upstream)
    ours, gamma_gradient = weight.grad, quantizer.gamma.grad

    free = weight.detach().clone().requires_grad_()
    v = free / free.square().mean(-1, keepdim=True).sqrt()
    gamma = quantizer.gamma.detach().double()
    uncut = gamma * torch.erf(v / math.sqrt(2))
    uncut.backward(upstream)
    mean = 0.25 * hard + 0.75 * uncut.detach()
    torch.testing.assert_close(found.detach(), mean)
    torch.testing.assert_close(ours, free.grad)
    wanted = (upstream * mean / gamma).sum(-1, keepdim=True) / math.sqrt(weight.numel())
    assert gamma_gradient is not None
    torch.testing.assert_close(gamma_gradient.double(), wanted)


def test_evaluation_is_cut_and_codes_stay() -> None:
    torch.manual_seed(0)
    model = bb.prepare(torch.nn.Sequential(torch.nn.Linear(64, 32)), bb.Recipe.bbq(bits=2, keep_ends=False))
    x = torch.randn(8, 64)
    bb.calibrate(model, [x])
    ((_, layer),) = quantized_layers(model)
    trained, hard, codes = model.train()(x), model.eval()(x), layer.weight_codes()
    soften(model, 1.0)
    assert torch.equal(model(x), hard)
    assert not torch.allclose(model.train()(x), trained)
    assert torch.equal(layer.weight_codes(), codes)
    assert torch.equal(bb.convert(model.eval())(x), hard)
    soften(model, 0.0)
    assert torch.equal(model.train()(x), trained)


def test_a_run_that_hardens_can_be_cut_and_ends_as_another(tiny: Tiny) -> None:
    settings: dict[str, Any] = {"steps": 8, "phases": HALF, "optimizer": OptimizerSection(lr=1e-2)}
    whole, pieces, plain = tiny("whole", **settings), tiny("pieces", **settings), tiny("plain", steps=8)
    train(whole, show=False)
    while not Cut(pieces, show=False).run().finished:
        pass
    assert records(whole) == records(pieces)
    ours, theirs = (load_run(each.folder).model.state_dict() for each in (whole, pieces))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    train(plain, show=False)
    soft, hard = ([r["loss"] for r in records(each) if r["kind"] == "train"] for each in (whole, plain))
    assert soft != hard


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"method": "quest"}}, "only bbq has a box to cut"),
        ({"quantization": {"recipe": {"rules": []}}}, "a recipe: only bbq"),
        ({"compile": True}, "must be 0 with compile"),
    ],
)
def test_what_cannot_harden_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BellboxError, match=message):
        config_from_dict({"phases": {"soft": 0.5}, **changes})
    assert config_from_dict({"phases": {"soft": 0.5}}).quantization == QuantizationSection()
