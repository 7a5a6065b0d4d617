"""Training one model at several widths: which width a step has, evaluation at each, going on after a stop."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import nested_widths
from bellbox.runs.config import QuantizationSection
from bellbox.runs.config_file import config_from_dict
from bellbox.runs.metrics import WALL_CLOCK, read_records
from bellbox.training import TrainConfig, Trainer, load_run, train
from bellbox.training.nested import widths_of_step

Tiny = Callable[..., TrainConfig]
WIDTHS = [4, 3, 2, 1]


def nested(schedule: str, **more: Any) -> QuantizationSection:
    return QuantizationSection(nested=WIDTHS, nested_schedule=schedule, **more)  # type: ignore[arg-type]


def records(config: TrainConfig) -> list[dict[str, Any]]:
    found = read_records(Path(config.folder) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in WALL_CLOCK} for record in found]


class Cut(Trainer):
    """Stops after some steps, as after SIGTERM."""

    after = 3

    def _train_step(self) -> None:
        super()._train_step()
        if self.state.step >= self.after:
            self.signals.received = 15


def test_each_turn_of_steps_draws_every_width_once_and_seeds_differ():
    section = nested("draw")
    drawn = [widths_of_step(section, 7, step) for step in range(400)]
    assert all(len(each) == 1 for each in drawn)
    for turn in range(100):
        assert sorted(each for (each,) in drawn[4 * turn : 4 * turn + 4]) == [1, 2, 3, 4]  # type: ignore[type-var]
    assert len(Counter(tuple(drawn[4 * turn : 4 * turn + 4]) for turn in range(100))) > 15
    assert drawn == [widths_of_step(section, 7, step) for step in range(400)]
    assert drawn != [widths_of_step(section, 8, step) for step in range(400)]
    assert widths_of_step(nested("sum"), 7, 0) == (4, 3, 2, 1)
    pairs = [widths_of_step(nested("draw", nested_draws=2), 7, step) for step in range(40)]
    assert all(a > b for a, b in pairs)  # type: ignore[operator]
    assert all(sorted(pairs[i] + pairs[i + 1]) == [1, 2, 3, 4] for i in range(0, 40, 2))  # type: ignore[type-var]
    assert [set(pairs[0]), set(pairs[1])] == [set(sum(drawn[:2], ())), set(sum(drawn[2:4], ()))]
    assert widths_of_step(QuantizationSection(bits=2), 7, 0) == (None,)


@pytest.mark.parametrize("schedule", ["draw", "sum"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tiny: Tiny, tmp_path: Path, schedule: str):
    whole = tiny(quantization=nested(schedule), steps=6, folder=str(tmp_path / "whole"))
    train(whole, show=False)
    cut = dataclasses.replace(whole, folder=str(tmp_path / "cut"))
    assert Cut(cut, show=False).run().step == 3
    assert train(cut, show=False).finished
    assert records(cut) == records(whole)
    one, other = load_run(whole.folder).model, load_run(cut.folder).model
    for (name, value), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, theirs), name
    assert nested_widths(one) == (4, 3, 2, 1)


def test_a_validation_is_that_of_every_width(tiny: Tiny):
    config = tiny(quantization=nested("sum"))
    result = train(config, show=False)
    assert result.validation is not None
    each = result.validation["widths"]
    assert list(each) == ["4", "3", "2", "1"]
    assert each["4"]["loss"] == result.validation["loss"]
    assert result.best_loss == pytest.approx(
        min(sum(w["loss"] for w in r["widths"].values()) / 4 for r in records(config) if r["kind"] == "eval")
    )
    for bits, one in each.items():
        assert int(bits) - 0.2 < one["weight_entropy"]["mean"] <= int(bits)
    # the run's model gives these numbers at each width
    opened = load_run(config.folder)
    from bellbox import data
    from bellbox.evaluation import perplexity

    for bits in WIDTHS:
        bb.set_bits(opened.model, bits)
        found = perplexity(opened.model, data.open(config.data.source).valid, context=config.data.context)
        assert found.loss == pytest.approx(each[str(bits)]["loss"], rel=1e-6)


def test_the_gradient_of_a_summed_step_is_the_mean_of_its_widths(tiny: Tiny):
    """Against forwards and backwards at each width by hand, without sharing anything between micro-batches."""
    config = tiny(quantization=nested("sum", weights_rotated=True))
    trainer = Trainer(config, show=False)
    model = trainer.model.train()
    batches = trainer.task.micro_batches(0)
    trainer._losses(*batches[0])  # the first batch sets the scales of the inputs
    trainer.optimizer.zero_grad()
    for bits in WIDTHS:
        bb.set_bits(model, bits)
        for inputs, targets in batches:
            (trainer.task.loss(model(inputs), targets) / (len(batches) * 4)).backward()
    by_hand = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad()
    from bellbox.nn import using_bits

    total = torch.zeros(4)
    for bits in WIDTHS:
        with using_bits(model, bits):
            total += trainer._backward(batches, 4, bits == 1)
    for name, parameter in model.named_parameters():
        if name in by_hand:
            torch.testing.assert_close(parameter.grad, by_hand[name], rtol=1e-4, atol=1e-7)
    assert all(f"gamma_{b}" in " ".join(by_hand) for b in (3, 2, 1))


def test_full_precision_may_go_before_and_wider_ones_too(tiny: Tiny):
    values = tiny(steps=6).to_dict()
    values["quantization"] |= {"nested": [3, 1], "nested_schedule": "draw"}
    values["phases"] |= {"quantized": 0.75, "bits_before": [4]}
    config = config_from_dict(values)
    trainer = Trainer(config, show=False)
    assert [phase.label for phase in trainer.phases] == [
        "full precision", "bbq, 4 bits", "bbq, nested widths of 3, 1 bits",
    ]  # fmt: skip
    assert trainer.run().finished
    assert nested_widths(trainer.model) == (3, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nested": [4]}, "nested widths 4: must be at least two, the widest first"),
        ({"nested": [1, 2]}, "nested widths 1, 2: must be at least two, the widest first"),
        ({"nested": [2, 2]}, "the widest first"),
        ({"nested": [8, 4]}, "must be whole numbers of bits from 1 to 7"),
        ({"nested": [4, 0]}, "from 1 to 7"),
        ({"nested": [4, 2], "method": "quest"}, "only the codes of bbq nest"),
        ({"nested": [4, 2], "levels": 3}, "quantization.levels are both given"),
        ({"nested": [4, 2], "weight_only": "float"}, "quantization.weight_only are both given"),
        ({"nested": [4, 2], "nested_schedule": "each"}, "quantization.nested_schedule"),
        ({"nested": ["four", 2]}, "quantization.nested"),
        ({"nested": [4, 3, 2, 1], "nested_draws": 3}, "must be a divisor of the 4 nested widths"),
        ({"nested": [4, 2], "nested_draws": 0}, "quantization.nested_draws is 0"),
        ({"nested": [4, 2], "nested_draws": 2, "nested_schedule": "sum"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_trained_gets_one_line(tiny: Tiny, changes: dict[str, Any], said: str):
    values = tiny().to_dict()
    values["quantization"] |= changes
    with pytest.raises(BellboxError) as raised:
        config_from_dict(values).check()
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_zero_point_off_the_half_integers_is_refused_before_the_run(tiny: Tiny):
    with pytest.raises(BellboxError, match="the grid is half-integer at all widths"):
        Trainer(tiny(quantization=nested("draw", zero_point=0.0)), show=False)
