"""`bellbox train --dry-run`: its numbers against formulas and a real step; nothing is fetched, trained or written."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from bellbox.cli.main import main
from bellbox.runs.build import make_model, skeleton
from bellbox.runs.config import (
    BatchSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    QuantizationSection,
    TrainConfig,
)
from bellbox.training.dry_run import dry_run

Figures = Callable[..., dict[str, Any]]
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
VOCABULARY, CONTEXT, SEQUENCES = 512, 32, 4


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder, and no way out of the machine."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def figures(offline: Path, capsys: pytest.CaptureFixture[str]) -> Figures:
    """The numbers of a dry run, which must leave the working folder empty."""

    def of(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        main(["train", "--dry-run", "--json", "-", "--device", "cpu", *map(str, arguments)])
        assert list(offline.iterdir()) == []
        return json.loads(capsys.readouterr().out)

    return of


def config_of(method: str, sequences: int = SEQUENCES) -> TrainConfig:
    return TrainConfig(
        model=ModelSection("tiny", {**SMALL, "vocab_size": VOCABULARY}),
        data=DataSection("hf:some/text", vocab_size=300, context=CONTEXT),
        quantization=QuantizationSection(method),
        batch=BatchSection(2 * sequences * CONTEXT, sequences),
        steps=7,
        precision="fp32",
        device="cpu",
    )


def test_arithmetic_is_six_operations_a_multiplied_parameter_and_token_and_attention(offline: Path) -> None:
    run = dry_run(config_of("none"))
    width, layers, wide = SMALL["hidden_size"], SMALL["num_hidden_layers"], SMALL["intermediate_size"]
    multiplied = layers * (4 * width**2 + 3 * width * wide) + VOCABULARY * width
    tokens = 7 * 2 * SEQUENCES * CONTEXT
    assert run.attention == 12 * layers * width * CONTEXT * tokens
    assert run.operations == 6 * multiplied * tokens + run.attention
    assert run.parameters == multiplied + VOCABULARY * width + (2 * layers + 1) * width
    assert (run.quantized, run.levels) == (0, ())


@pytest.mark.parametrize("method", ["none", "bbq", "bbq_paper", "nf"])
@pytest.mark.filterwarnings("ignore:the model can be trained, but not packed")
def test_activations_are_what_a_real_forward_saves(method: str, offline: Path) -> None:
    run = dry_run(config_of(method))
    model = make_model(run.config)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT))
    model(tokens)  # sets the scales
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved.update({storage.data_ptr(): storage.nbytes()} if storage.data_ptr() not in own else {})
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert loss.isfinite()
    real = sum(saved.values()) + 2 * logits.numel() * 4
    assert run.memory.activations == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize(("kind", "passes", "moments"), [("adamw", 1, 2), ("adamw", 2, 2), ("muon", 2, 1)])
def test_memory_counts_weights_gradients_and_moments(
    kind: Literal["adamw", "muon"], passes: int, moments: int, offline: Path
) -> None:
    config = config_of("bbq_paper")
    batch = BatchSection(passes * SEQUENCES * CONTEXT, SEQUENCES)
    run = dry_run(dataclasses.replace(config, batch=batch, optimizer=OptimizerSection(kind)))
    counts, memory = (run.quantized, run.parameters - run.quantized), run.memory
    assert memory.gradients == 4 * (run.parameters + (run.quantized if passes > 1 else 0))
    assert memory.optimizer == 4 * (moments * counts[0] + 2 * counts[1])
    plain = skeleton(run.config)
    bare = 4 * sum(t.numel() for t in (*plain.parameters(), *plain.buffers()))
    assert bare < memory.weights < 1.03 * bare  # and the scales
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


def test_text_of_the_hub_is_told_and_not_fetched(figures: Figures) -> None:
    found = figures("--data.source", "hf:allenai/c4:en", "--data.vocab-size", "300", "--tokens", "100000")
    assert found["data"].startswith("hf:allenai/c4:en, streamed from the Hugging Face hub")
    assert "until there are 106,496 training tokens" in found["data"]
    assert (found["steps"], found["total"], found["first_batch"]) == (13, 106_496, [8, 256])
    assert found["config"]["model"]["overrides"]["vocab_size"] == 300
    assert found["seconds"] == pytest.approx(found["operations"] / found["machine"]["operations_a_second"])


def test_data_that_are_here_give_the_first_batch(figures: Figures, tokens: Path, tmp_path: Path) -> None:
    small = ["--data.context", "32", "--batch.tokens", "128", "--batch.micro-sequences", "2", "--steps", "3"]
    found = figures("--data.source", tokens, *small)
    assert (found["first_batch"], found["passes"]) == ([2, 32], 2)
    assert "320" in found["data"]
    text = tmp_path / "a.txt"
    text.write_text("the bell rings " * 50)
    found = figures("--data.source", text, "--data.tokenizer", tokens, *small)
    assert found["config"]["model"]["overrides"]["vocab_size"] == 320
    assert f"1 file(s) of {text.stat().st_size:,} bytes" in found["data"]


def test_what_could_not_be_trained_is_one_line(
    offline: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    for arguments, says in (
        (["--quantization.bits", "99"], "99"),
        (["--data.source", tmp_path / "nowhere"], "no such folder"),
        (["--data.source", "hf:a:b:c:d"], "hf:NAME"),
        (["--data.source", "hf:a", "--data.tokenizer", "t", "--data.vocab-size", "300"], "drop it"),
        (["--task", "vision", "--model.preset", "resnet-18", "--data.source", "hf:a"], "vision.image_size"),
        (["--model.overrides", "vocab_size=100", "--data.source", "hf:a"], "vocab_size is 100"),
        (["--config", tmp_path / "none.yaml"], "cannot be read"),
        (["--row", "BBQ"], "is for a grid"),
        (["--model.from", tmp_path / "nowhere"], "model.from: "),
    ):
        assert says in refused("train", "--dry-run", *arguments)
    assert "--json is for --dry-run" in refused("train", "--json", "x.json")
    assert list(offline.iterdir()) == []


def test_numbers_go_to_a_file_where_one_is_named(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--dry-run", "--json", "numbers.json", "--steps", "3", "--device", "cpu"])
    assert [path.name for path in offline.iterdir()] == ["numbers.json"]
    found, said = json.loads(Path("numbers.json").read_text()), capsys.readouterr().out
    assert (
        f"{found['parameters']['all']:,} parameters, {found['parameters']['quantized']:,} quantized" in said
    )
    assert "3 steps of 8,192 tokens" in said


GRID = """
base: {model: {preset: tiny, overrides: {num_hidden_layers: 1}}, data: {source: "hf:some/text"}, folder: runs/g,
       optimizer: {lr: 0.003}, tokens: 50000, quantization: {method: bbq, options: {gamma_init: 1.5}}}
bits: [1, 2]
rows:
  full precision: {quantization: {method: none}}
  BBQ: {}
  LSQ: {quantization: {method: lsq}, bits: [2]}
"""


def test_a_grid_is_looked_at_whole_or_by_row(
    figures: Figures, refused: Callable[..., str], tmp_path: Path
) -> None:
    grid = tmp_path / "g.yaml"
    grid.write_text(GRID)
    rows = figures("--config", grid, "--steps", "None", "--tokens", "60000")
    assert list(rows) == ["full precision", "BBQ, 1 bits", "BBQ, 2 bits", "LSQ, 2 bits"]
    assert [row["parameters"]["quantized"] > 0 for row in rows.values()] == [False, True, True, True]
    assert {row["total"] for row in rows.values()} == {65_536}
    one = figures("--config", grid, "--row", "LSQ, 2 bits")
    assert one["config"]["optimizer"]["lr"] == 0.003  # of the base, where nobody else says
    assert one["config"]["folder"] == "runs/g/lsq-2-bits"
    assert one["config"]["quantization"]["options"] == {}  # those of the base are another method's
    assert "no row 'LSQ'" in refused("train", "--dry-run", "--config", grid, "--row", "LSQ")
    assert "is a grid of 4 rows; train one with --row" in refused("train", "--config", grid)


def test_a_file_is_laid_over_its_base(figures: Figures, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{steps: 5, data: {source: 'hf:some/text', context: 128}, folder: a}")
    (tmp_path / "b.yaml").write_text("{base: a.yaml, data: {context: 64}}")
    (tmp_path / "c.yaml").write_text("{base: b.yaml, folder: c}")
    config = figures("--config", tmp_path / "c.yaml")["config"]
    assert (config["steps"], config["data"]["context"], config["folder"]) == (5, 64, "c")
    assert config["data"]["source"] == "hf:some/text"
    for text, says in (
        ("{base: d.yaml}", "circle"),
        ("{base: 3}", "base is 3"),
        ("{base: e.yaml}", "e.yaml"),
    ):
        (tmp_path / "d.yaml").write_text(text)
        assert says in refused("train", "--config", tmp_path / "d.yaml")
