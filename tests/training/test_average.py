"""Averages of the weights, against the recurrence in float64."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pieces import Cut, records
from torch import Tensor, nn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers
from bellbox.optim import project_
from bellbox.recipe import Recipe
from bellbox.runs import average as average_module
from bellbox.runs.average import PREFIX, Average, averaged_tensors, settle
from bellbox.runs.config import (
    AverageSection,
    CewtSection,
    CheckpointSection,
    OptimizerSection,
    QuantizationSection,
    VisionSection,
)
from bellbox.training import TrainConfig, Trainer, load_run, train

DECAY = 0.75
FREE = CewtSection(every=0)

Tiny = Callable[..., TrainConfig]


def average_of(model: nn.Module, last: float = 1.0, decay: float | None = DECAY, steps: int = 10) -> Average:
    return Average(model, AverageSection(last=last, decay=decay), FREE, steps)


def model_of(recipe: Recipe | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    return model if recipe is None else bb.prepare(model, recipe)


def step(model: nn.Module) -> dict[str, Tensor]:
    """Move every parameter, and say where it is, in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def test_the_first_step_is_taken_as_it_is_and_each_further_one_by_its_share() -> None:
    model = model_of()
    average = average_of(model)
    step(model)  # what was before the first update does not count
    expected = step(model)
    average.update(0)
    for _ in range(4):
        found = dict(average.model.named_parameters())
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
        now = step(model)
        average.update(0)
        expected = {name: DECAY * expected[name] + (1 - DECAY) * now[name] for name in expected}
    assert average.model is not model
    assert all(
        not torch.equal(a, b) for a, b in zip(average.model.parameters(), model.parameters(), strict=True)
    )


def test_without_a_section_the_average_is_the_model_and_nothing_is_kept() -> None:
    model = model_of()
    average = Average(model, None, FREE, 10)
    step(model)
    average.update(0)
    assert average.model is model
    assert average.tensors() == {}
    full = average_of(model_of())
    full.update(0)
    rest = average.restore({**full.tensors(), "0.weight/exp_avg": torch.ones(1)}, 3)
    assert list(rest) == ["0.weight/exp_avg"]
    assert average.model is model


def test_an_average_that_was_saved_goes_on_to_the_same_bits() -> None:
    model = model_of()
    average = average_of(model)
    assert average.tensors() == {}
    for _ in range(3):
        step(model)
        average.update(0)
    saved = {name: value.clone() for name, value in average.tensors().items()}
    names = {*model.state_dict(), "updates"}
    assert set(saved) == {PREFIX + name for name in names}
    assert int(saved[PREFIX + "updates"]) == 3
    assert set(averaged_tensors(saved)) == set(model.state_dict())
    assert averaged_tensors({"0.weight/exp_avg": torch.ones(1)}) == {}

    other = copy.deepcopy(model)
    restored = average_of(other)
    assert restored.restore({**saved, "0.bias/step": torch.ones(())}, 3) == {"0.bias/step": torch.ones(())}
    torch.manual_seed(1)
    step(model)
    torch.manual_seed(1)
    step(other)
    average.update(0)
    restored.update(0)
    for name, value in average.tensors().items():
        assert torch.equal(value, restored.tensors()[name]), name
    fresh = average_of(other)
    assert fresh.restore({"0.bias/step": torch.ones(())}, 3).keys() == {"0.bias/step"}
    assert fresh.model is other  # a checkpoint from before the first update has no average


@pytest.mark.parametrize("late", [False, True])
def test_scales_that_are_set_late_begin_with_their_first_value(late: bool) -> None:
    model = model_of(Recipe.of("lsq", 4)).train()
    quantizer = model[0].activation_quantizer.quantizer  # pyright: ignore[reportIndexIssue]
    average = average_of(model)
    if late:
        average.update(0)
        assert bool(average.model[0].activation_quantizer.quantizer.a.isnan().all())  # pyright: ignore[reportIndexIssue]
    model(torch.randn(16, 8))
    first = float(quantizer.a.detach())
    average.update(0)
    with torch.no_grad():
        quantizer.a += 1.0
    average.update(0)
    found = float(average.model[0].activation_quantizer.quantizer.a.detach())  # pyright: ignore[reportIndexIssue]
    assert found == pytest.approx(DECAY * first + (1 - DECAY) * (first + 1.0), rel=1e-6)


def test_the_plain_mean_of_the_last_steps_counts_these_alone() -> None:
    model = model_of()
    average = average_of(model, last=0.4, decay=None)  # of ten steps, those from number 6 on
    seen: list[dict[str, Tensor]] = []
    for number in range(10):
        seen.append(step(model))
        average.update(number)
        assert (average.model is model) == (number < 6)
    for name, found in average.model.named_parameters():
        wanted = torch.stack([each[name] for each in seen[6:]]).mean(0)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_average_of_steps_that_no_longer_count_is_let_go() -> None:
    model = model_of()
    average = average_of(model, last=0.5)
    for number in range(10):
        step(model)
        average.update(number)
    longer = average_of(model, last=0.5, steps=40)
    assert longer.restore(average.tensors(), 10) == {}
    assert longer.model is model


@pytest.mark.parametrize("hyperball", [True, False])
@pytest.mark.parametrize("until", [1.0, 0.9])
def test_what_is_judged_has_the_norms_that_weights_keep_and_where_these_end_so_gaussian_values(
    hyperball: bool, until: float
) -> None:
    """Of two weights of one norm, the mean is shorter; what the next step goes on from is the mean itself."""
    torch.manual_seed(0)
    model = bb.prepare(nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16)), Recipe.bbq(2, keep=()))
    cewt = CewtSection(every=16, hyperball=hyperball, until=until)
    average = Average(model, AverageSection(last=1.0), cewt, 2)
    layers = [layer for _, layer in quantized_layers(model)]
    norms = [layer.stored_weight.detach().double().norm() for layer in layers]
    total = [torch.zeros_like(layer.stored_weight, dtype=torch.float64) for layer in layers]
    for number in range(2):
        for layer, norm, summed in zip(layers, norms, total, strict=True):
            with torch.no_grad():
                layer.stored_weight.copy_(torch.randn_like(layer.stored_weight))
                layer.stored_weight.mul_((norm / layer.stored_weight.double().norm()).float())
                summed += layer.stored_weight / 2
        average.update(number)
    kept = {name: value.clone() for name, value in average.tensors().items()}
    with average.judged() as judged:
        for (_, layer), norm, mean in zip(quantized_layers(judged), norms, total, strict=True):
            assert mean.norm() < 0.9 * norm
            wanted = (mean * (norm / mean.norm() if hyperball else 1)).float()
            if until == 1:
                wanted = project_(mean.float(), float(norm))
            torch.testing.assert_close(layer.stored_weight.detach(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average.tensors(), kept, rtol=0, atol=0, equal_nan=True)


def test_the_norm_of_a_mean_is_nothing_to_bbq_and_something_to_lsq() -> None:
    """Why the average is settled: a row's norm is divided out by BBQ alone."""
    torch.manual_seed(0)
    for method, same in (("bbq", True), ("lsq", False)):
        model = bb.prepare(nn.Sequential(nn.Linear(32, 48)), Recipe.of(method, 4, keep=())).eval()
        x = torch.randn(8, 32)
        bb.calibrate(model, [x])
        with torch.no_grad():
            before = model(x)
            next(iter(quantized_layers(model)))[1].stored_weight.mul_(0.5)
            assert torch.equal(before, model(x)) == same


@pytest.mark.parametrize("decay", [None, 0.6])
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_run_in_pieces_equals_a_run_in_one_and_its_average_is_what_is_loaded(
    tiny: Tiny, decay: float | None, kind: Any
) -> None:
    settings = {
        "steps": 9,
        "eval_every": 3,
        "average": AverageSection(last=0.6, decay=decay),
        "quantization": QuantizationSection(weight_granularity="tensor"),
        "optimizer": OptimizerSection(lr=1e-2, cewt=CewtSection(every=2)),
        "checkpoint": CheckpointSection(kind=kind),
    }
    whole, pieces = tiny("whole", **settings), tiny("pieces", **settings)
    trainer = Trainer(whole, show=False)
    trainer.run()
    while not Cut(pieces, show=False).run().finished:
        pass
    assert records(whole) == records(pieces)
    run = load_run(whole.folder)
    ours, theirs = run.model.state_dict(), load_run(pieces.folder).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with trainer.average.judged() as judged:
        assert all(torch.equal(value, ours[name]) for name, value in judged.state_dict().items())
    assert not torch.equal(ours["lm_head.weight"], trainer.model.state_dict()["lm_head.weight"])
    assert set(records(whole)[-1]["weight_entropy"]["layers"].values()) == {2.0}


def test_a_signal_while_an_average_is_settled_leaves_it_as_it_was(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "steps": 6,
        "eval_every": 3,
        "average": AverageSection(last=0.9),
        "optimizer": OptimizerSection(lr=1e-2, cewt=CewtSection(every=2)),
    }
    whole, stopped = tiny("whole", **settings), tiny("stopped", **settings)
    train(whole, show=False)
    with monkeypatch.context() as patched:

        def signalled(*args: Any) -> None:
            settle(*args)
            os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(average_module, "settle", signalled)
        assert train(stopped, show=False).stopped_by == signal.SIGTERM
    assert train(stopped, show=False).finished
    assert records(whole) == records(stopped)


def test_full_precision_is_averaged_too(tiny: Tiny) -> None:
    plain = tiny("plain", steps=6, quantization=QuantizationSection(method="none"))
    averaged = tiny("averaged", steps=6, quantization=plain.quantization, average=AverageSection(last=0.5))
    train(plain, show=False)
    trainer = Trainer(averaged, show=False)
    trainer.run()
    trained = load_run(plain.folder).model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in trainer.model.state_dict().items())
    assert records(averaged)[-1]["loss"] != records(plain)[-1]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": AverageSection(decay=0.9)}, r"average\.last is 0, so nothing is averaged"),
        ({"average": AverageSection(last=0.1)}, "none of the 4 steps"),
        (
            {"task": "vision", "vision": VisionSection(ema=0.9), "average": AverageSection(last=0.5)},
            "leave one of them out",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(tiny: Tiny, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BellboxError, match=message):
        tiny(**changes).check()
