"""The tensor that keeps plain models from loading a folder of codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bellbox as bb
from bellbox.formats.description import seal
from bellbox.formats.guard import guard, guards_in
from bellbox.models import LlamaConfig, build
from bellbox.utils.files import describe_file, read_json, write_text

NAME = "model.layers.0.self_attn.o_proj.weight"


def packed_llama() -> nn.Module:
    model = bb.prepare(
        build(LlamaConfig(13, 16, 24, 1, 2, 1, max_position_embeddings=8), seed=0), bb.Recipe.bbq(2)
    )
    with torch.no_grad():
        model(torch.arange(7)[None])
    return bb.convert(model)


def test_it_stands_in_the_place_of_a_weight_that_both_have() -> None:
    assert list(guard(["a.q_proj", "a.k_proj", "a.o_proj"])) == ["a.o_proj.weight"]  # a GPT-2 has no q_proj
    assert list(guard(["a.q_proj"])) == ["a.q_proj.weight"]
    assert list(guard(["m.experts.up_proj.0"], ["m.experts.up_proj"])) == ["m.experts.up_proj"]
    assert list(guard(["m.experts.up_proj.0", "a.fc"], ["m.experts.up_proj"])) == ["a.fc.weight"]
    assert guard([""]) == {}


def test_only_an_empty_tensor_of_bytes_in_such_a_place_is_one() -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    experts = {"m": {"projections": ["up_proj"]}}
    tensors = {"a.weight": empty, "b.weight": empty, "c.weight": torch.zeros(2), "m.up_proj": empty}
    assert guards_in(tensors, ["a", "c"], experts) == {"a.weight", "m.up_proj"}
    assert guards_in({"a.weight": torch.empty(0)}, ["a"], {}) == set()


def test_a_folder_has_one_and_load_passes_over_it(tmp_path: Path) -> None:
    model = packed_llama()
    bb.save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert [name for name, value in tensors.items() if not value.numel()] == [NAME]
    again = bb.load(tmp_path / "m")
    assert not [name for name, value in again.state_dict().items() if not value.numel()]
    assert again.load_state_dict(tensors) == torch.nn.modules.module._IncompatibleKeys([], [])
    ids = torch.arange(7)[None]
    assert torch.equal(again(ids), model(ids))
    bb.save(again, tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_a_folder_without_one_loads_as_before_and_an_odd_one_is_refused(tmp_path: Path) -> None:
    """Folders of former versions have none."""
    model = packed_llama()
    bb.save(model, tmp_path)
    tensors, ids = load_file(tmp_path / "model.safetensors"), torch.arange(7)[None]

    def rewrite(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, tmp_path / "model.safetensors")
        config = read_json(tmp_path / "config.json")
        config["quantization_config"]["files"] = {
            "model.safetensors": describe_file(tmp_path / "model.safetensors")
        }
        config["quantization_config"]["sha256"] = seal(config)

        write_text(tmp_path / "config.json", json.dumps(config))

    rewrite({name: value for name, value in tensors.items() if name != NAME})
    assert torch.equal(bb.load(tmp_path)(ids), model(ids))
    rewrite(tensors | {NAME: torch.zeros(3)})
    with pytest.raises(bb.BellboxError, match="is not in the model"):
        bb.load(tmp_path)


def test_what_transformers_has_no_class_for_has_none(tmp_path: Path) -> None:
    model = bb.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), bb.Recipe.bbq(2, keep=()))
    with torch.no_grad():
        model(torch.randn(4, 8))
    bb.save(bb.convert(model), tmp_path)
    assert all(value.numel() for value in load_file(tmp_path / "model.safetensors").values())
