"""`configs/paper`: every file and row can be trained as it stands, with the numbers of the paper and of its code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox as bb
from bellbox.cli.main import main
from bellbox.comparison.grid import is_grid, load_grid
from bellbox.nn import QuantizedLinear, quantized_layers
from bellbox.runs.build import make_recipe, skeleton
from bellbox.runs.config import TrainConfig
from bellbox.runs.config_file import load_config
from bellbox.runs.resolve import resolve
from bellbox.training.dry_data import look_at_data
from bellbox.utils.yaml import read_yaml

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
FILES = sorted(FOLDER.glob("*.yaml"))
RUNS = [file for file in FILES if not is_grid(file)]
GRIDS = [file for file in FILES if is_grid(file)]

# learning rate, budget, batch; of text in tokens (table of models), of images from the scripts.
TEXT = {"95M": (1.2e-3, 3e9), "125M": (1.2e-3, 5e9), "200M": (6e-4, 10e9), "300M": (3e-4, 20e9)}
IMAGES = {
    "deit-tiny": (2.5e-4, 256),
    "deit-small": (1.25e-4, 128),
    "resnet-10": (2.5e-4, 256),
    "resnet-18": (2.5e-4, 256),
}


def rows(methods: str, *bits: int) -> set[str]:
    return {f"{method}, {width} bits" for method in methods.split() for width in bits}


FULL = {"full precision"}
ROWS = {
    "ablations": {
        *("BBQ, 2 bits", "no HT, 2 bits", "no RMS, 2 bits", "QuEST, 2 bits"),
        *("PIT, no gamma init", "gamma init, frozen"),
    },
    "table-3": FULL | rows("BBQ QuEST", 4, 3, 2, 1) | rows("LSQ", 4, 3, 2),
    "table-4": FULL | rows("BBQ QuEST", 4, 3, 2, 1) | rows("LSQ NF SEQ N2UQ", 4, 3, 2),
    "table-8": rows("BBQ BBQ-Fast", 4, 3, 2, 1),
    "table-10-deit": FULL | rows("BBQ QuEST LSQ", 4, 3, 2, 1),
    "table-10-resnet": FULL | rows("BBQ QuEST", 1),
}
TWINS = {
    **{f"table-3-llama-{size}": "table-3-llama-95M" for size in ("125M", "200M", "300M")},
    "table-10-deit-small": "table-10-deit-tiny",
    "table-10-resnet-18": "table-10-resnet-10",
}


@pytest.mark.parametrize(
    "file", [file for file in RUNS if file.stem != "llama-95M-2bit"], ids=lambda file: file.stem
)
def test_a_file_runs_dry_as_it_stands(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # One block is as good as twelve here; the whole model is counted below.
    less = "blocks=1" if "resnet" in file.stem else "num_hidden_layers=1"
    main(
        [
            "train",
            "--config",
            str(file),
            "--dry-run",
            "--json",
            "-",
            "--device",
            "cpu",
            "--model.overrides",
            less,
        ]
    )
    found = json.loads(capsys.readouterr().out)
    config = found["config"]
    assert list(tmp_path.iterdir()) == []
    if config["task"] == "vision":
        lr, batch = IMAGES[file.stem]
        assert (config["optimizer"]["lr"], found["a_step"]) == (lr, batch)
        assert found["first_batch"] == [batch // 4, 3, 224, 224]
        assert 300 * 126_689 <= found["total"] < 300 * 126_689 + batch
    else:
        lr, budget = TEXT[file.stem.split("-")[1]]
        assert config["optimizer"]["lr"] == lr
        assert budget <= found["total"] < budget + 262_144
        assert (found["a_step"], found["first_batch"]) == (262_144, [64, 512])
        assert found["data"].startswith("hf:allenai/c4:en, streamed")


@pytest.mark.parametrize(
    "file", [file for file in GRIDS if file.stem not in TWINS], ids=lambda file: file.stem
)
def test_every_row_of_a_table_can_be_trained(file: Path) -> None:
    grid = load_grid(file)
    for cell in grid.cells:  # loading has made the layers of each
        config = cell.config(cell.lrs[0], cell.seeds[0])
        resolve(config, look_at_data(config).data)
    expected = next(labels for name, labels in ROWS.items() if file.stem.startswith(name))
    assert {cell.label for cell in grid.cells} == expected


@pytest.mark.parametrize(("name", "twin"), TWINS.items())
def test_tables_of_other_sizes_have_the_same_rows(name: str, twin: str) -> None:
    here, there = (read_yaml(FOLDER / f"{each}.yaml") for each in (name, twin))
    size = name.removeprefix("table-3-").removeprefix("table-10-")
    assert here.pop("base") == f"{size}.yaml"
    assert size.lower() in here.pop("about").lower()
    assert here == {key: value for key, value in there.items() if key not in ("about", "base")}


def test_the_whole_model_of_the_first_row(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--config", str(FOLDER / "llama-95M-2bit.yaml"), "--dry-run", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "95M: 94,871,680 parameters, 30,474,240 quantized (bbq_paper, W2A2), 64,397,440 left whole" in said
    assert "11,445 steps of 262,144 tokens, 3,000,238,080 in all" in said
    assert "[64, 512] int64, 8 such pass(es) a step" in said


def _prepared(file: str) -> dict[str, Any]:
    config = load_config(FOLDER / file)
    model = skeleton(config)
    return dict(quantized_layers(bb.prepare(model, make_recipe(config.quantization))))


@pytest.mark.filterwarnings("ignore:the model can be trained, but not packed")
def test_bbq_is_set_as_in_the_authors_code() -> None:
    layers = _prepared("llama-95M.yaml")
    qkv = layers["model.layers.0.self_attn.qkv_proj"]
    assert isinstance(qkv, QuantizedLinear)
    assert qkv.weight.shape == (3 * 640, 640)
    gate, up = (layers[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up"))
    assert gate.activation_quantizer is not up.activation_quantizer
    assert {layer.activation_quantizer.quantizer.granularity for layer in layers.values()} == {"tensor"}
    assert {layer.weight_quantizer.granularity for layer in layers.values()} == {"row"}
    assert {layer.weight_quantizer.block for layer in layers.values()} == {128}
    config = load_config(FOLDER / "llama-95M.yaml")
    assert not config.optimizer.decay_head
    vision = _prepared("resnet-18.yaml")
    assert {layer.weight_quantizer.block for layer in vision.values()} == {64}
    assert len(vision) == 19  # 16 in the blocks, 3 shortcuts
    assert {layer.weight_quantizer.options.zeta for layer in vision.values()} == {2.45}
    assert set(_prepared("deit-tiny.yaml")) == {
        f"blocks.{i}.{name}"
        for i in range(12)
        for name in ("attention.qkv_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
    }


@pytest.mark.filterwarnings("ignore:the model can be trained, but not packed")
def test_frozen_gamma_is_that_of_the_inputs() -> None:
    grid = load_grid(FOLDER / "ablations.yaml")
    for label, start in (("PIT, no gamma init", 1.0), ("gamma init, frozen", None)):
        cell = grid.cell(label)
        config: TrainConfig = cell.config(cell.lrs[0], 0)
        model = torch.nn.Sequential(
            torch.nn.Linear(128, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 2)
        )
        bb.prepare(model, make_recipe(config.quantization))
        layer = dict(quantized_layers(model))["1"]
        model(torch.randn(4, 128))
        weights, inputs = layer.weight_quantizer, layer.activation_quantizer
        assert weights is not None
        assert inputs is not None
        assert (weights.gamma.requires_grad, inputs.gamma.requires_grad) == (True, False)  # type: ignore[union-attr]
        assert (float(inputs.gamma) == 1.0) == (start == 1.0)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:the model can be trained, but not packed")
def test_with_a_local_text_the_first_row_trains(
    tmp_path: Path, prose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose, encoding="utf-8")
    main(
        ["train", "--config", str(FOLDER / "llama-95M-2bit.yaml"), "--data.source", str(text),
         "--folder", str(tmp_path / "run"), "--model.overrides", "hidden_size=32", "intermediate_size=64",
         "num_attention_heads=1", "num_hidden_layers=1", "--data.vocab-size", "500", "--data.context", "32",
         "--batch.tokens", "128", "--batch.micro-sequences", "2", "--tokens", "256", "--device", "cpu",
         "--precision", "fp32", "--no-tensorboard"]
    )  # fmt: skip
    assert f"the run is in {tmp_path / 'run'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


@pytest.mark.parametrize(
    ("file", "smaller"),
    [
        ("resnet-18.yaml", ["width=8", "blocks=1"]),
        (
            "deit-small.yaml",
            ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=1", "num_attention_heads=2"],
        ),
    ],
)
def test_with_folders_of_pictures_vision_trains(
    file: str, smaller: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = pytest.importorskip("PIL.Image")
    for split, number in (("train", 4), ("val", 1)):
        for name, color in (("bell", (200, 10, 0)), ("box", (0, 10, 200))):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for count in range(number):
                pictures.new("RGB", (40, 36 + count), color).save(folder / f"{count}.png")
    arguments = [
        "train", "--config", str(FOLDER / file), "--data.source", str(tmp_path / "images"), "--device", "cpu",
        "--folder", str(tmp_path / "run"), "--model.overrides", *smaller, "--vision.image-size", "32",
        "--vision.crop", "2", "--vision.batch", "4", "--vision.micro-batch", "2", "--tokens", "8", "--no-tensorboard",
    ]  # fmt: skip
    main([*arguments, "--dry-run"])
    assert "[2, 3, 32, 32] fp32, 2 such pass(es) a step" in capsys.readouterr().out
    main(arguments)
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_the_page_names_every_file_and_row(refused: Callable[..., str]) -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in FILES if file.name not in page] == []
    assert "no row 'BBQ'" in refused(
        "train", "--config", FOLDER / "ablations.yaml", "--row", "BBQ", "--dry-run"
    )
