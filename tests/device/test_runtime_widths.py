"""Folders of several widths in libbellbox: each width gives Python's text and logits, from the files that it needs."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from built_runtime import PROMPT, Library, choices, needs_runtime, packed, packed_vision, run, seal
from safetensors.torch import load_file, save_file

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.inference.generation import generate_text
from bellbox.models import ResNetConfig

pytestmark = needs_runtime

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("tiny", {"nested": (4, 3, 2, 1)}),
    ("tiny", {"nested": (3, 1), "embedding_bits": 4}),
    ("gpt-tiny", {"nested": (4, 2), "activation_levels": 4, "embedding_bits": 8}),
    ("gpt-tiny", {"nested": (2, 1), "activation": "gelu_erf"}),
]


@pytest.mark.parametrize(("name", "recipe"), KINDS)
def test_each_width_writes_the_text_of_python(
    tmp_path: Path, tokenizer: Path, name: str, recipe: dict[str, Any]
) -> None:
    folder = packed(tmp_path / "m", tokenizer, name, **recipe)
    for bits in (None, *recipe["nested"]):
        model, words = bb.load(folder, bits=bits), Tokenizer.load(folder)
        stop = words.backend.token_to_id("<|endoftext|>")
        stream = generate_text(model, words.backend, PROMPT, 40, temperature=1.0, seed=3, stop_token=stop)
        chosen = () if bits is None else ("--bits", bits)
        found = run(folder, "--prompt", PROMPT, "--max-new-tokens", 40, "--seed", 3, *chosen)
        assert found.returncode == 0, found.stderr
        assert found.stdout == PROMPT + "".join(stream) + "\n", bits
    for bits in sorted(recipe["nested"], reverse=True)[:-1]:  # who reads fewer bits needs no file of more
        (folder / f"bits-{bits}.safetensors").unlink()
        found = run(folder, "--prompt", PROMPT, "--bits", min(recipe["nested"]), "--max-new-tokens", 2)
        assert found.returncode == 0, found.stderr
        found = run(folder, "--prompt", PROMPT)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1)
        assert "safetensors: cannot be read" in found.stderr


def test_logits_and_the_widths_through_the_c_interface(tmp_path: Path, tokenizer: Path) -> None:
    folder = packed(tmp_path / "m", tokenizer, "tiny", nested=(4, 2, 1))
    library, ids = Library(), [5, 9, 77, 12]
    for wanted, used in ((0, 4), (4, 4), (2, 2), (1, 1)):
        opened = ctypes.c_void_p()
        library.call("bellbox_open_with", str(folder).encode(), choices(wanted), ctypes.byref(opened))
        widths, count, at = (ctypes.c_int * 2)(), ctypes.c_size_t(), ctypes.c_int()
        library.call(
            "bellbox_widths", opened, widths, ctypes.c_size_t(2), ctypes.byref(count), ctypes.byref(at)
        )
        assert (list(widths), count.value, at.value) == ([4, 2], 3, used)
        with torch.no_grad():
            expected = bb.load(folder, bits=used)(torch.tensor([ids]), last_only=True)[0, 0]
        assert torch.equal(library.logits(opened, [ids], len(expected))[0], expected)
        library.c.bellbox_close(opened)
    opened = ctypes.c_void_p()
    for wanted, said in (
        (3, "no width of 3 bits in this folder; it can be read at 4, 2, 1 bits"),
        (-1, "a width of -1"),
    ):
        assert (
            library.c.bellbox_open_with(
                str(folder).encode(), choices(wanted), ctypes.byref(opened), library.error
            )
            == 2
        )
        assert said in library.error.value.decode()


def test_images_at_each_width(tmp_path: Path) -> None:
    config, image = ResNetConfig(5, width=8, stages=2), torch.rand(3, 20, 20)
    packed_vision(tmp_path / "m", config, {"nested": (3, 2)})
    pixels, library = image.permute(1, 2, 0).contiguous(), Library()
    for bits in (3, 2):
        with torch.no_grad():
            expected = bb.load(tmp_path / "m", bits=bits)(image[None])[0]
        opened, found, side = ctypes.c_void_p(), torch.empty(5), ctypes.c_int64(20)
        library.call("bellbox_open_with", str(tmp_path / "m").encode(), choices(bits), ctypes.byref(opened))
        place = ctypes.c_void_p(found.data_ptr())
        library.call(
            "bellbox_classify", opened, ctypes.c_void_p(pixels.data_ptr()), side, side, ctypes.c_int(1), place
        )
        assert torch.equal(found, expected)
        library.c.bellbox_close(opened)


# --- what is refused ---


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return packed(tmp_path_factory.mktemp("nested") / "m", tokenizer, "tiny", nested=(4, 2, 1))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    seal(folder)


def change_tensors(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: value.clone() for name, value in load_file(folder / file).items()}
    change(tensors)
    save_file(tensors, folder / file)
    seal(folder)


def refused(folder: Path, said: str, *flags: object) -> None:
    """By one line, and by Python too."""
    found = run(folder, "--prompt", "x", "--max-new-tokens", 1, *flags)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    assert said in found.stderr
    bits = int(str(flags[1])) if flags else None
    with pytest.raises(BellboxError):
        bb.load(folder, bits=bits)


LAYER = "model.layers.0.self_attn.q_proj"


def first(section: dict[str, Any]) -> dict[str, Any]:
    return section["layers"][LAYER]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: first(s)["nested"].update(widths=[4, 1, 2]), "the widest first"),
        (lambda s: first(s)["nested"].update(widths=[4, 4, 1]), "the widest first"),
        (lambda s: first(s)["nested"].update(widths=[4]), "two to seven"),
        (lambda s: first(s)["nested"].update(widths=[9, 4]), "from 1 to 7"),
        (lambda s: first(s)["nested"].update(widths=[4, 0]), "from 1 to 7"),
        (lambda s: first(s)["nested"].update(widths=[4, 2.0, 1]), "from 1 to 7"),
        (lambda s: first(s)["nested"].update(widths=[3, 2, 1]), "not those of the widest width"),
        (lambda s: first(s)["nested"].update(inputs=1), "must be true or false"),
        (lambda s: first(s)["nested"].update(more=1), "'more': is unknown"),
        (lambda s: first(s).update(nested=[]), "is no object"),
        (lambda s: first(s).pop("nested"), "'nested': is missing"),
        (lambda s: first(s)["weight"].update(zero_point=0.0), "must be a half-integer"),
        (lambda s: first(s)["activation"].update(zero_point=1.0), "must be a half-integer"),
        (lambda s: first(s)["activation"].update(levels=4), "not those of the widest width"),
        (
            lambda s: first(s)["activation"].update(thresholds=[i / 8 for i in range(-7, 8)]),
            "must be gaussian",
        ),
        (lambda s: s.update(version=4), "is unknown"),
        (lambda s: s.update(version=6), "is unknown"),
        (lambda s: s.pop("experts"), "'experts': is missing"),
        (lambda s: s["files"].pop("bits-2.safetensors"), "names no bits-2.safetensors"),
    ],
)
def test_a_configuration_that_does_not_nest(original: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "m"))
    change_config(folder, change)
    refused(folder, said)


def test_a_file_of_another_name(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "m"))
    shutil.copyfile(folder / "bits-2.safetensors", folder / "bits-9.safetensors")
    change_config(
        folder, lambda section: section["files"].update({"bits-9.safetensors": {"bytes": 1, "sha256": ""}})
    )
    refused(folder, "names 'bits-9.safetensors'")


PLANE, SCALE = f"{LAYER}.weight_plane_2", f"{LAYER}.weight_scale_2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(PLANE), "is missing"),
        (lambda t: t.update(more=torch.zeros(1)), "'more' is of nothing in the model"),
        (lambda t: t.update({PLANE: t[PLANE][:-1]}), "has another shape or type"),
        (lambda t: t.update({PLANE: t[PLANE].float()}), "has another shape or type"),
        (lambda t: t.update({f"{LAYER}.weight_plane_1": t[PLANE].clone()}), "is of nothing in the model"),
        (lambda t: t[SCALE].fill_(torch.nan), "holds NaN or infinity"),
        (lambda t: t.update({SCALE: t[SCALE].double()}), "has another shape or type"),
        (lambda t: t.pop(f"{LAYER}.act_scale_2"), "is missing"),
    ],
)
def test_a_file_of_a_width_that_does_not_fit(original: Path, tmp_path: Path, change: Any, said: str) -> None:
    """Refused at that width and wider ones; narrower ones have no need of it."""
    folder = Path(shutil.copytree(original, tmp_path / "m"))
    change_tensors(folder, "bits-2.safetensors", change)
    refused(folder, said, "--bits", 2)
    refused(folder, said)
    found = run(folder, "--prompt", "x", "--bits", 1, "--max-new-tokens", 1)
    assert found.returncode == 0, found.stderr


def test_codes_that_stand_in_the_common_file_too(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "m"))
    change_tensors(folder, "model.safetensors", lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(64)}))
    refused(folder, "is of nothing in the model")


def test_a_damaged_file_is_seen_where_it_is_read(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "m"))
    file = folder / "bits-2.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refused(folder, "bits-2.safetensors: damaged", "--bits", 2)
    found = run(folder, "--prompt", "x", "--bits", 1, "--max-new-tokens", 1)
    assert found.returncode == 0, found.stderr


def test_a_width_that_is_not_there(original: Path, tmp_path: Path, tokenizer: Path) -> None:
    refused(original, "no width of 3 bits in this folder; it can be read at 4, 2, 1 bits", "--bits", 3)
    one = packed(tmp_path / "one", tokenizer, "tiny", bits=2)
    refused(one, "no width of 2 bits in this folder; its layers have one width", "--bits", 2)
    for value, said in (("0", "at least 1"), ("two", "a whole number"), (str(2**32 + 2), "at most")):
        found = run(original, "--prompt", "x", "--bits", value)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1)
        assert said in found.stderr


def test_bits_beyond_the_end_of_a_row(tmp_path: Path, tokenizer: Path) -> None:
    """Rows of 36 inputs have four bits to spare."""
    config = ResNetConfig(5, num_channels=1, width=4, stages=1)
    packed_vision(tmp_path / "m", config, {"nested": (2, 1)})
    name = "stages.0.0.first.conv.weight_plane_2"
    change_tensors(tmp_path / "m", "bits-2.safetensors", lambda t: t[name][0, -1].fill_(255))
    library, opened = Library(), ctypes.c_void_p()
    path = str(tmp_path / "m").encode()
    assert library.c.bellbox_open(path, ctypes.byref(opened), library.error) == 2
    assert "has bits beyond the ends of its rows" in library.error.value.decode()
    library.call("bellbox_open_with", path, choices(1), ctypes.byref(opened))
    library.c.bellbox_close(opened)
