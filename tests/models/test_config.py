from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bellbox.errors import BellboxError
from bellbox.models import (
    PRESETS,
    VISION_PRESETS,
    GPTConfig,
    LlamaConfig,
    any_config_from_dict,
    build,
    config_from_dict,
    preset,
    vision_preset,
)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_survives_json(name):
    config = preset(name)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["architecture"] == ("gpt" if name.startswith("gpt") else "llama")


def test_the_papers_presets_are_its_table():
    table = {  # arXiv 2603.01599, the LLaMA models of its experiments
        "95M": (6, 640, 5, 1792),
        "125M": (7, 768, 6, 2048),
        "200M": (8, 1024, 8, 2816),
        "300M": (10, 1280, 10, 3584),
    }
    for name, shape in table.items():
        config = preset(name)
        assert isinstance(config, LlamaConfig)
        assert shape == (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
        )
        assert (config.head_size, config.max_position_embeddings, config.vocab_size) == (128, 512, 50304)
        assert not config.tie_word_embeddings


def test_the_papers_presets_have_the_parameters_of_its_runs():
    for name, millions in (("95M", 94.9), ("125M", 126.8), ("200M", 205.8), ("300M", 332.0)):
        for fused in (False, True):  # one matrix or three
            with torch.device("meta"):
                model = build(preset(name, fused_qkv=fused))
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    gpt = preset("gpt-95M")
    assert (gpt.activation, gpt.bias, gpt.vocab_size) == ("gelu_erf", False, 50304)  # type: ignore[union-attr]
    with torch.device("meta"):
        assert not [name for name, _ in build(gpt).named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize("name", list(VISION_PRESETS))
def test_a_vision_preset_survives_json_and_says_no_more_than_it_did(name):
    config = vision_preset(name)
    values = json.loads(json.dumps(config.to_dict()))
    assert any_config_from_dict(values) == config
    later = {"stem_kernel", "max_pool", "class_token", "fused_qkv"} & set(values)
    assert bool(later) == (name.startswith("deit") or name in ("resnet-10", "resnet-18"))


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 1.2e6, 1.8e6), ("small", 2.5e6, 3.5e6)])
def test_the_blocks_of_the_small_presets_have_the_promised_size(name, low, high):
    with torch.device("meta"):
        model = build(preset(name))
    blocks = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    assert low < blocks < high


def test_overrides_replace_fields_and_derived_sizes_follow():
    config = preset("tiny", vocab_size=123, hidden_size=512)
    assert (config.vocab_size, config.head_size, config.key_value_heads) == (123, 128, 4)
    assert dataclasses.replace(config, hidden_size=128).head_size == 32


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"architecture": "mamba"}, "llama, gpt"),
        ({}, "architecture"),
        ({"architecture": ["llama"]}, "architecture"),
        ({"architecture": "llama", "hidden": 3}, "'hidden'"),
        ({"architecture": "llama", "hidden_size": 100, "num_attention_heads": 3}, "num_attention_heads 3"),
        ({"architecture": "gpt", "hidden_size": 100, "num_attention_heads": 3}, "num_attention_heads 3"),
        ({"architecture": "llama", "hidden_size": 9, "num_attention_heads": 3}, "even"),
        ({"architecture": "llama", "num_key_value_heads": 2}, "num_key_value_heads 2"),
        ({"architecture": "llama", "vocab_size": 0}, "vocab_size is 0"),
        ({"architecture": "llama", "vocab_size": True}, "vocab_size is True"),
        ({"architecture": "llama", "hidden_size": "640"}, "hidden_size is '640'"),
        ({"architecture": "llama", "hidden_size": None}, "hidden_size is None"),
        ({"architecture": "llama", "rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"architecture": "llama", "rope_theta": 0}, "rope_theta"),
        ({"architecture": "llama", "head_dim": 256, "max_position_embeddings": 2**20}, "rotary positions"),
        ({"architecture": "gpt", "tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"architecture": "gpt", "rope_theta": 1.0}, "'rope_theta'"),
        ({"architecture": "resnet", "stem_kernel": 4}, "stem_kernel is 4; it must be odd"),
        ({"architecture": "resnet", "stem_kernel": 99}, "stem_kernel is 99"),
        ({"architecture": "resnet", "max_pool": 1}, "max_pool is 1"),
        ({"architecture": "vit", "class_token": "yes"}, "class_token is 'yes'"),
    ],
)
def test_the_impossible_is_refused_with_one_line(values, says):
    with pytest.raises(BellboxError) as caught:
        (any_config_from_dict if values.get("architecture") in ("resnet", "vit") else config_from_dict)(
            values
        )
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_presets_and_fields_are_refused_by_name():
    with pytest.raises(BellboxError, match="'huge'; there are: tiny"):
        preset("huge")
    with pytest.raises(BellboxError, match="'vocab'"):
        preset("tiny", vocab=3)


def test_a_seed_fixes_the_weights_and_leaves_the_global_state_alone():
    config = preset("gpt-tiny", vocab_size=16, hidden_size=32, intermediate_size=32)
    assert isinstance(config, GPTConfig)
    before = torch.random.get_rng_state()
    first, again, other = build(config, seed=1), build(config, seed=1), build(config, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
