"""The running average of the weights, against the recurrence in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.recipe import Recipe
from bellbox.runs.average import PREFIX, Average, averaged_tensors

DECAY = 0.75


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
    average = Average(model, DECAY)
    step(model)  # what was before the first update does not count
    expected = step(model)
    average.update()
    for _ in range(4):
        found = dict(average.model.named_parameters())
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)
        now = step(model)
        average.update()
        expected = {name: DECAY * expected[name] + (1 - DECAY) * now[name] for name in expected}
    assert average.model is not model
    assert all(
        not torch.equal(a, b) for a, b in zip(average.model.parameters(), model.parameters(), strict=True)
    )


def test_without_decay_the_average_is_the_model_and_nothing_is_kept() -> None:
    model = model_of()
    average = Average(model, 0.0)
    step(model)
    average.update()
    assert average.model is model
    assert average.tensors() == {}
    full = Average(model_of(), DECAY)
    full.update()
    rest = average.restore({**full.tensors(), "0.weight/exp_avg": torch.ones(1)})
    assert list(rest) == ["0.weight/exp_avg"]
    assert average.model is model


def test_an_average_that_was_saved_goes_on_to_the_same_bits() -> None:
    model = model_of()
    average = Average(model, DECAY)
    assert average.tensors() == {}
    for _ in range(3):
        step(model)
        average.update()
    saved = {name: value.clone() for name, value in average.tensors().items()}
    names = {*model.state_dict(), "updates"}
    assert set(saved) == {PREFIX + name for name in names}
    assert int(saved[PREFIX + "updates"]) == 3
    assert set(averaged_tensors(saved)) == set(model.state_dict())
    assert averaged_tensors({"0.weight/exp_avg": torch.ones(1)}) == {}

    other = copy.deepcopy(model)
    restored = Average(other, DECAY)
    assert restored.restore({**saved, "0.bias/step": torch.ones(())}) == {"0.bias/step": torch.ones(())}
    torch.manual_seed(1)
    step(model)
    torch.manual_seed(1)
    step(other)
    average.update()
    restored.update()
    for name, value in average.tensors().items():
        assert torch.equal(value, restored.tensors()[name]), name
    fresh = Average(other, DECAY)
    assert fresh.restore({"0.bias/step": torch.ones(())}).keys() == {"0.bias/step"}
    assert fresh.model is other  # a checkpoint from before the first update has no average


@pytest.mark.parametrize("late", [False, True])
def test_scales_that_are_set_late_begin_with_their_first_value(late: bool) -> None:
    model = model_of(Recipe.of("lsq", 4)).train()
    quantizer = model[0].activation_quantizer.quantizer  # pyright: ignore[reportIndexIssue]
    average = Average(model, DECAY)
    if late:
        average.update()
        assert bool(average.model[0].activation_quantizer.quantizer.a.isnan().all())  # pyright: ignore[reportIndexIssue]
    model(torch.randn(16, 8))
    first = float(quantizer.a.detach())
    average.update()
    with torch.no_grad():
        quantizer.a += 1.0
    average.update()
    found = float(average.model[0].activation_quantizer.quantizer.a.detach())  # pyright: ignore[reportIndexIssue]
    assert found == pytest.approx(DECAY * first + (1 - DECAY) * (first + 1.0), rel=1e-6)
