"""`mec`: an entropy term in the objective of any run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bellbox.errors import BellboxError
from bellbox.objectives import FeatureCollector, FeatureHook, mec_loss, spectrum
from bellbox.runs.config import MecSection, OptimizerSection, PhasesSection, QuantizationSection
from bellbox.runs.metrics import WALL_CLOCK, read_records
from bellbox.training import TrainConfig, Trainer, load_run, train

Tiny = Callable[..., TrainConfig]


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    """All four sequences of a step in one pass."""

    def make(*arguments: Any, **changes: Any) -> TrainConfig:
        config = tiny(*arguments, **changes)
        return dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_sequences=4))

    return make


def records(config: TrainConfig, kind: str = "train") -> list[dict[str, Any]]:
    found = read_records(Path(config.folder) / "metrics.jsonl")
    return [{k: v for k, v in one.items() if k not in WALL_CLOCK} for one in found if one["kind"] == kind]


def test_the_term_is_recorded_and_a_larger_weight_makes_more_of_it(tiny: Tiny) -> None:
    plain = tiny("plain", steps=1)
    weak, strong = (
        tiny(
            name,
            steps=30,
            mec=MecSection(weight=weight, distortion=1.0),
            optimizer=OptimizerSection(lr=1e-2),
        )
        for name, weight in (("weak", 1e-6), ("strong", 3.0))
    )
    for config in (plain, weak, strong):
        train(config, show=False)
    lines = {config.folder: records(config) for config in (plain, weak, strong)}
    assert "mec" not in lines[plain.folder][0]
    assert lines[strong.folder][0]["loss"] == lines[plain.folder][0]["loss"]
    assert lines[strong.folder][0]["grad_norm"] != lines[plain.folder][0]["grad_norm"]
    late = {
        name: sum(line["mec"] for line in found[-3:]) / 3 for name, found in lines.items() if len(found) > 1
    }
    assert -1 <= late[strong.folder] < late[weak.folder] <= 0
    largest = {
        name: records(config, "eval")[-1]["feature_spectrum"][0]
        for name, config in (("weak", weak), ("strong", strong))
    }
    assert 0 < largest["strong"] < largest["weak"] < 1


def test_the_spectrum_is_that_of_the_validated_features(tiny: Tiny) -> None:
    config = tiny(steps=1, quantization=QuantizationSection(method="none"))
    trainer = Trainer(config, show=False)
    trainer.run()
    trainer.model.eval()
    hook = FeatureCollector(trainer.model, "lm_head")
    trainer.task.evaluate(trainer.model)
    shares = spectrum(hook.take()).tolist()
    assert records(config, "eval")[-1]["feature_spectrum"] == pytest.approx(shares, rel=1e-3, abs=1e-7)


def test_the_term_is_that_of_the_heads_input(tiny: Tiny) -> None:
    config = tiny(
        steps=1, quantization=QuantizationSection(method="none"), mec=MecSection(weight=0.5, experts=4)
    )
    trainer = Trainer(config, show=False)
    (inputs, targets) = trainer.task.micro_batches(0)[0]
    hook = FeatureHook(trainer.model, "lm_head")
    objective, loss, _, term = trainer._losses(inputs, targets)
    torch.testing.assert_close(term, mec_loss(hook.take(), experts=4))
    torch.testing.assert_close(objective, loss + 0.5 * term)


def test_a_run_in_pieces_and_phases_equals_a_run_in_one(tiny: Tiny) -> None:
    section = MecSection(weight=0.3, layer="model.layers.0.mlp.down_proj", side="output")
    options = {"steps": 6, "mec": section, "phases": PhasesSection(bits_before=[4])}
    whole, pieces = tiny("whole", **options), tiny("pieces", **options)
    train(whole, show=False)

    class Cut(Trainer):
        def _train_step(self) -> None:
            super()._train_step()
            if self.state.step == 4 and self.saved_step != 4:
                self.signals.received = 15

    assert Cut(pieces, show=False).run().step == 4
    assert train(pieces, show=False).finished
    assert records(whole) == records(pieces)
    ours, theirs = load_run(whole.folder).model.state_dict(), load_run(pieces.folder).model.state_dict()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (MecSection(weight=-1.0), "mec.weight is -1"),
        (MecSection(weight=1.0, layer="lm_hat"), "mec.layer: no layer 'lm_hat'.*near it: lm_head"),
        (MecSection(weight=1.0, experts=0), "mec.experts"),
    ],
)
def test_what_cannot_be_is_one_line(tiny: Tiny, section: MecSection, says: str) -> None:
    with pytest.raises(BellboxError, match=says):
        train(tiny(mec=section), show=False)


def test_more_experts_than_channels_and_batches_of_one_are_refused_at_the_first_step(tiny: Tiny) -> None:
    with pytest.raises(BellboxError, match=r"step 1: mec: experts is 99, must be from 1 to the 32 channels"):
        train(tiny("a", mec=MecSection(weight=1.0, experts=99)), show=False)
    one = tiny("b", mec=MecSection(weight=1.0))
    one = dataclasses.replace(one, batch=dataclasses.replace(one.batch, micro_sequences=1))
    with pytest.raises(BellboxError, match=r"step 1: mec: features of shape \(1, 32\).*at least 3 samples"):
        train(one, show=False)
