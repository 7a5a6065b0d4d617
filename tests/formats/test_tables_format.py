"""Embeddings and heads of 4 bits in a packed folder: what version 6 says of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packed import rewrite, section_of

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.formats.packed import file_bytes, sizes
from bellbox.models import build, preset

IDS = torch.arange(40).view(2, 20)


def model_of(tied: bool = False, bits: Any = 4, group: Any = None, width: int = 64) -> Any:
    config = preset("tiny", vocab_size=96, hidden_size=width, intermediate_size=128, num_hidden_layers=1,
                    num_attention_heads=2, tie_word_embeddings=tied)  # fmt: skip
    recipe = bb.Recipe.bbq(2, embedding_bits=bits, embedding_group=group)
    model = bb.prepare(build(config, seed=0), recipe).eval()
    with torch.no_grad():
        model(IDS)
    return bb.convert(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bb.save(model_of(), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_a_folder_of_version_6(tied: bool, group: Any, tmp_path: Path) -> None:
    packed = model_of(tied, 4, group)
    bb.save(packed, tmp_path / "m")
    section = section_of(tmp_path / "m")
    assert (section["version"], section["experts"]) == (6, {})
    entry = {"bits": 4, "group": group}
    assert section["embeddings"] == {"model.embed_tokens": entry, "lm_head": entry}
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    shapes = {
        name: (list(t.shape), t.dtype)
        for name, t in tensors.items()
        if name.startswith(("lm_head", "model.emb"))
    }
    one = {"weight": ([96, 32], torch.uint8), "multipliers": ([96, 64 // group], torch.uint8),
           "scale": ([96], torch.float32)}  # fmt: skip
    places = ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head")
    assert shapes == {f"{place}.{leaf}": value for place in places for leaf, value in one.items()}
    loaded = bb.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded(IDS), packed(IDS))
    bb.save(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    # A loaded model is a place for another file as a plain one is.
    with torch.no_grad():
        assert torch.equal(bb.load(tmp_path / "m", into=loaded)(IDS), packed(IDS))
    found = sizes(loaded)
    assert found.embeddings == ("int4",)
    assert found.parameters == sum(p.numel() for p in build(packed.config).parameters())
    assert found.packed_bytes + found.other_bytes < file_bytes(tmp_path / "m")


def test_eight_bits_are_version_4_as_before(tmp_path: Path) -> None:
    bb.save(model_of(bits=8), tmp_path / "m")
    section = section_of(tmp_path / "m")
    assert section["version"] == 4
    assert section["embeddings"] == {"model.embed_tokens": "int8", "lm_head": "int8"}


def test_weights_are_bytes_of_the_whole_model_and_no_more(tmp_path: Path) -> None:
    """4 bits and what belongs to them: 4.25 by 32 columns, 4.125 by 64, and 32 a row."""
    for group, bits in ((32, 4.25), (64, 4.125)):
        packed = model_of(group=group, width=256)
        tables = [packed.model.embed_tokens, packed.lm_head]
        stored = sum(b.nbytes for table in tables for b in table.buffers())
        assert 8 * stored == 2 * 96 * (256 * bits + 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(version=4), "field 'experts'|field 'embeddings"),
        (lambda c: c.update(version=5), "field 'e"),
        (lambda c: c.pop("experts"), "field 'experts': Field required"),
        (lambda c: c["embeddings"].update(lm_head={"bits": 3, "group": 64}), "field .embeddings.lm_head"),
        (lambda c: c["embeddings"].update(lm_head={"bits": 4, "group": 16}), "field .embeddings.lm_head"),
        (lambda c: c["embeddings"].update(lm_head={"bits": 4, "group": 1 << 40}), "field .embeddings.lm_head"),
        (lambda c: c["embeddings"].update(lm_head={"bits": 4}), "field .embeddings.lm_head"),
        (lambda c: c["embeddings"].update(lm_head={"bits": 4, "group": 64, "more": 1}), "field .embeddings.lm_head"),
        (lambda c: c["embeddings"].update(lm_head="int4"), "field .embeddings.lm_head"),
        (lambda c: c["embeddings"].update(lm_head="int8"), "lm_head.weight' is torch.uint8"),
        (lambda c: c["embeddings"].update(lm_head={"bits": 4, "group": 32}), "multipliers' is .* needs .*96, 2"),
        (lambda c: c["embeddings"].pop("lm_head"), "lm_head.weight' is torch.uint8"),
        (lambda c: c["embeddings"].update({"model.norm": {"bits": 4, "group": 64}}), "neither an embedding nor a head"),
        (lambda c: c["embeddings"].update({"model.layers.0.mlp": {"bits": 4, "group": 64}}), "neither an embedding"),
        (lambda c: c["model"].update(vocab_size=1 << 40), "model"),
        (lambda c: c["model"].update(vocab_size=97), "weight' is torch.uint8 .*96, 32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder: Path, change: Any, says: str) -> None:
    rewrite(folder, change)
    with pytest.raises(BellboxError, match=says) as error:
        bb.load(folder)
    assert "\n" not in str(error.value)


def test_a_group_that_does_not_divide_is_refused_by_name(folder: Path) -> None:
    holder = torch.nn.ModuleDict({"words": torch.nn.Embedding(9, 96), "fc": torch.nn.Linear(64, 64)})
    made = bb.prepare(holder, bb.Recipe.bbq(2, embedding_bits=4, keep_ends=False))
    with torch.no_grad():
        made["fc"].eval()(torch.randn(2, 64))
    bb.save(bb.convert(made.eval()), folder.parent / "other")
    rewrite(folder.parent / "other", lambda c: c["embeddings"]["words"].update(group=64))
    plain = torch.nn.ModuleDict({"words": torch.nn.Embedding(9, 96), "fc": torch.nn.Linear(64, 64)})
    with pytest.raises(BellboxError, match="embedding 'words': groups of 64 do not divide its 96 columns"):
        bb.load(folder.parent / "other", into=plain)
    assert type(plain["words"]) is torch.nn.Embedding


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.scale"][7] = value
    save_file(tensors, folder / "model.safetensors")
    rewrite(folder, lambda _: None, files=True)
    with pytest.raises(BellboxError, match=r"'lm_head\.scale' holds NaN or infinity"):
        bb.load(folder)


def test_a_file_that_is_cut_short_afterwards_changes_nothing(folder: Path) -> None:
    loaded = bb.load(folder)
    with torch.no_grad():
        expected = loaded(IDS)
        (folder / "model.safetensors").write_bytes(b"")
        assert torch.equal(loaded(IDS), expected)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("lm_head", "bf16"),
        ("lm_head", "int8"),
        ("lm_head", {"bits": 4, "group": 32}),
        ("model.embed_tokens", "int8"),
    ],
)
def test_tied_tables_that_say_different_things_are_refused(name: str, entry: Any, tmp_path: Path) -> None:
    bb.save(model_of(tied=True), tmp_path / "m")
    rewrite(tmp_path / "m", lambda c: c["embeddings"].update({name: entry}))
    with pytest.raises(BellboxError, match="is tied to one that is rounded in another way"):
        bb.load(tmp_path / "m")
