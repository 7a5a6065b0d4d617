"""Phases that a configuration leaves open, and those of runs that go on to more steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bellbox.errors import BellboxError
from bellbox.runs.config import ModelSection, PhasesSection, QuantizationSection, TrainConfig
from bellbox.runs.config_file import config_from_dict, differences, load_config
from bellbox.runs.open_phases import FEWEST_STEPS, with_phases
from bellbox.runs.phases import phase_after, phases_of, soft_steps
from bellbox.training import Trainer, train
from bellbox.utils.yaml import read_yaml

Tiny = Callable[..., TrainConfig]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_few_bits_begin_with_one_more(bits: int) -> None:
    config = with_phases(TrainConfig(steps=FEWEST_STEPS, quantization=QuantizationSection(bits=bits)))
    assert config.phases == PhasesSection(bits_before=[bits + 1], shares=[0.5, 0.5])
    first, last = phases_of(config)
    assert (first.quantization.bits, first.end) == (bits + 1, FEWEST_STEPS // 2)
    assert last.quantization == config.quantization
    own = with_phases(TrainConfig(steps=FEWEST_STEPS, quantization=QuantizationSection(bits=None)))
    assert own.phases.bits_before == [3]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": FEWEST_STEPS - 1},
        {"quantization": {"bits": 4}},
        {"quantization": {"levels": 3}},
        {"quantization": {"nested": [2, 1]}},
        {"quantization": {"method": "bbq_paper"}},
        {"quantization": {"method": "lsq"}},
        {"quantization": {"method": "none"}},
        {"quantization": {"weight_only": "int8"}},
        {"quantization": {"recipe": {"rules": []}}},
        {"model": {"from": "elsewhere"}},
        {"task": "vision", "model": {"preset": "resnet-20"}},
        {"phases": {"bits_before": []}},
    ],
)
def test_what_no_study_is_of_has_one_width(changes: dict[str, Any]) -> None:
    config = with_phases(config_from_dict({"steps": FEWEST_STEPS, **changes}))
    assert config.phases == PhasesSection(bits_before=[])
    assert len(phases_of(config)) == 1


def test_what_is_said_stays() -> None:
    section = PhasesSection(quantized=0.5, bits_before=[8, 4], shares=[0.2, 0.2, 0.6], soft=0.1)
    assert with_phases(TrainConfig(phases=section)).phases == section
    with pytest.raises(BellboxError, match="must be 1 numbers"):
        phases_of(with_phases(TrainConfig(phases=PhasesSection(shares=[0.5, 0.5]))))
    late = with_phases(TrainConfig(steps=FEWEST_STEPS, phases=PhasesSection(quantized=0.5)))
    assert [phase.label for phase in phases_of(late)] == ["full precision", "bbq, 3 bits", "bbq, 2 bits"]


@given(
    known=st.integers(20, 3000),
    more=st.integers(1, 5000),
    quantized=st.floats(0.5, 1),
    parts=st.lists(st.integers(1, 10), min_size=1, max_size=3),
    soft=st.sampled_from([0.0, 0.3]),
)
def test_more_steps_make_the_last_phase_longer_and_nothing_else(
    known: int, more: int, quantized: float, parts: list[int], soft: float
) -> None:
    bits, shares = [5, 4, 3][: len(parts) - 1], [part / sum(parts) for part in parts]
    section = PhasesSection(quantized, bits, shares if bits else [], soft)
    begun = TrainConfig(steps=known, phases=section)
    try:
        former = phases_of(begun)
    except BellboxError:  # a phase without a step
        return
    longer = TrainConfig(steps=known + more, phases=section)
    asked = with_phases(longer, begun)
    now = phases_of(asked)
    assert [dataclasses.replace(now[-1], end=known), *now[:-1]] == [former[-1], *former[:-1]]
    assert now[-1].end == known + more
    assert soft_steps(asked) == soft_steps(begun)
    assert differences(begun, asked) == []
    assert phase_after(now, known) == now[-1]
    section = dataclasses.replace(
        asked.phases, bits_before=None, shares=[]
    )  # as a file that leaves it open says
    again = with_phases(TrainConfig(steps=known + more, phases=section), asked)
    assert again.phases == asked.phases
    other = dataclasses.replace(
        longer, phases=PhasesSection(quantized, [8, *bits], [0.5, *[0.5 / len(parts)] * len(parts)])
    )
    assert differences(begun, with_phases(other, begun))


def test_a_run_goes_on_in_the_phase_that_it_ended_in(tiny: Tiny) -> None:
    config = tiny(steps=4, phases=PhasesSection(bits_before=[3], shares=[0.5, 0.5]))
    train(config, show=False)
    there = load_config(Path(config.folder) / "config.yaml")
    seen: list[tuple[int, int]] = []

    class Watch(Trainer):
        def _train_step(self) -> None:
            super()._train_step()
            seen.append((self.state.step, self.state.phase))

    assert Watch(dataclasses.replace(there, steps=8), show=False).run().finished
    assert seen == [(5, 1), (6, 1), (7, 1), (8, 1)]
    other = dataclasses.replace(there, steps=8, phases=PhasesSection(bits_before=[4], shares=[0.5, 0.5]))
    with pytest.raises(BellboxError, match=r"phases\.bits_before is \[3\] there, \[4\] here"):
        train(other, show=False)


def test_a_run_of_before_there_was_a_choice_keeps_its_one_width(tiny: Tiny) -> None:
    begun = TrainConfig(steps=FEWEST_STEPS, model=ModelSection("tiny"), phases=PhasesSection(bits_before=[]))
    assert with_phases(TrainConfig(steps=FEWEST_STEPS), begun).phases.bits_before == []
    assert with_phases(TrainConfig(steps=2 * FEWEST_STEPS), begun).phases == PhasesSection(bits_before=[])
    config = tiny(steps=2)
    train(config, show=False)
    assert read_yaml(Path(config.folder) / "config.yaml")["phases"]["bits_before"] == []
