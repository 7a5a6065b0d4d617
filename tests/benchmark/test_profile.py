"""A forward split into products, quantization, element-wise operations and the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.benchmark import machine as machine_module
from bellbox.benchmark import profile as profiling
from bellbox.benchmark.model import random_model
from bellbox.benchmark.profile import CLASSES, profile
from bellbox.cli.main import main
from bellbox.models import build, preset, vision_preset
from bellbox.nn import PackedLinear
from bellbox.nn.packed_conv import PackedConv


@pytest.fixture(autouse=True)
def one_small_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_BYTES", 1 << 20)


CONFIG = preset("tiny", vocab_size=64, num_hidden_layers=2, hidden_size=64, intermediate_size=128)
TOKENS = torch.zeros(2, 16, dtype=torch.int64)


def test_parts_are_the_whole_and_packed_layers_have_both_of_theirs() -> None:
    found = profile("packed", random_model(CONFIG, 2), TOKENS, seconds=0.0)
    assert found.total == pytest.approx(sum(found.seconds))
    assert min(found.seconds) >= 0
    assert found.product > 0
    assert found.quantization > 0
    floats = profile("floats", build(CONFIG, seed=0).eval(), TOKENS, seconds=0.0)
    assert floats.quantization == 0
    assert floats.product > 0
    assert floats.elementwise > 0


def test_layers_with_their_first_outputs_are_those_layers() -> None:
    model = random_model(CONFIG, 4)
    with torch.no_grad():
        with profiling._inputs(model) as shared:
            model(TOKENS)
        readers = sorted(len(layers) for layers, _ in shared.values())
        assert readers == [1, 1, 1, 1, 2, 2, 3, 3]  # o and down; gate and up; q, k and v
        for layers, x in shared.values():
            for layer, small in zip(layers, profiling._first_outputs(layers), strict=True):
                assert isinstance(small, PackedLinear)
                assert torch.equal(small(x), layer(x)[..., : profiling._FEW])
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_what_grows_with_the_outputs_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = next(each for each in random_model(CONFIG, 4).modules() if isinstance(each, PackedLinear))
    clock = iter([3.0 + 64.0, 3.0 + 16.0])  # 3 seconds of coding, one of product for each output
    monkeypatch.setattr(profiling, "_median", lambda *_: next(clock))
    product, coding = profiling._split([layer], torch.ones(1, 64), 0.0)
    assert (product, coding) == (pytest.approx(64.0), pytest.approx(3.0))


def test_convolutions_have_both_parts_and_floats_their_products() -> None:
    config = vision_preset("resnet-small", width=8)
    images = torch.randn(2, 3, 16, 16)
    found = profile("packed", random_model(config, 2), images, seconds=0.0)
    assert found.product > 0
    assert found.quantization > 0
    floats = profile("floats", build(config, seed=0).eval(), images, seconds=0.0)
    assert floats.quantization == 0
    assert floats.product > floats.rest / 10
    assert floats.elementwise > 0


def test_convolutions_with_their_first_outputs_are_those_convolutions() -> None:
    model, images = random_model(vision_preset("resnet-small", width=32), 4), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        with profiling._inputs(model) as shared:
            model(images)
        found = [(layers[0], x) for layers, x in shared.values() if isinstance(layers[0], PackedConv)]
        assert len(found) >= 6
        for layer, x in found:
            (small,) = profiling._first_outputs([layer])
            assert small.row_count == profiling._FEW
            assert torch.equal(small(x), layer(x)[:, : profiling._FEW])


def test_a_convolution_in_groups_is_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bb.prepare(nn.Conv2d(32, 32, 3, groups=2), bb.Recipe.bbq(4)).eval()
    x = torch.randn(1, 32, 8, 8)
    with torch.no_grad():
        plain(x)
        layer = bb.convert(plain)
        assert isinstance(layer, PackedConv)
        monkeypatch.setattr(profiling, "_median", lambda *_: 5.0)
        assert profiling._split([layer], x, 0.0) == (5.0, 0.0)


@pytest.mark.parametrize(("name", "rows"), [("resnet-small", "2x16"), ("vit-small", "1x32")])
def test_the_command_takes_vision_models(
    name: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "profile.json"
    flags = ["--rows", rows, "--bits", "4", "--seconds", "0.01", "--threads", "1", "--json", str(figures)]
    main(["bench", "profile", name, *flags])
    batch, side = rows.split("x")
    assert f"{name}, {batch} images of {side} x {side} on cpu" in capsys.readouterr().out
    floats, low = json.loads(figures.read_text())["results"]
    assert floats["quantization"] == 0 < floats["product"]
    assert low["quantization"] > 0


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, picture = tmp_path / "profile.json", tmp_path / "profile.svg"
    flags = ["--rows", "1x8", "--bits", "2", "--seconds", "0.01", "--threads", "1", "--json", str(figures)]
    main(["bench", "profile", "tiny", *flags, "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in CLASSES)
    results = json.loads(figures.read_text())["results"]
    assert [each["name"] for each in results] == ["fp32", "2 bits"]
    assert all(each["total"] == pytest.approx(sum(each[kind] for kind in CLASSES)) for each in results)
    drawn = picture.read_text()
    assert drawn.startswith("<svg")
    assert "2 bits: product" in drawn


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "nowhere: neither a folder nor a named size"),
        (["tiny", "--rows", "4"], "--rows '4': write SEQUENCESxTOKENS"),
        (["tiny", "--rows", "1x99999"], "--rows 1x99999: the model takes"),
        (["vit-small", "--rows", "1x48"], "--rows 1x48: the model takes images of 32 x 32"),
        (["tiny", "--device", "tpu"], "--device 'tpu': cpu or cuda"),
    ],
)
def test_what_does_not_fit_is_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "profile", *flags, "--threads", "1"])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
