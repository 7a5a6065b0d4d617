"""A folder of several widths: each is the trained model's function and reads its own files; damage is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bellbox as bb
from bellbox.core.packing import pack, unpack
from bellbox.core.planes import packed_from, planes_of
from bellbox.errors import BellboxError
from bellbox.formats import packed as io
from bellbox.models import LlamaConfig, build
from bellbox.nn import PackedLayer, quantized_layers

WIDTHS = (4, 3, 2, 1)
IDS = torch.arange(7)[None]


def trained_llama(widths: tuple[int, ...] = WIDTHS, **choices: Any) -> nn.Module:
    """A small LLaMA after a few steps at all of its widths."""
    torch.manual_seed(0)
    model = build(LlamaConfig(13, 32, 48, 1, 2, 1, max_position_embeddings=8), seed=0)
    bb.prepare(model, bb.Recipe.bbq(nested=widths, **choices))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        for bits in widths:
            bb.set_bits(model, bits)
            model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    bb.set_bits(model, widths[0])
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained_llama()


@pytest.fixture(scope="module")
def original(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested") / "model"
    bb.save(bb.convert(model), folder)
    return folder


@pytest.fixture
def spoilt(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def seal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda section: None) -> None:
    """Change our section of the configuration, and make all checksums right again."""
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    change(section)
    for name in list(section["files"]):
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            section["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    section.pop("sha256")
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    section["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: value.clone() for name, value in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file)
    seal(folder)


def same_codes(one: nn.Module, other: nn.Module) -> bool:
    left = dict(quantized_layers(one))
    right = {name: layer for name, layer in other.named_modules() if isinstance(layer, PackedLayer)}
    assert list(left) == list(right)
    return all(torch.equal(layer.weight_codes(), right[name].weight_codes()) for name, layer in left.items())


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7])
def test_fewer_planes_are_the_codes_shifted_right(bits: int, columns: int):
    codes = torch.randint(
        2**bits, (17, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    planes = planes_of(pack(codes, 2**bits), columns, bits)
    for width in range(1, bits + 1):
        found = unpack(packed_from(planes[:width], columns), columns, 2**width)
        assert torch.equal(found, codes >> (bits - width))


def test_the_bytes_of_planes_are_as_docs_format_says():
    codes = torch.tensor([[5, 2, 7, 0, 4, 1, 3, 6, 5]], dtype=torch.uint8)
    planes = planes_of(pack(codes, 8), 9, 3)
    assert [bytes(plane[0].tolist()).hex() for plane in planes] == ["9501", "c600", "6501"]


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_width_is_the_trained_one_code_for_code(model: nn.Module, original: Path, bits: int):
    loaded = bb.load(original, bits=bits)
    bb.set_bits(model, bits)
    try:
        assert same_codes(model, loaded)
        assert torch.equal(loaded(IDS), model(IDS))
        assert torch.equal(bb.convert(model)(IDS), loaded(IDS))
    finally:
        bb.set_bits(model, 4)


OPENED: list[str] = []


def _see(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str | bytes):
        OPENED.append(Path(os.fsdecode(args[0])).name)


@pytest.fixture(scope="module")
def opened() -> list[str]:
    """Names of the files that Python opens from now on: each that is mapped is read for its checksum first."""
    sys.addaudithook(_see)  # which nothing takes away again
    return OPENED


def bytes_read() -> int:
    """By this process, ever, by `read`."""
    said = Path("/proc/self/io").read_text()
    return int(dict(line.split(": ") for line in said.splitlines())["rchar"])


def test_a_width_reads_its_own_files_and_no_byte_of_the_wider_ones(
    original: Path, tmp_path: Path, opened: list[str]
):
    only = Path(shutil.copytree(original, tmp_path / "only"))
    for name in ("bits-3.safetensors", "bits-4.safetensors"):
        (only / name).unlink()
    assert torch.equal(bb.load(only, bits=2)(IDS), bb.load(original, bits=2)(IDS))
    with pytest.raises(BellboxError, match=r"bits-4\.safetensors: cannot be read"):
        bb.load(only)
    size = {bits: (original / f"bits-{bits}.safetensors").stat().st_size for bits in WIDTHS}
    read = {}
    for bits in WIDTHS:
        opened.clear()
        before = bytes_read() if sys.platform == "linux" else 0
        bb.load(original, bits=bits)
        read[bits] = (bytes_read() if sys.platform == "linux" else 0) - before
        files = {name for name in opened if name.startswith("bits-")}
        assert files == {f"bits-{each}.safetensors" for each in range(1, bits + 1)}
    if sys.platform == "linux":
        for bits in (4, 3, 2):
            assert read[bits] - read[bits - 1] >= size[bits]
            assert (
                read[bits] - read[bits - 1] <= 2 * size[bits] + 16384
            )  # its header once more, in a whole buffer


def test_each_plane_has_an_equal_share_of_the_codes(original: Path):
    planes = {bits: load_file(original / f"bits-{bits}.safetensors") for bits in WIDTHS}
    size = {
        bits: sum(value.nbytes for name, value in each.items() if "plane" in name)
        for bits, each in planes.items()
    }
    assert size[1] == size[2] == size[3] == size[4]  # 1 bit reads a quarter of the codes of 4, 2 bits a half
    for bits in WIDTHS:
        needed = [
            "config.json",
            "model.safetensors",
            *(f"bits-{each}.safetensors" for each in range(1, bits + 1)),
        ]
        assert io.file_bytes(original, bits) == sum((original / name).stat().st_size for name in needed)


def test_saving_what_was_loaded_gives_the_same_bytes_and_narrower_ones_give_fewer_files(
    original: Path, tmp_path: Path
):
    bb.save(bb.load(original), tmp_path / "again")
    for file in original.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    bb.save(bb.load(original, bits=2), tmp_path / "two")
    assert io.folder_widths(tmp_path / "two") == (2, 1)
    for name in ("bits-1.safetensors", "bits-2.safetensors", "model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (original / name).read_bytes()
    bb.save(bb.load(original, bits=1), tmp_path / "one")
    section = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert section["version"] == 4  # one width is an ordinary folder
    assert torch.equal(bb.load(tmp_path / "one")(IDS), bb.load(original, bits=1)(IDS))


def test_inputs_may_keep_their_width_and_widths_may_be_far_apart(tmp_path: Path):
    model = trained_llama((4, 1), activation_levels=16)
    bb.save(bb.convert(model), tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").glob("bits-*")) == [
        "bits-1.safetensors",
        "bits-4.safetensors",
    ]
    for bits in (4, 1):
        bb.set_bits(model, bits)
        loaded = bb.load(tmp_path / "m", bits=bits)
        assert same_codes(model, loaded)
        assert torch.equal(loaded(IDS), model(IDS))
        assert {layer.coding.levels.n for layer in loaded.modules() if isinstance(layer, PackedLayer)} == {16}


def test_convolutions_nest_too(tmp_path: Path):
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 10))

    x = torch.randn(2, 3, 6, 6)
    model = bb.prepare(network(), bb.Recipe.bbq(nested=(4, 2)))
    model(x)
    bb.save(bb.convert(model.eval()), tmp_path / "m")
    for bits in (4, 2):
        bb.set_bits(model, bits)
        assert torch.equal(bb.load(tmp_path / "m", into=network(), bits=bits)(x), model(x))


def test_layers_of_different_widths_take_their_widest_below(tmp_path: Path):
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))

    x = torch.randn(4, 16)
    model = bb.prepare(network(), bb.Recipe.bbq(nested=(4, 3, 1)))
    model(x)
    model.eval()
    bb.set_bits(model, {"0": 3, "2": 1})
    bb.save(bb.convert(model), tmp_path / "m")
    assert torch.equal(bb.load(tmp_path / "m", into=network())(x), model(x))
    assert io.folder_widths(tmp_path / "m") == (4, 3, 1)
    bb.set_bits(model, {"1": 3})
    assert torch.equal(bb.load(tmp_path / "m", into=network(), bits=3)(x), model(x))
    assert "4 of 4,3,1" in bb.summary(bb.load(tmp_path / "m", into=network()))


def test_the_state_of_a_packed_model_has_all_of_its_widths(original: Path, tmp_path: Path):
    one, other = bb.load(original), bb.load(original)
    other.load_state_dict(one.state_dict())
    bb.save(other.to(torch.float64), tmp_path / "m")
    scale = load_file(tmp_path / "m" / "bits-2.safetensors")["model.layers.0.self_attn.q_proj.weight_scale_2"]
    assert scale.dtype == torch.float32


# --- what is refused ---


def swap_byte(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(bytes(data))


def test_a_damaged_a_missing_and_an_unlisted_file_are_refused_by_name(spoilt: Path):
    swap_byte(spoilt, "bits-2.safetensors")
    assert bb.load(spoilt, bits=1) is not None  # its files are whole
    with pytest.raises(BellboxError, match=r"bits-2\.safetensors"):
        bb.load(spoilt, bits=2)
    (spoilt / "bits-1.safetensors").unlink()
    with pytest.raises(BellboxError, match=r"bits-1\.safetensors"):
        bb.load(spoilt, bits=1)
    seal(spoilt, lambda section: section["files"].pop("bits-1.safetensors"))
    with pytest.raises(BellboxError, match=r"lists no bits-1\.safetensors"):
        bb.load(spoilt, bits=1)


PLANE, SCALE = "model.layers.0.mlp.up_proj.weight_plane_2", "model.layers.0.mlp.up_proj.weight_scale_2"
DOWN = "model.layers.0.mlp.down_proj.weight_plane_2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(PLANE), rf"tensor '{PLANE}' is missing"),
        (lambda t: t.update(more=torch.zeros(1)), "tensor 'more' is of no layer at this width"),
        (lambda t: t.update({PLANE: t[PLANE][:-1]}), r"uint8 \(48, 4\) is needed"),
        (lambda t: t.update({PLANE: t[PLANE].float()}), r"uint8 \(48, 4\) is needed"),
        (lambda t: t[SCALE].fill_(torch.nan), f"tensor '{SCALE}' holds NaN or infinity"),
    ],
)
def test_what_does_not_fit_in_a_file_of_a_width_is_refused(spoilt: Path, change: Any, said: str):
    change_tensors(spoilt, "bits-2.safetensors", change)
    with pytest.raises(BellboxError, match=said):
        bb.load(spoilt, bits=2)


def test_bits_beyond_the_end_of_a_row_are_refused(tmp_path: Path):
    model = bb.prepare(nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 4)), bb.Recipe.bbq(nested=(2, 1)))
    model(torch.randn(3, 12))
    bb.save(bb.convert(model.eval()), tmp_path / "m")
    change_tensors(tmp_path / "m", "bits-2.safetensors", lambda t: t["0.weight_plane_2"][0, -1].fill_(255))
    with pytest.raises(BellboxError, match="bits beyond the ends of its rows"):
        bb.load(tmp_path / "m", into=nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 4)))


def first_layer(section: dict[str, Any]) -> dict[str, Any]:
    return section["layers"]["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: first_layer(s)["nested"].update(widths=[4, 2, 3, 1]), "the widest first"),
        (lambda s: first_layer(s)["nested"].update(widths=[4]), "nested"),
        (lambda s: first_layer(s)["nested"].update(widths=[9, 4]), "nested"),
        (lambda s: first_layer(s)["nested"].update(widths=[3, 2, 1]), "its widest width of 3 bits has 8"),
        (lambda s: first_layer(s)["weight"].update(zero_point=0.0), "of several widths it is a half-integer"),
        (lambda s: first_layer(s).pop("nested"), "nested"),
        (lambda s: first_layer(s)["nested"].update(more=1), "nested"),
        (
            lambda s: first_layer(s)["activation"].update(thresholds=[i / 8 for i in range(-7, 8)]),
            "need gaussian thresholds",
        ),
        (lambda s: s.update(version=4), "files"),
        (lambda s: s["files"].update({"bits-9.safetensors": {"bytes": 1, "sha256": ""}}), "files"),
    ],
)
def test_a_configuration_that_does_not_nest_is_refused(spoilt: Path, change: Any, said: str):
    seal(spoilt, change)
    with pytest.raises(BellboxError, match=said) as raised:
        bb.load(spoilt)
    assert "\n" not in str(raised.value)


def test_a_width_that_is_not_there_gets_one_line(original: Path, model: nn.Module, tmp_path: Path):
    with pytest.raises(
        BellboxError, match="no width of 5 bits in this folder; it can be read at 4, 3, 2, 1 bits"
    ):
        bb.load(original, bits=5)
    bb.save(bb.load(original, bits=1), tmp_path / "one")
    with pytest.raises(BellboxError, match="no width of 2 bits in this folder; its layers have one width"):
        bb.load(tmp_path / "one", bits=2)
    with pytest.raises(BellboxError, match="it has 4, 3, 2, 1"):
        bb.set_bits(model, 5)
    with pytest.raises(BellboxError, match=r"bb.load\(folder, bits=2\)"):
        bb.set_bits(bb.load(original), 2)


def test_other_readers_say_how_to_export_one_width(original: Path):
    with pytest.raises(BellboxError, match="bellbox export hf"):
        io.read_stored(original, io.read_config(original))


def test_fused_experts_nest_too(tmp_path: Path):
    from test_experts_format import ROWS, Mixture

    model = bb.prepare(Mixture(), bb.Recipe.bbq(nested=(3, 1), keep_ends=False))
    model(ROWS)
    bb.save(bb.convert(model.eval()), tmp_path / "m")
    for bits in (3, 1):
        bb.set_bits(model, bits)
        assert torch.equal(bb.load(tmp_path / "m", into=Mixture(), bits=bits)(ROWS), model(ROWS))
