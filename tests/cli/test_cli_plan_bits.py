"""Widths under a budget: the plan is printed, saved, packed, and is of the bytes and the loss that it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.cli.main import main
from bellbox.errors import BellboxError
from bellbox.evaluation.widths import groups_of, plan_widths
from bellbox.formats import packed as io
from bellbox.nn import quantized_layers
from bellbox.runs.config import BatchSection, DataSection, ModelSection, QuantizationSection
from bellbox.training import TrainConfig, Trainer, load_config, train

CONTEXT = 32


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4)))
    bb.prepare(model, bb.Recipe.bbq(nested=(4, 3, 2, 1), activation_levels=16))
    model(torch.randn(8, 32))
    return model.eval()


def widths_of(model: nn.Module) -> list[int]:
    return [layer.weight_quantizer.levels.n.bit_length() - 1 for layer in model]  # type: ignore[union-attr]


def test_bits_go_where_the_loss_says_they_count():
    """A loss that is a known sum of each layer's width: the best plan is known."""
    model, worth = network(), (8.0, 1.0, 1.0, 4.0)

    def loss() -> float:
        return sum(w * 4.0**-bits for w, bits in zip(worth, widths_of(model), strict=True))

    groups = groups_of(model)
    assert [group.layers for group in groups] == [("0",), ("1",), ("2",), ("3",)]
    # 32 rows of 32 codes, a scale a row, one of the input
    assert groups[0].size == {bits: 32 * (4 * bits + 4) + 4 for bits in (4, 3, 2, 1)}
    budget = 100 + sum(group.size[2] for group in groups)
    found = plan_widths(model, loss, budget, rest=100)
    assert found.uniform_bits == 2
    assert found.uniform.bytes == budget
    best = min(
        sum(w * 4.0**-bits for w, bits in zip(worth, each, strict=True))
        for each in torch.cartesian_prod(*[torch.arange(1, 5)] * 4).tolist()
        if sum(each) <= 8
    )
    assert found.chosen.loss == pytest.approx(best)
    assert found.chosen.bytes <= budget
    assert found.chosen.loss < found.uniform.loss
    assert widths_of(model) == list(found.chosen.bits.values())
    assert found.sensitivity["0"][4] < found.sensitivity["0"][1]


def test_where_losses_do_not_add_up_the_uniform_width_stays():
    model = network()

    def loss() -> float:  # any two widths that differ are bad together
        return float(len(set(widths_of(model)))) - (0.1 if widths_of(model)[0] > 2 else 0.0) * 20

    found = plan_widths(model, loss, sum(group.size[2] for group in groups_of(model)) + 200)
    assert found.chosen.loss <= found.uniform.loss
    fixed = plan_widths(network(), lambda: 1.0, 10**9)
    assert fixed.chosen == fixed.uniform


def test_a_budget_that_nothing_fits_is_refused():
    model = network()
    with pytest.raises(BellboxError, match=r"a budget of 10 bytes: the model takes 1,0\d\d at its narrowest"):
        plan_widths(model, lambda: 1.0, 10)
    with pytest.raises(BellboxError, match="the model has one width"):
        plan_widths(
            bb.prepare(nn.Sequential(nn.Linear(8, 8)), bb.Recipe.bbq(2, keep_ends=False)), lambda: 1.0, 10
        )


def test_a_plan_from_the_command_line_is_packed_as_it_says(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str], run: Path
) -> None:
    size = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = TrainConfig(
        folder=str(tmp_path / "run"),
        model=ModelSection("tiny", {**size, "max_position_embeddings": 2 * CONTEXT}),
        data=DataSection(source=str(tokens), context=CONTEXT),
        quantization=QuantizationSection(nested=[4, 2, 1]),
        batch=BatchSection(tokens=4 * CONTEXT, micro_sequences=4),
        steps=6,
        precision="fp32",
        device="cpu",
        eval_every=6,
        tensorboard=False,
    )
    train(config, show=False)
    main(["convert", str(tmp_path / "run"), "--out", str(tmp_path / "two"), "--bits", "2", "--no-check"])
    two = io.sizes(bb.load(tmp_path / "two"))
    budget = two.packed_bytes + two.other_bytes + 2000
    capsys.readouterr()
    flags = ["--bytes", str(budget), "--sequences", "4", "--out", str(tmp_path / "plan.json")]
    main(["plan", "bits", str(tmp_path / "run"), *flags, "--recipe", str(tmp_path / "fitted.yaml")])
    said = capsys.readouterr().out
    assert f"budget              {budget:,} bytes" in said
    assert "q_proj and 2 more" in said
    assert "all at 2 bits" in said
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["chosen"]["bytes"] <= budget
    assert plan["chosen"]["loss"] <= plan["uniform"]["loss"]
    main(
        [
            "convert",
            str(tmp_path / "run"),
            "--out",
            str(tmp_path / "packed"),
            "--plan",
            str(tmp_path / "plan.json"),
        ]
    )
    assert capsys.readouterr().out.count("=> the same function") == 1
    packed = bb.load(tmp_path / "packed")
    sizes = io.sizes(packed)
    assert sizes.packed_bytes + sizes.other_bytes == plan["chosen"]["bytes"]
    assert io.folder_widths(tmp_path / "packed") == ()
    for name, bits in plan["chosen"]["bits"].items():
        assert packed.get_submodule(name).weight_levels.n == 2**bits  # type: ignore[union-attr]
    # The recipe trains each layer at its one width, as the run was trained in all else.
    assert f"bellbox train --config {tmp_path}/fitted.yaml --folder RUN" in said
    fitted = Trainer(load_config(tmp_path / "fitted.yaml"), show=False)
    layers = dict(quantized_layers(fitted.model))
    assert {name: layer.weight_quantizer.levels.n for name, layer in layers.items()} == {  # type: ignore[union-attr]
        name: 2**bits for name, bits in plan["chosen"]["bits"].items()
    }
    assert {layer.weights_rotated for layer in layers.values()} == {True}
    there = load_config(tmp_path / "run" / "config.yaml")
    assert fitted.config.optimizer == there.optimizer
    assert (fitted.config.data, fitted.config.steps) == (there.data, there.steps)
    # What cannot be planned or packed gets one line.
    (tmp_path / "no.json").write_text("{}")
    convert = ("convert", tmp_path / "run", "--out", tmp_path / "no", "--plan")
    assert "no plan of widths" in refused(*convert, tmp_path / "no.json")
    plan["chosen"]["bits"]["model.layers.7.mlp.up_proj"] = 2
    (tmp_path / "no.json").write_text(json.dumps(plan))
    assert "the model has no layer 'model.layers.7.mlp.up_proj'" in refused(*convert, tmp_path / "no.json")
    assert not (tmp_path / "no").exists()
    assert "has one width" in refused("plan", "bits", run, "--bytes", "1000")
    assert "at its narrowest uniform width" in refused("plan", "bits", tmp_path / "run", "--bytes", "10")
