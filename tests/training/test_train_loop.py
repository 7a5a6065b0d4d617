from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pieces import records

from bellbox import data
from bellbox.errors import BellboxError
from bellbox.evaluation import perplexity
from bellbox.runs.checkpoint import CheckpointWarning
from bellbox.runs.config import BatchSection, OptimizerSection, QuantizationSection, VisionSection
from bellbox.training import TrainConfig, Trainer, load_config, load_run, train
from bellbox.utils.files import lock

Tiny = Callable[..., TrainConfig]


def final_tensors(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_run(config.folder).model.state_dict()


def assert_equal_runs(left: TrainConfig, right: TrainConfig) -> None:
    assert records(left) == records(right)
    ours, theirs = final_tensors(left), final_tensors(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_run_leaves_everything_that_it_promises(tiny: Tiny) -> None:
    config = tiny(steps=5)
    result = train(config, show=False)
    assert (result.step, result.total_steps, result.tokens, result.finished) == (5, 5, 320, True)
    folder = Path(config.folder)
    assert load_config(folder / "config.yaml").steps == 5
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert {"python", "bellbox", "cpu", "git", "numpy", "safetensors", "tokenizers"} <= environment.keys()
    lines = records(config)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1), ("train", 2), ("eval", 2), ("train", 3),
        ("train", 4), ("eval", 4), ("train", 5), ("eval", 5),
    ]  # fmt: skip
    assert {"tokens", "loss", "perplexity", "lr", "grad_norm"} <= lines[0].keys()
    assert lines[0]["perplexity"] == pytest.approx(math.exp(lines[0]["loss"]))


def test_a_validation_says_how_the_codes_are_used(tiny: Tiny) -> None:
    config = tiny(steps=2)
    result = train(config, show=False)
    record = result.validation
    assert record is not None
    layers = record["weight_entropy"]["layers"]
    assert len(layers) == 7
    assert record["weight_entropy"]["mean"] == pytest.approx(sum(layers.values()) / 7)
    assert all(1.8 < bits <= 2.0 for bits in layers.values())
    # q, k, v share one quantizer of the input, and so do gate and up.
    assert len(record["activation_entropy"]["layers"]) == 4
    assert all(0 < bits <= 2.0 for bits in record["activation_entropy"]["layers"].values())
    assert all(0.3 < share < 0.7 for share in record["saturated"]["weight"]["layers"].values())
    assert set(record["gamma"]["weight"]) == set(layers)
    assert all(gamma > 0 for gamma in record["gamma"]["activation"].values())


def test_full_precision_has_no_measures_of_codes(tiny: Tiny) -> None:
    result = train(tiny(steps=2, quantization=QuantizationSection(method="none")), show=False)
    assert result.validation is not None
    assert not {"weight_entropy", "gamma", "saturated"} & result.validation.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls(tiny: Tiny, precision: str) -> None:
    optimizer = OptimizerSection(lr=1e-2)
    config = tiny(steps=40, precision=precision, optimizer=optimizer, eval_every=20, checkpoint_every=100)
    train(config, show=False)
    losses = [record["loss"] for record in records(config) if record["kind"] == "eval"]
    assert losses[-1] < losses[0] < math.log(270) + 0.3


def test_the_recorded_validation_is_what_the_evaluation_of_the_run_gives(tiny: Tiny, tokens: Path) -> None:
    config = tiny(steps=3, precision="bf16")
    result = train(config, show=False)
    run = load_run(config.folder)
    again = perplexity(run.model, data.open(tokens).valid, context=config.data.context)
    assert result.validation is not None
    assert again.loss == result.validation["loss"]
    assert again.bits_per_byte == result.validation["bits_per_byte"]


def test_equal_configurations_give_equal_bits(tiny: Tiny) -> None:
    left, right = tiny("left"), tiny("right")
    train(left, show=False)
    train(right, show=False)
    assert_equal_runs(left, right)


def test_the_vision_section_means_nothing_to_a_language_run(tiny: Tiny) -> None:
    trainer = Trainer(tiny(steps=1, vision=VisionSection(ema=0.9)), show=False)
    trainer.run()
    assert trainer.average.model is trainer.model
    assert trainer.average.tensors() == {}


def test_another_seed_gives_another_model(tiny: Tiny) -> None:
    left, right = tiny("left", steps=1), tiny("right", steps=1, seed=1)
    train(left, show=False)
    train(right, show=False)
    assert records(left) != records(right)


@pytest.mark.parametrize("granularity", ["token", "ema", "tensor"])
def test_a_run_in_pieces_equals_a_run_in_one(tiny: Tiny, granularity: Any) -> None:
    section = QuantizationSection(granularity=granularity)
    whole, pieces = (
        tiny("whole", steps=7, quantization=section),
        tiny("pieces", steps=7, quantization=section),
    )
    train(whole, show=False)

    class Cut(Trainer):
        def _train_step(self) -> None:
            super()._train_step()
            # As after SIGTERM: 3 is a step that is not validated, 6 is one that is.
            if self.state.step in (3, 6) and self.state.step != self.saved_step:
                self.signals.received = 15

    for expected in (3, 6, 7):
        result = Cut(pieces, show=False).run()
        assert result.step == expected
    assert result.finished
    assert_equal_runs(whole, pieces)


def test_a_signal_during_validation_is_made_up_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from bellbox.training.tasks import language as task

    whole, pieces = tiny("whole"), tiny("pieces")
    train(whole, show=False)
    trainer = Trainer(pieces, show=False)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        trainer.signals._on_signal(15, None)

    with monkeypatch.context() as patch:
        patch.setattr(task, "perplexity", interrupted)
        result = trainer.run()
    assert (result.step, result.stopped_by, result.finished) == (2, 15, False)
    assert [record["kind"] for record in records(pieces)] == ["train", "train"]
    assert train(pieces, show=False).finished
    assert_equal_runs(whole, pieces)


def test_accumulation_gives_the_gradient_of_one_big_batch(tiny: Tiny, tokens: Path) -> None:
    full = QuantizationSection(method="none")
    gradients = []
    for micro in (8, 2):
        config = tiny(f"m{micro}", steps=1, quantization=full, batch=BatchSection(128, micro))
        trainer = Trainer(config, show=False)
        trainer.run()
        gradients.append([p.grad for p in trainer.model.parameters()])
        losses = records(config)[0]["loss"], records(config)[0]["grad_norm"]
        gradients[-1].append(torch.tensor(losses))
    for left, right in zip(*gradients, strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-6)


def test_a_finished_run_is_not_trained_again(tiny: Tiny) -> None:
    config = tiny(steps=2)
    first = train(config, show=False)
    before = records(config)
    again = train(config, show=False)
    assert again.finished
    assert again.validation == first.validation
    assert records(config) == before


def test_a_folder_of_another_configuration_is_refused_by_key(tiny: Tiny) -> None:
    config = tiny(steps=2)
    train(config, show=False)
    other = tiny(steps=2, optimizer=dataclasses.replace(config.optimizer, lr=0.5))
    with pytest.raises(BellboxError, match=r"optimizer.lr is 0.0012 there, 0.5 here; choose another folder"):
        train(other, show=False)
    with pytest.raises(BellboxError, match="already holds a run"):
        train(config, resume=None, show=False)


def test_data_that_changed_since_is_refused(tiny: Tiny, tokens: Path, tmp_path: Path) -> None:
    import tiny_run

    config = tiny(steps=2)
    train(config, show=False)
    (tmp_path / "moved").mkdir()
    changed = tiny_run.write_tokens(tmp_path / "moved" / "tokens", count=3000)
    saved = Path(config.folder) / "config.yaml"
    saved.write_text(saved.read_text().replace(str(tokens), str(changed)))
    with pytest.raises(BellboxError, match=r"is not what .* was begun with"):
        train(load_config(saved), show=False)


def test_a_run_goes_on_where_its_data_have_moved(tiny: Tiny, tokens: Path, tmp_path: Path) -> None:
    config = tiny(steps=2)
    train(config, show=False)
    shutil.copytree(tokens, tmp_path / "elsewhere")
    moved = dataclasses.replace(config.data, source=str(tmp_path / "elsewhere"))
    assert train(dataclasses.replace(config, data=moved), show=False).finished


def test_two_processes_cannot_train_in_one_folder(tiny: Tiny) -> None:
    config = tiny(steps=1)
    Path(config.folder).mkdir()
    with lock(Path(config.folder)), pytest.raises(BellboxError, match="another process is training"):
        train(config, show=False)
    assert train(config, show=False).finished


def test_a_damaged_checkpoint_is_passed_over_and_made_again(tiny: Tiny) -> None:
    config, whole = tiny(steps=6), tiny("whole", steps=6)
    train(whole, show=False)

    class Cut(Trainer):
        def _train_step(self) -> None:
            super()._train_step()
            if self.state.step == 5:
                self.signals.received = 15

    Cut(config, show=False).run()
    victim = Path(config.folder) / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.warns(CheckpointWarning, match="step-00000005.*optimizer.safetensors: damaged"):
        train(config, show=False)
    assert_equal_runs(whole, config)


def poison(trainer: Trainer, layer: str, step: int, gradient: bool = False) -> None:
    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if trainer.state.step < step or not module.training:
            return output
        if not gradient:
            return output * math.nan
        output.register_hook(lambda grad: grad * math.nan)
        return output

    trainer.model.get_submodule(layer).register_forward_hook(hook)


@pytest.mark.parametrize("debug", [False, True])
def test_a_nan_loss_stops_names_the_layer_and_keeps_the_last_checkpoint(tiny: Tiny, debug: bool) -> None:
    config = tiny(steps=6, debug=debug)
    trainer = Trainer(config, show=False)
    layer = "model.layers.0.mlp.down_proj"
    poison(trainer, layer, step=4)
    with pytest.raises(BellboxError) as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith("step 5: ")
    assert f"the output of layer '{layer}' is not finite" in message
    assert "step-00000004" in message
    assert "\n" not in message
    assert load_run(config.folder).step == 4
    assert [record["step"] for record in records(config)][-1] == 4
    # Without the poison it goes on to the end.
    whole = tiny("whole", steps=6)
    train(whole, show=False)
    train(config, show=False)
    assert_equal_runs(whole, config)


def test_a_nan_gradient_stops_and_names_the_layer(tiny: Tiny) -> None:
    trainer = Trainer(tiny(steps=6), show=False)
    poison(trainer, "model.layers.0.mlp.up_proj", step=2, gradient=True)
    with pytest.raises(BellboxError, match=r"step 3: the gradient's norm is nan: .*mlp.up_proj"):
        trainer.run()


def test_a_weight_that_overflowed_is_named(tiny: Tiny) -> None:
    trainer = Trainer(tiny(steps=2, quantization=QuantizationSection(method="none")), show=False)
    with torch.no_grad():
        trainer.model.get_parameter("model.layers.0.self_attn.o_proj.weight")[0, 0] = math.inf
    expected = "no checkpoint was saved yet"
    with pytest.raises(BellboxError, match=rf"step 1: .*self_attn.o_proj.*its weight is not.*{expected}"):
        trainer.run()


def test_debug_mode_ends_with_the_run(tiny: Tiny) -> None:
    from bellbox.quantizers.base import debug_enabled

    before = debug_enabled()
    train(tiny(steps=1, debug=True), show=False)
    assert debug_enabled() == before


def test_a_vocabulary_or_context_that_is_too_small_is_refused(tiny: Tiny) -> None:
    config = tiny()
    config.model.overrides["vocab_size"] = 100
    with pytest.raises(BellboxError, match=r"vocab_size is 100, the tokenizer .* has 270 entries"):
        Trainer(config, show=False)
    config = tiny()
    config.model.overrides["max_position_embeddings"] = 8
    with pytest.raises(BellboxError, match=r"data.context is 16, .* only 8"):
        Trainer(config, show=False)


def test_an_explicit_recipe_decides_by_layer(tiny: Tiny) -> None:
    from bellbox.recipe import Recipe

    recipe = Recipe.bbq(bits=4, keep=("*.down_proj",)).to_dict()
    plain = json.loads(json.dumps(recipe))
    config = tiny(steps=1, quantization=QuantizationSection(recipe=plain))
    result = train(config, show=False)
    assert result.validation is not None
    layers = result.validation["weight_entropy"]["layers"]
    assert len(layers) == 6
    assert max(layers.values()) > 3.0
    assert load_run(config.folder).config.quantization.recipe == plain


def test_plain_lines_where_there_is_no_terminal(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(steps=2))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("training in ")
    assert lines[1].startswith("data: the batch of step 1 has the sha256 ")
    assert "loss" in lines[2]
    assert "left" in lines[2]
    assert "weight entropy" in lines[-1]


def test_no_warning_on_a_good_run(tiny: Tiny) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny(steps=2), show=False)
