"""Scaled rotary positions in GGUF files, against transformers' own frequencies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bellbox as bb
from bellbox.models import LlamaConfig, build, save_hf

gguf = pytest.importorskip("gguf")

from bellbox.interop.gguf import export_gguf  # noqa: E402
from bellbox.interop.gguf.rope import read_rope  # noqa: E402


def blocks(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


# llama.cpp issue 24820: factors were dropped where the configuration used the newer key.
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)], "factor": 2.0,
                 "long_factor": [2.0 + 0.5 * i for i in range(8)], "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_positions(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **size, num_attention_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_theta": 5000.0, **ROPES[kind]},
    )  # fmt: skip
    model = bb.prepare(transformers.LlamaForCausalLM(config), bb.Recipe.of("bbq", 4, block=1)).eval()
    path = export_gguf(model, tmp_path / "m.gguf").path
    fields, found = gguf.GGUFReader(path).fields, blocks(path)
    assert fields["llama.rope.freq_base"].contents() == 5000.0
    rotary = model.model.rotary_emb
    plain = 1 / 5000.0 ** (np.arange(0, 16, 2) / 16)
    if kind == "linear":
        assert fields["llama.rope.scaling.type"].contents() == "linear"
        assert fields["llama.rope.scaling.factor"].contents() == 4.0
    elif kind == "llama3":  # transformers' own frequencies
        assert np.allclose(plain / found["rope_freqs.weight"].data, rotary.inv_freq, rtol=1e-6)
        assert "llama.rope.scaling.type" not in fields
    else:
        assert fields["llama.rope.scaling.type"].contents() == "longrope"
        assert fields["llama.rope.scaling.original_context_length"].contents() == 32
        assert np.isclose(fields["llama.rope.scaling.attn_factor"].contents(), rotary.attention_scaling)
        assert np.allclose(plain / found["rope_factors_short.weight"].data, rotary.inv_freq, rtol=1e-6)
        assert np.allclose(found["rope_factors_long.weight"].data, ROPES[kind]["long_factor"])
    older = {"rope_theta": 5000.0, "rope_scaling": {**ROPES[kind], "type": kind}}
    newer = {"rope_parameters": {"rope_theta": 5000.0, **ROPES[kind]}}
    a, b = read_rope(older, 16, 64), read_rope(newer, 16, 64)
    assert (a.theta, a.kind, a.numbers) == (b.theta, b.kind, b.numbers)
    assert all(np.array_equal(a.tensors[name], b.tensors[name]) for name in a.tensors | b.tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "the kind 'yarn' are not written"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "the kind 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": "linear"}, "not an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "different"),
        ({"rope_parameters": {**ROPES["longrope"], "long_factor": [1.0]}}, "list of 8 numbers"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "a part of each head"),
    ],
)  # fmt: skip
def test_rotary_positions_that_cannot_be_written(config: dict[str, Any], message: str) -> None:
    with pytest.raises(bb.BellboxError, match=message):
        read_rope(config, 16, 64)


def test_a_folder_with_scaled_rotary_positions_is_refused_where_it_is_opened(tmp_path: Path) -> None:
    save_hf(build(LlamaConfig(64, 32, 64, 1, 2), seed=0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = ROPES["llama3"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(bb.BellboxError, match="only plain rotary positions are"):
        bb.models.load_hf(tmp_path)
