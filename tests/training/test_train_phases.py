from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pieces import records
from tiny_run import text_of

from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers
from bellbox.quantizers.learned import LearnedQuantizer
from bellbox.runs.config import ModelSection, OptimizerSection, PhasesSection, QuantizationSection
from bellbox.runs.config_file import config_from_dict
from bellbox.runs.phases import phase_after, phase_at, phases_of
from bellbox.runs.resolve import resolve
from bellbox.training import TrainConfig, Trainer, load_run, train

Tiny = Callable[..., TrainConfig]
SCHEDULE = PhasesSection(quantized=0.75, bits_before=[4, 3], shares=[0.25, 0.25, 0.5])


def widths(model: torch.nn.Module) -> set[int]:
    """Levels of all weights and activations of the quantized layers."""
    found: set[int] = set()
    for _, layer in quantized_layers(model):
        assert layer.weight_quantizer is not None
        assert layer.activation_quantizer is not None
        found |= {layer.weight_quantizer.levels.n, layer.activation_quantizer.levels.n}
    return found


class Cut(Trainer):
    """Stops after some steps, as after SIGTERM."""

    stops: tuple[int, ...] = ()

    def _train_step(self) -> None:
        super()._train_step()
        if self.state.step in self.stops and self.state.step != self.saved_step:
            self.signals.received = 15


def test_by_default_there_is_one_phase() -> None:
    config = TrainConfig(steps=70)
    (phase,) = phases_of(config)
    assert (phase.start, phase.end, phase.quantization) == (0, 70, config.quantization)


def test_phases_cover_all_steps_in_order() -> None:
    phases = phases_of(TrainConfig(steps=101, phases=SCHEDULE))
    assert [phase.label for phase in phases] == [
        "full precision",
        "bbq, 4 bits",
        "bbq, 3 bits",
        "bbq, 2 bits",
    ]
    assert phases[0].start == 0
    assert phases[-1].end == 101
    assert all(left.end == right.start for left, right in itertools.pairwise(phases))
    assert [phase.start for phase in phases] == [0, 25, 44, 63]
    assert [phase_at(phases, step).index for step in (0, 24, 25, 43, 44, 62, 63, 100)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert [phase_after(phases, steps).index for steps in (0, 25, 26, 101)] == [0, 0, 1, 3]


def test_ternary_may_follow_whole_bits() -> None:
    section = QuantizationSection(levels=3)
    phases = phases_of(TrainConfig(steps=10, quantization=section, phases=PhasesSection(bits_before=[2])))
    assert [phase.label for phase in phases] == ["bbq, 2 bits", "bbq, 3 levels"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": {"quantized": 0}}, r"phases.quantized is 0.0, must be in \(0, 1\]"),
        ({"phases": {"quantized": "most"}}, "phases.quantized"),
        ({"phases": {"bits_before": [9]}}, r"phases.bits_before is \[9\], must be bits from 1 to 8"),
        ({"phases": {"bits_befor": [4]}}, "unknown key 'phases.bits_befor'; did you mean 'bits_before'"),
        ({"phases": {"bits_before": [4], "shares": [0.5, 0.6]}}, "must be 2 numbers that add up to 1"),
        ({"phases": {"shares": [0.5, 0.5]}}, "must be 1 numbers that add up to 1"),
        ({"phases": {"bits_before": [4, 3]}, "steps": 2}, r"phase 2 .* gets none of the 2 steps"),
        ({"phases": {"quantized": 0.1}, "steps": 3}, r"phase 2 .* gets none of the 3 steps"),
        ({"phases": {"quantized": 0.5}, "quantization": {"method": "none"}}, "nothing can be scheduled"),
        ({"phases": {"shares": [0.5, 0.5]}, "quantization": {"method": "none"}}, "nothing can be scheduled"),
        (
            {"phases": {"bits_before": [4]}, "quantization": {"recipe": {"rules": []}}},
            "leave one of them out",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BellboxError, match=message) as caught:
        phases_of(config_from_dict(changes))
    assert "\n" not in str(caught.value)


def test_a_later_phase_that_its_method_cannot_have_is_refused_before_the_first_step(tiny: Tiny) -> None:
    config = tiny(steps=8, phases=PhasesSection(quantized=0.5))
    for section, message in (
        (QuantizationSection(method="quest", granularity="ema"), "granularity 'ema' does not fit"),
        (QuantizationSection(method="ternary_mass"), "give levels=3"),
        (QuantizationSection(weight_only="float", weights_rotated=True), "needs both weight and input"),
    ):
        with pytest.raises(BellboxError, match=message):
            Trainer(dataclasses.replace(config, quantization=section))


def test_the_optimal_fraction_is_filled_in_before_the_run_is_saved() -> None:
    config = TrainConfig(
        model=ModelSection("95M"), tokens=3_000_000_000, phases=PhasesSection(quantized="optimal")
    )
    resolved = resolve(config, text_of(50304))
    parameters = 94_871_680
    density = resolved.total_steps * 8192 * 8 / (parameters * 2)
    assert resolved.phases.quantized == pytest.approx(math.exp(-6.7297 / math.log(density)))
    assert 0.2 < float(resolved.phases.quantized) < 0.3
    few = TrainConfig(tokens=8192, phases=PhasesSection(quantized="optimal"))
    with pytest.raises(BellboxError, match=r"phases.quantized: optimal: .* tokens a byte"):
        resolve(few, text_of(4096))
    own = TrainConfig(quantization=QuantizationSection(recipe={"rules": []}), phases=few.phases)
    with pytest.raises(BellboxError, match="give a number"):
        resolve(own, text_of(4096))


def test_each_phase_has_its_layers_and_each_checkpoint_opens_as_what_it_was(tiny: Tiny) -> None:
    config = tiny(steps=8, phases=SCHEDULE, eval_every=1, checkpoint_every=1)
    seen: dict[int, set[int]] = {}

    class Watch(Trainer):
        def _train_step(self) -> None:
            super()._train_step()
            seen[self.state.step] = widths(self.model)

        def _save(self) -> None:
            super()._save()
            run = load_run(self.folder)
            assert run.step == self.state.step
            assert widths(run.model) == widths(self.model)
            assert run.phase == self.phase

    Watch(config, show=False).run()
    assert list(seen.values()) == [set(), set(), {16}, {16}, {8}, {4}, {4}, {4}]
    lines = [record for record in records(config) if record["kind"] == "eval"]
    assert [record["phase"] for record in lines] == [0, 0, 1, 1, 2, 3, 3, 3]
    assert ["weight_entropy" in record for record in lines] == [False] * 2 + [True] * 6
    highest = [max(record["weight_entropy"]["layers"].values()) for record in lines[2:]]
    assert [round(bits) for bits in highest] == [4, 4, 3, 2, 2, 2]


def test_at_a_border_the_weights_and_their_moments_stay(tiny: Tiny) -> None:
    quantization = QuantizationSection(weights_rotated=False)  # rotated ones start anew
    settings = {"phases": PhasesSection(quantized=0.5), "quantization": quantization}
    trainer = Trainer(tiny(steps=4, log_every=100, **settings), show=False)
    trainer.signals.received = 15  # opens the folder and leaves at once
    trainer.run()
    for _ in range(2):
        trainer._train_step()
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    moments = {
        name: trainer.optimizer.state_of(parameter)["exp_avg"].clone()
        for name, parameter in trainer.model.named_parameters()
    }
    trainer._enter(trainer.phases[1])
    parameters = dict(trainer.model.named_parameters())
    added = parameters.keys() - before.keys()
    assert added
    assert all(name.endswith("gamma") for name in added)
    for name, value in before.items():
        assert torch.equal(parameters[name], value), name
        assert torch.equal(trainer.optimizer.state_of(parameters[name])["exp_avg"], moments[name])
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in parameters.values()}
    # The scales of weights are set by the weights of now, those of inputs by the batch to come.
    name, layer = next(quantized_layers(trainer.model))
    assert layer.weight_quantizer is not None
    gamma = layer.weight_quantizer.get_parameter("gamma")
    expected = 1.694 * before[f"{name}.weight"].double().square().mean().sqrt()
    assert torch.allclose(gamma, expected.float().expand_as(gamma))
    assert layer.activation_quantizer is not None
    assert not layer.activation_quantizer.quantizer.is_set
    trainer._train_step()
    assert layer.activation_quantizer.quantizer.is_set


def scales_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that learned quantizers keep."""
    return {
        f"{name}.{own}": scale.detach().clone()
        for name, module in trainer.model.named_modules()
        if isinstance(module, LearnedQuantizer)
        for own, scale in module.own_scales().items()
    }


@pytest.mark.parametrize("nested", [[], [2, 1]])
def test_learned_scales_and_their_moments_go_on_at_another_width(tiny: Tiny, nested: list[int]) -> None:
    """On the hyperball a row's gamma is all that says how large it is: what was learned of it may not be lost."""
    settings: dict[str, Any] = {
        "phases": PhasesSection(bits_before=[4], shares=[0.5, 0.5]),
        "quantization": QuantizationSection(granularity=None if nested else "ema", nested=nested),
    }
    trainer = Trainer(tiny(steps=6, log_every=100, **settings), show=False)
    trainer.signals.received = 15  # opens the folder and leaves at once
    trainer.run()
    start = scales_of(trainer)
    for _ in range(3):
        trainer._train_step()
    before = scales_of(trainer)
    moved = [name for name, scale in before.items() if not torch.equal(scale, start[name])]
    assert len(moved) == len(before)
    moments = {
        name: trainer.optimizer.state_of(parameter)["exp_avg_sq"].clone()
        for name, parameter in trainer.model.named_parameters()
    }
    trainer._enter(trainer.phases[1])
    after = scales_of(trainer)
    assert before.keys() <= after.keys()
    for name, scale in after.items():
        assert torch.equal(scale, before[name.removesuffix("_1")]), name
    parameters = dict(trainer.model.named_parameters())
    for name in before.keys() & parameters.keys():
        assert torch.equal(trainer.optimizer.state_of(parameters[name])["exp_avg_sq"], moments[name]), name
    trainer._train_step()


def test_scales_that_mean_another_thing_at_another_width_start_anew(tiny: Tiny) -> None:
    """LSQ's is the size of a step, which is another one with fewer levels."""
    section = QuantizationSection(method="lsq")
    phases = PhasesSection(bits_before=[4], shares=[0.5, 0.5])
    trainer = Trainer(tiny(steps=4, quantization=section, phases=phases), show=False)
    trainer._enter(trainer.phases[1])
    anew = Trainer(tiny("anew", steps=4, quantization=section), show=False)
    ours, theirs = scales_of(trainer), scales_of(anew)
    assert ours.keys() == theirs.keys()
    for name, scale in ours.items():
        assert torch.equal(scale.nan_to_num(-1.0), theirs[name].nan_to_num(-1.0)), name


@pytest.mark.parametrize("granularity", ["token", "ema"])
def test_a_run_in_pieces_equals_a_run_in_one_across_every_border(tiny: Tiny, granularity: Any) -> None:
    settings = {"steps": 8, "phases": SCHEDULE, "quantization": QuantizationSection(granularity=granularity)}
    whole, pieces = tiny("whole", **settings), tiny("pieces", **settings)
    train(whole, show=False)
    Cut.stops = (1, 2, 3, 4, 5, 6, 7)  # the borders are at 2, 4 and 5
    for expected in (1, 3, 5, 7, 8):
        result = Cut(pieces, show=False).run()
        while result.step < expected:
            result = Cut(pieces, show=False).run()
    assert result.finished
    assert records(whole) == records(pieces)
    ours, theirs = load_run(whole.folder).model.state_dict(), load_run(pieces.folder).model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_the_best_checkpoint_is_one_of_the_last_phase(tiny: Tiny) -> None:
    # Full precision first, at a learning rate that learns; one bit afterwards, so the earlier losses are lower.
    section = QuantizationSection(bits=1)
    phases, optimizer = PhasesSection(quantized=0.1), OptimizerSection(lr=1e-2)
    config = tiny(steps=20, quantization=section, phases=phases, optimizer=optimizer, eval_every=1)
    result = train(config, show=False)
    lines = [record for record in records(config) if record["kind"] == "eval"]
    full = min(record["loss"] for record in lines if record["phase"] == 0)
    last = min(record["loss"] for record in lines if record["phase"] == 1)
    assert full < last
    assert result.best_loss == last
    best = load_run(config.folder, "best")
    assert widths(best.model) == {2}
    assert best.phase.index == 1


def test_another_schedule_is_another_run(tiny: Tiny) -> None:
    config = tiny(steps=4, phases=PhasesSection(quantized=0.5))
    train(config, show=False)
    other = dataclasses.replace(config, phases=PhasesSection(quantized=0.75))
    with pytest.raises(BellboxError, match=r"phases.quantized is 0.5 there, 0.75 here"):
        train(other, show=False)


def test_the_phases_are_said(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(steps=4, phases=PhasesSection(quantized=0.5)))
    output = capsys.readouterr().out
    assert "phases: full precision from step 1, then bbq, 2 bits from step 3" in output
    assert "step      3  from here on: bbq, 2 bits" in output


@pytest.mark.slow
def test_a_compiled_run_goes_through_its_phases(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with = torch.compile
    # The compiler of C++ takes a minute and decides nothing here.
    monkeypatch.setattr(torch, "compile", lambda model: compile_with(model, backend="aot_eager"))
    phases = PhasesSection(bits_before=[4])
    plain, compiled = tiny("plain", steps=4, phases=phases), tiny("c", steps=4, phases=phases, compile=True)
    train(plain, show=False)
    train(compiled, show=False)
    for ours, theirs in zip(records(compiled), records(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
