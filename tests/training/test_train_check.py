from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tiny_run import text_of

from bellbox.data.images import ImageDataset
from bellbox.data.images.base import ArraySplit
from bellbox.errors import BellboxError
from bellbox.runs.config import PhasesSection, QuantizationSection
from bellbox.runs.config_file import config_from_dict
from bellbox.runs.resolve import resolve
from bellbox.training import TrainConfig, Trainer, check
from bellbox.training.check import check_trainable


def checked(keys: dict) -> None:
    check_trainable(resolve(config_from_dict({"device": "cpu", **keys}), text_of(300)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"phases": {"quantized": 1e-6}}, "phase 2 (bbq, 2 bits) gets none of the 1000 steps"),
        ({"phases": {"bits_before": [8]}, "quantization": {"method": "seq"}}, "seq has 2 to 128 levels"),
        ({"mec": {"weight": 1.0, "layer": "nowhere"}}, "mec.layer: "),
        ({"distill": {"teacher": "nowhere"}}, "distill.teacher: nowhere: no such folder"),
        ({"distill": {"teacher": "."}}, "distill.teacher: .: no model here"),
    ],
)
def test_what_cannot_be_trained_is_found_without_training(
    keys: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BellboxError, match=re.escape(message)) as caught:
        checked(keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "phases"),
    [
        ({}, 1),
        ({"phases": {"quantized": "optimal"}, "tokens": 10**10}, 3),  # one bit more first
        ({"phases": {"quantized": "optimal", "bits_before": []}, "tokens": 10**10}, 2),
        ({"quantization": {"method": "cewt", "bits": 3}}, 1),
    ],
)
def test_what_can_be_trained_is_not_refused_and_every_phase_is_looked_at(
    keys: dict, phases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[QuantizationSection] = []
    looked = check.check_quantization
    monkeypatch.setattr(
        check, "check_quantization", lambda config, section: (seen.append(section), looked(config, section))
    )
    checked(keys)
    assert len(seen) == phases


def test_muon_needs_matrices_inside_the_blocks() -> None:
    split = ArraySplit("", np.zeros(1, np.int64), np.zeros((1, 32, 32, 3), np.uint8))
    images = ImageDataset("", split, split, ("a", "b"), "")
    for preset, ok in (("resnet-small", False), ("vit-small", True)):
        keys = {"task": "vision", "model": {"preset": preset}, "optimizer": {"kind": "muon"}}
        config = resolve(config_from_dict(keys), images)
        if ok:
            check_trainable(config)
        else:
            with pytest.raises(
                BellboxError, match=r"optimizer.kind is muon, .* the model has none; use adamw"
            ):
                check_trainable(config)


def test_a_trainer_checks_later_phases_first(tiny) -> None:
    config: TrainConfig = tiny(
        steps=10, phases=PhasesSection(bits_before=[8]), quantization=QuantizationSection(method="seq")
    )
    with pytest.raises(BellboxError, match="seq has 2 to 128 levels"):
        Trainer(config, show=False)
