"""`task: vision`: the same loop, checkpoint and resume as for language; accuracy in the record."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import bellbox as bb
from bellbox.data.images import open_images
from bellbox.errors import BellboxError
from bellbox.evaluation.accuracy import accuracy
from bellbox.models import ResNet, ViT
from bellbox.nn import quantized_layers
from bellbox.runs.config import (
    CewtSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    PhasesSection,
    VisionSection,
)
from bellbox.runs.metrics import WALL_CLOCK, read_records
from bellbox.training import TrainConfig, Trainer, load_run, save_config, train
from waiting import wait_for

VisionRun = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright and dark 8 x 8 images: two classes that anything can tell apart."""
    draw, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 96), ("test", 32)):
        labels = np.arange(count) % 2
        shade = 60 + 120 * labels[:, None, None, None]
        arrays[f"{split}_images"] = (shade + draw.integers(-40, 40, (count, 8, 8, 3))).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    path = tmp_path_factory.mktemp("images") / "shades.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def tiny_vision(images: Path, tmp_path: Path) -> VisionRun:
    def make(folder: str = "run", **changes: object) -> TrainConfig:
        base = TrainConfig(
            folder=str(tmp_path / folder),
            task="vision",
            model=ModelSection("resnet-small", {"width": 8, "stages": 2, "stem_stride": 1}),
            data=DataSection(source=str(images)),
            vision=VisionSection(batch=16, crop=1),
            steps=4,
            precision="fp32",
            device="cpu",
            eval_every=2,
            checkpoint_every=2,
            log_every=1,
            tensorboard=False,
        )
        return dataclasses.replace(base, **changes)

    return make


def records_of(config: TrainConfig) -> list[dict[str, object]]:
    found = read_records(Path(config.folder) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in WALL_CLOCK} for record in found]


def assert_equal_runs(one: TrainConfig, other: TrainConfig) -> None:
    assert records_of(one) == records_of(other)
    ours, theirs = load_run(one.folder).model.state_dict(), load_run(other.folder).model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_it_learns_and_records_accuracy(tiny_vision: VisionRun) -> None:
    config = tiny_vision(steps=30, eval_every=30)
    result = train(config, show=False)
    assert result.validation is not None
    assert result.validation["accuracy"] > 0.9
    parts = result.validation["parts"]
    assert parts["unit"] == "images"
    assert sum(parts["right"]) / sum(parts["sizes"]) == result.validation["accuracy"]
    assert "perplexity" not in result.validation
    assert result.tokens == 30 * 16
    last = records_of(config)[-2]
    assert last["kind"] == "train"
    assert "perplexity" not in last
    run = load_run(config.folder)
    assert isinstance(run.model, ResNet)
    assert run.tokenizer is None
    found = accuracy(run.model, open_images(config.data.source).valid, batch_size=5)
    assert found.accuracy == result.validation["accuracy"]
    assert found.loss == pytest.approx(result.validation["loss"], rel=1e-6)
    mean, _ = open_images(config.data.source).statistics()
    assert run.model.normalise.mean.flatten().tolist() == pytest.approx(mean)
    assert len(result.validation["weight_entropy"]["layers"]) == len(list(quantized_layers(run.model)))


MIXED = VisionSection(batch=16, micro_batch=8, mixup=0.3, cutmix=1.0, label_smoothing=0.1, ema=0.7)


@pytest.mark.parametrize("preset", ["resnet-small", "vit-small"])
def test_stopped_and_resumed_it_ends_bit_identical(tiny_vision: VisionRun, preset: str) -> None:
    overrides: dict[str, bool | int | float | str] = {"width": 8, "stages": 2, "drop_path": 0.2}
    if preset == "vit-small":
        overrides = {"patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "drop_path": 0.2}
    settings = {
        "steps": 7,
        "model": ModelSection(preset, overrides),
        "vision": MIXED,
        "phases": PhasesSection(quantized=0.7),
        "precision": "bf16",
    }
    whole, stopped = tiny_vision("whole", **settings), tiny_vision("stopped", **settings)
    train(whole, show=False)
    for until in (2, 5):
        trainer = Trainer(stopped, show=False)
        step = trainer._train_step

        def count(step: Callable[[], None] = step, trainer: Trainer = trainer, until: int = until) -> None:
            step()
            if trainer.state.step == until:
                trainer.signals.received = signal.SIGTERM

        trainer._train_step = count  # type: ignore[method-assign]
        assert not trainer.run().finished
    assert train(stopped, show=False).finished
    assert_equal_runs(whole, stopped)
    if preset == "vit-small":
        assert isinstance(load_run(whole.folder).model, ViT)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs SIGKILL")
def test_killed_and_resumed_it_ends_bit_identical(tiny_vision: VisionRun) -> None:
    settings = {"steps": 60, "checkpoint_every": 3, "eval_every": 20, "vision": MIXED}
    whole, killed = tiny_vision("whole", **settings), tiny_vision("killed", **settings)
    torch.set_num_threads(1)
    train(whole, show=False)
    file = Path(killed.folder).with_suffix(".yaml")
    save_config(killed, file)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from bellbox.training import load_config, train\n"
        "train(load_config(sys.argv[1]), show=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(file)])

    def saved() -> bool:
        assert process.poll() is None
        return any(Path(killed.folder).glob("checkpoints/step-*"))

    wait_for(saved, "a checkpoint", process.pid, 1e-3)
    process.kill()
    process.wait()
    assert load_run(killed.folder).step < 60
    train(killed, show=False)
    assert_equal_runs(whole, killed)


def test_averaged_weights_are_what_is_judged_and_loaded(tiny_vision: VisionRun) -> None:
    free = OptimizerSection(cewt=CewtSection(every=0))  # else the average is settled: test_average.py
    config = tiny_vision(vision=VisionSection(batch=16, ema=0.5), optimizer=free, steps=3, eval_every=3)
    trainer = Trainer(config, show=False)
    expected: dict[str, torch.Tensor] = {}
    step = trainer._train_step

    def follow() -> None:
        step()
        for name, value in trainer.model.named_parameters():
            before = expected.get(name)
            expected[name] = (
                value.detach().clone() if before is None else torch.lerp(before, value.detach(), 0.5)
            )

    trainer._train_step = follow  # type: ignore[method-assign]
    trainer.run()
    loaded = dict(load_run(config.folder).model.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name].detach(), value)
    assert not torch.equal(loaded["head.weight"], trainer.model.state_dict()["head.weight"])


def test_stem_norms_and_head_keep_their_precision(tiny_vision: VisionRun) -> None:
    for preset, kept in (("resnet-small", {"stem.conv", "head"}), ("vit-small", {"patch_embed", "head"})):
        model = bb.models.build(bb.models.vision_preset(preset))
        plain = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
        low = {name for name, _ in quantized_layers(bb.prepare(model, bb.Recipe.bbq_vision()))}
        assert plain - low == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ModelSection("tiny")},
            "no preset of a vision model 'tiny'; there are: resnet-small, ",
        ),
        (
            {"task": "language", "model": ModelSection("vit-small")},
            "no model preset 'vit-small'; there are: tiny",
        ),
        ({"vision": VisionSection(batch=97)}, "a batch of 97 images cannot be made of 96"),
        (
            {"vision": VisionSection(batch=16, micro_batch=5)},
            "vision.micro_batch is 5, must be a divisor",
        ),
        ({"vision": VisionSection(train_images=97)}, "97 images are asked for"),
        (
            {"vision": VisionSection(valid_images=33)},
            "vision.valid_images is 33, data.source .* has 32 valid",
        ),
        ({"vision": VisionSection(mixup=-1.0)}, "vision.mixup is -1.0, must be at least 0"),
        (
            {"model": ModelSection("resnet-small", {"num_channels": 1})},
            "num_channels is 1, that of data.source",
        ),
        ({"model": ModelSection("vit-small", {"patch_size": 3})}, "patch_size is 3, which does not divide 8"),
        ({"data": DataSection(source="nowhere")}, "'nowhere': no images here"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    tiny_vision: VisionRun, changes: dict[str, object], message: str
) -> None:
    config = tiny_vision(**changes)
    if config.task == "language":
        config = dataclasses.replace(config, data=DataSection())
    with pytest.raises(BellboxError, match=message) as caught:
        Trainer(config, show=False)
    assert "\n" not in str(caught.value)


def test_the_eval_command_batches_images_and_refuses_what_is_for_text(
    tiny_vision: VisionRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bellbox.cli import eval_images
    from bellbox.cli.main import main

    config = tiny_vision(steps=1)
    train(config, show=False)
    batches: list[object] = []
    measure = eval_images.accuracy
    monkeypatch.setattr(
        eval_images,
        "accuracy",
        lambda *args, **named: batches.append(named["batch_size"]) or measure(*args, **named),
    )
    main(["eval", config.folder, "--batch", "5"])
    main(["eval", config.folder])
    assert batches == [5, 128]
    assert "32 validation images" in capsys.readouterr().out
    for flag, value in (("--split", "test"), ("--context", "8"), ("--stride", "4"), ("--max-tokens", "9")):
        with pytest.raises(SystemExit) as caught:
            main(["eval", config.folder, flag, value])
        assert caught.value.code == 2
        assert f"{flag} does not apply to a vision model; leave it out" in capsys.readouterr().err


def test_a_packed_model_knows_the_size_that_its_pictures_were_scaled_to(
    tiny_vision: VisionRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    from bellbox.cli.main import main

    for split, count in (("train", 8), ("valid", 2)):
        for name, shade in (("dark", 40), ("bright", 200)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (20 + i, 12), (shade, shade + i, shade)).save(folder / f"{i}.png")
    pictures = str(tmp_path / "pictures")
    config = tiny_vision(
        data=DataSection(source=pictures), vision=VisionSection(image_size=8, batch=8, crop=0), steps=2
    )
    train(config, show=False)
    packed = tmp_path / "packed"
    main(["convert", config.folder, "--out", str(packed)])
    losses = []
    for model, more in (
        (config.folder, []),
        (str(packed), ["--data", pictures]),
        (str(packed), ["--data", pictures, "--image-size", "16"]),
    ):
        capsys.readouterr()
        main(["eval", model, *more, "--json", "-"])
        found = json.loads(capsys.readouterr().out)
        losses.append(found["loss"])
    assert losses[0] == losses[1]
    assert losses[2] != losses[0]
    opened = bb.load(packed)
    assert opened.config.image_size == 8
    for size in ("0", "5000"):
        with pytest.raises(SystemExit):
            main(["eval", str(packed), "--data", pictures, "--image-size", size])
        assert f"--image-size is {size}, must be from 1 to 4096" in capsys.readouterr().err


def test_a_packed_model_without_a_size_asks_for_one(
    tiny_vision: VisionRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bellbox.cli.main import main

    config = tiny_vision(steps=1)
    train(config, show=False)
    bb.save(bb.convert(load_run(config.folder).model), tmp_path / "packed")
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "packed"), "--data", str(tmp_path / "pictures")])
    assert "say what to scale them to (vision.image_size, --image-size)" in capsys.readouterr().err


def _as_pictures(images: Path, folder: Path) -> Path:
    """The first few images as files in folders of classes."""
    pillow = pytest.importorskip("PIL.Image")
    with np.load(images) as arrays:
        for split, name in (("train", "train"), ("valid", "test")):
            for number in range(16):
                place = folder / split / f"class{arrays[f'{name}_labels'][number]}" / f"{number}.bmp"
                place.parent.mkdir(parents=True, exist_ok=True)
                pillow.fromarray(arrays[f"{name}_images"][number]).save(place)
    return folder


def _as_idx(images: Path, folder: Path) -> Path:
    folder.mkdir()
    with np.load(images) as arrays:
        for name, split in (("train", "train"), ("t10k", "test")):
            gray = arrays[f"{split}_images"][..., 0]
            for kind, values in (
                ("images-idx3", gray),
                ("labels-idx1", arrays[f"{split}_labels"].astype(np.uint8)),
            ):
                sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
                content = bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()
                (folder / f"{name}-{kind}-ubyte").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("make", "name", "at"),
    [
        (_as_pictures, "train/class1/3.bmp", -5),
        (_as_pictures, "valid/class0/2.bmp", -5),
        (_as_idx, "train-images-idx3-ubyte", 50),
        (_as_idx, "t10k-labels-idx1-ubyte", 10),
    ],
)
def test_a_picture_or_label_changed_between_two_starts_is_refused_by_name(
    tiny_vision: VisionRun, images: Path, tmp_path: Path, make: Callable[..., Path], name: str, at: int
) -> None:
    source = make(images, tmp_path / "data")
    vision = VisionSection(batch=8, crop=1, image_size=8 if make is _as_pictures else None)
    config = tiny_vision(data=DataSection(source=str(source)), vision=vision, steps=1)
    train(config, show=False)
    file = source / name
    content = bytearray(file.read_bytes())
    file.write_bytes(content)  # looks another way, and holds the same
    assert train(dataclasses.replace(config, steps=2), show=False).step == 2
    content[at] ^= 1  # of the same size
    file.write_bytes(content)
    with pytest.raises(BellboxError, match=f"{file.name}: was changed since the run was begun"):
        train(dataclasses.replace(config, steps=3), show=False)


def test_a_picture_that_came_or_went_or_changed_its_class_is_refused_by_name(
    tiny_vision: VisionRun, images: Path, tmp_path: Path
) -> None:
    source = _as_pictures(images, tmp_path / "data")
    vision = VisionSection(batch=8, crop=1, image_size=8)
    config = tiny_vision(data=DataSection(source=str(source)), vision=vision, steps=1)
    train(config, show=False)
    longer = dataclasses.replace(config, steps=2)
    picture, elsewhere = source / "train/class1/3.bmp", source / "train/class0/3.bmp"
    picture.rename(elsewhere)
    with pytest.raises(BellboxError, match=r"class0/3\.bmp: was added since"):
        train(longer, show=False)
    elsewhere.unlink()
    with pytest.raises(BellboxError, match=r"class1/3\.bmp: is gone since"):
        train(longer, show=False)
    moved = source.rename(tmp_path / "elsewhere")
    (moved / "train/class1/3.bmp").write_bytes((moved / "train/class1/1.bmp").read_bytes())
    with pytest.raises(BellboxError, match=r"3\.bmp: was changed"):
        train(dataclasses.replace(longer, data=DataSection(source=str(moved))), show=False)
