"""Training from given weights: `model.from`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bellbox.convert import unprepare
from bellbox.errors import BellboxError
from bellbox.models import save_hf
from bellbox.nn import quantized_layers
from bellbox.runs.config import ModelSection, QuantizationSection
from bellbox.training import TrainConfig, Trainer, load_config, load_run, save_config, train

Tiny = Callable[..., TrainConfig]


def begun_from(config: TrainConfig, source: Path | str, **overrides: bool | int | float | str) -> TrainConfig:
    model = ModelSection(config.model.preset, {**config.model.overrides, **overrides}, str(source))
    return dataclasses.replace(config, model=model)


@pytest.fixture
def source(tiny: Tiny) -> Path:
    """A run in full precision."""
    return train(tiny("source", steps=2, quantization=QuantizationSection(method="none")), show=False).folder


def test_weights_of_a_run_are_there_before_scales_are_set(tiny: Tiny, source: Path) -> None:
    # Not with BBQ's constraint, which makes weights Gaussian before the first step.
    trainer = Trainer(begun_from(tiny(quantization=QuantizationSection(method="quest")), source), show=False)
    given = load_run(source).model.state_dict()
    for _, layer in quantized_layers(trainer.model):
        assert layer.weight_quantizer is not None
        there = {name: value.clone() for name, value in layer.weight_quantizer.state_dict().items()}
        layer.weight_quantizer.initialize(layer.weight_rows())
        for name, value in layer.weight_quantizer.state_dict().items():
            assert torch.equal(value, there[name])
    plain = unprepare(trainer.model).state_dict()
    assert plain.keys() == given.keys()
    for name, value in given.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-4, atol=2e-6 if "layers" in name else 0)


def test_a_hugging_face_folder_a_low_bit_run_and_its_resume(tiny: Tiny, tmp_path: Path, source: Path) -> None:
    hf = tmp_path / "hf"
    save_hf(load_run(source).model, hf)
    shutil.copyfile(source / "tokenizer.json", hf / "tokenizer.json")
    first = begun_from(tiny("first"), hf)
    train(first, show=False)
    assert load_config(first.folder + "/config.yaml").model.pretrained == str(hf)
    second = Trainer(begun_from(tiny("second"), first.folder), show=False)
    low, embedding = load_run(first.folder).model.state_dict(), "model.embed_tokens.weight"
    assert torch.equal(second.model.state_dict()[embedding], low[embedding])
    # Going on needs the folder no more.
    shutil.rmtree(hf)
    assert train(dataclasses.replace(first, steps=5), show=False).step == 5


def test_the_key_is_from_in_files(tiny: Tiny, tmp_path: Path) -> None:
    config = begun_from(tiny(), "somewhere")
    assert config.to_dict()["model"]["from"] == "somewhere"
    save_config(config, tmp_path / "c.yaml")
    assert "  from: somewhere" in (tmp_path / "c.yaml").read_text()
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {"hidden_size": 64},
            r"model.from: tensor 'model.embed_tokens.weight' of .* is \(270, 32\), that of .*64",
        ),
        ({"num_hidden_layers": 2}, "model.from: .* has no tensor 'model.layers.1"),
        (
            {"num_attention_heads": 4},
            "model.from: num_attention_heads of .* is 2, that of model.preset .* 4; write",
        ),
        ({"rms_norm_eps": 1e-2}, "model.from: rms_norm_eps of "),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tiny: Tiny, source: Path, overrides, says) -> None:
    with pytest.raises(BellboxError, match=says) as refused:
        Trainer(begun_from(tiny(), source, **overrides), show=False)
    assert "\n" not in str(refused.value)


def test_other_tokenizers_and_folders_without_weights_are_refused(
    tiny: Tiny, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(BellboxError, match=r"model.from: .*nowhere: no such folder"):
        Trainer(begun_from(tiny(), tmp_path / "nowhere"), show=False)
    (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + " ")
    with pytest.raises(BellboxError, match=r"model.from: .*tokenizer.json: is not the tokenizer"):
        Trainer(begun_from(tiny(), source), show=False)
