from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers
from bellbox.runs.checkpoint import MANIFEST
from bellbox.runs.open import CONFIG_FILE, is_run
from bellbox.training import TrainConfig, Trainer, load_config, load_run, train
from bellbox.utils import processor

Tiny = Callable[..., TrainConfig]


def test_auto_takes_what_the_processor_does_fast_and_the_run_keeps_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin(features: set[str], **changes: object) -> str:
        monkeypatch.setattr(processor, "_features", lambda: frozenset(features))
        Trainer(tiny(precision="auto", **changes), show=True).run()
        return capsys.readouterr().out.splitlines()[0]

    for name in ("BELLBOX_ISA", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    first = begin(set(), steps=2)
    assert first.endswith("precision fp32 on cpu: this processor has no bf16 units")
    saved = tiny().folder + "/config.yaml"
    assert load_config(saved).precision == "fp32"
    # On another machine it is the same function; asking for another one is refused.
    assert begin({"avx512_bf16"}, steps=2).endswith("precision fp32 on cpu: as the run was begun")
    with pytest.raises(BellboxError, match="precision is fp32 there, bf16 here"):
        train(tiny(precision="bf16", steps=2), show=False)
    monkeypatch.setenv("BELLBOX_ISA", "avx2")
    assert "fp32 on cpu: this processor's bf16 units are held back" in begin(
        {"amx_bf16"}, folder="held", steps=1
    )
    monkeypatch.delenv("BELLBOX_ISA")
    assert begin({"amx_bf16"}, folder="bf16", steps=1).endswith("bf16 on cpu: this processor has bf16 units")


def test_a_run_of_before_there_was_a_choice_goes_on_on_floats(tiny: Tiny) -> None:
    """Its files say nothing of `integer_forward`; bf16 would otherwise take integers from the next step on."""
    config = tiny(steps=2, precision="bf16")
    older = dataclasses.replace(config.quantization, integer_forward=False)
    train(dataclasses.replace(config, quantization=older), show=False)
    folder = Path(config.folder)
    for file in (folder / CONFIG_FILE, folder / "checkpoints" / "step-00000002" / MANIFEST):
        text = file.read_text()
        shorter = re.sub(r'"integer_forward": false,\s*|\n *integer_forward: false', "", text)
        assert shorter != text
        file.write_text(shorter)
    trainer = Trainer(tiny(steps=3, precision="bf16"), show=False)
    assert trainer.config.quantization.integer_forward is False
    layers = [layer for _, layer in quantized_layers(trainer.model)]
    assert layers
    assert not any(layer.trains_on_integers("cpu", torch.bfloat16) for layer in layers)
    trainer.run()
    assert load_run(folder).step == 3
    assert load_run(folder, 2).step == 2


def test_a_run_is_opened_with_its_weights_and_its_tokenizer(tiny: Tiny) -> None:
    config = tiny(steps=4)
    train(config, show=False)
    run = load_run(config.folder)
    assert (run.step, run.tokens, run.config.steps) == (4, 256, 4)
    assert not run.model.training
    assert Tokenizer.load(run.tokenizer).vocab_size == 270
    earlier = load_run(config.folder, 2)
    assert earlier.step == 2
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(run.model.get_parameter(name), earlier.model.get_parameter(name))
    assert load_run(config.folder, "best").step in (2, 4)


def test_what_is_not_there_is_said(tiny: Tiny, tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    with pytest.raises(BellboxError, match=r"is no run folder: it has no config.yaml"):
        load_run(tmp_path)
    config = tiny(steps=1)
    train(config, show=False)
    assert is_run(config.folder)
    with pytest.raises(BellboxError, match="no checkpoint of step 9"):
        load_run(config.folder, "9")
    with pytest.raises(BellboxError, match="must be last, best or a step"):
        load_run(config.folder, "newest")


def test_an_edited_configuration_does_not_load_a_wrong_model(tiny: Tiny) -> None:
    config = tiny(steps=1)
    train(config, show=False)
    saved = Path(config.folder) / "config.yaml"
    text = saved.read_text()
    saved.write_text(text.replace("intermediate_size: 64", "intermediate_size: 32"))
    with pytest.raises(BellboxError, match=r"model.overrides.intermediate_size is 64 there, 32 here"):
        load_run(config.folder)
    # The tensors say it too, of a checkpoint that does not know its configuration.
    manifest = Path(config.folder) / "checkpoints" / "step-00000001" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["run"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(
        BellboxError, match=r"down_proj: the state is of another recipe: input: block 64 there, 32 here"
    ):
        load_run(config.folder)
    saved.write_text(text.replace("method: bbq", "method: none"))
    with pytest.raises(BellboxError, match=r"q_proj.weight' is missing; was config.yaml changed"):
        load_run(config.folder)


def test_tied_embeddings_are_stored_once_and_stay_tied(tiny: Tiny) -> None:
    from safetensors import safe_open

    config = tiny(steps=1)
    config = dataclasses.replace(config)
    config.model.overrides["tie_word_embeddings"] = True
    train(config, show=False)
    file = Path(config.folder) / "checkpoints" / "step-00000001" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        assert [name for name in opened.keys() if "embed" in name or "head" in name] == [  # noqa: SIM118
            "model.embed_tokens.weight"
        ]
    model = load_run(config.folder).model
    assert model.get_parameter("model.embed_tokens.weight") is model.get_submodule("lm_head").weight
