"""Fused experts: each expert's matrix is the linear layer that it is, from `prepare` to a folder and back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.convert import unprepare
from bellbox.errors import BellboxError
from bellbox.evaluation.codes import agreement
from bellbox.nn import (
    PackedExperts,
    QuantizedExperts,
    QuantizedLinear,
    is_fused_experts,
    quantized_layers,
    weights_quantized_once,
)
from bellbox.optim import parameter_groups
from bellbox.recipe import Recipe

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "moe_intermediate_size": 16},
    # transposed, with biases and a gate of its own
    "GptOss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48,
        "layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
IDS = torch.arange(2, 34).reshape(2, 16)
BBQ = Recipe.bbq(2)
RECIPES = {
    "bbq": BBQ,
    "signs": Recipe.bbq(2, options={"signs": True}),
    "lsq": Recipe.of("lsq", 2),
    "weights only": Recipe.of("nf", 4, weight_only="float"),
    "one projection": Recipe.bbq(2, keep=("*.down_proj",)),
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def plain(transformers: Any, family: str) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(kind.config_class(**SIZES, **FAMILIES[family]))
    with torch.no_grad():  # gpt-oss begins with biases of zero
        for name, p in model.named_parameters():
            if name.endswith("_proj_bias"):
                p.normal_(std=0.1)
    return model


def experts_of(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def trained(model: Any, steps: int = 2) -> Any:
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1))
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("Mixtral", "bbq"), *(("Qwen3Moe", name) for name in RECIPES), *(("GptOss", name) for name in RECIPES)],
)
def test_trained_packed_saved_and_read(transformers: Any, family: str, recipe: str, tmp_path: Path) -> None:
    model = bb.prepare(plain(transformers, family), RECIPES[recipe])
    packed = bb.convert(trained(model))
    expected = logits(model)
    assert torch.equal(logits(packed), expected)
    bb.save(packed, tmp_path / "m")
    for into in (
        plain(transformers, family),
        bb.prepare(plain(transformers, family), RECIPES[recipe]),
        packed,
    ):
        loaded = bb.load(tmp_path / "m", into=into)
        assert torch.equal(logits(loaded), expected)
    experts, before = experts_of(loaded), experts_of(plain(transformers, family))
    assert isinstance(experts, PackedExperts)
    assert isinstance(experts, type(before))
    assert experts.gate_up_proj.shape == before.gate_up_proj.shape
    assert experts.packed_stacks == (
        ["gate_up_proj"] if recipe == "one projection" else ["gate_up_proj", "down_proj"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_is_a_linear_layer(transformers: Any, family: str) -> None:
    """Of its own, prepared by the same recipe, with the expert's matrix and bias."""
    model = bb.prepare(plain(transformers, family), BBQ)
    before, experts = experts_of(plain(transformers, family)), experts_of(model)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    for i in range(4):
        matrix = before.gate_up_proj[i].T if before.is_transposed else before.gate_up_proj[i]
        alone = nn.Linear(*matrix.shape[::-1], bias=before.has_bias)
        state = {"weight": matrix.detach()}
        state |= {"bias": before.gate_up_proj_bias[i].detach()} if before.has_bias else {}
        alone.load_state_dict(state)
        alone = bb.prepare(alone, Recipe.bbq(2, keep_ends=False, weights_rotated=False))
        assert isinstance(alone, QuantizedLinear)
        layer = experts.expert_layers["gate_up_proj"][i]
        assert torch.equal(layer(x), alone(x))
        assert torch.equal(layer.weight_codes(), alone.weight_codes())
        assert torch.equal(layer.eval()(x), alone.eval()(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_over_experts_is_the_owners_forward(transformers: Any, family: str) -> None:
    before = experts_of(plain(transformers, family))
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(4))
    index = torch.stack([torch.randperm(3)[:2] for _ in range(9)])  # the last expert gets nothing
    weights = torch.rand(9, 2)
    made = QuantizedExperts(before, {})  # nothing of it is quantized
    torch.testing.assert_close(made(x, index, weights), before(x, index, weights), rtol=1e-5, atol=1e-6)
    nothing = made(x[:0], index[:0], weights[:0])
    assert nothing.shape == (0, 32)
    beyond = torch.full_like(index, 4)  # as expert parallelism marks what is elsewhere
    assert not made(x, beyond, weights).any()


def test_the_parameters_stay_the_owners(transformers: Any) -> None:
    model = plain(transformers, "Qwen3Moe")
    names, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    stack = experts_of(model).gate_up_proj
    bb.prepare(model, BBQ)
    assert experts_of(model).gate_up_proj is stack
    assert torch.equal(stack, state["model.layers.0.mlp.experts.gate_up_proj"])
    decayed = next(
        group for group in parameter_groups(model, lr=1.0, weight_decay=0.1) if group["weight_decay"]
    )
    assert sum(p is stack for p in decayed["params"]) == 1
    trained(model)
    back = unprepare(copy.deepcopy(model))
    assert list(back.state_dict()) == names
    assert is_fused_experts(experts_of(back))
    again = bb.prepare(plain(transformers, "Qwen3Moe"), BBQ)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again.eval()), logits(model))
    fresh = bb.prepare(plain(transformers, "Qwen3Moe"), BBQ)
    fresh.load_state_dict(state)
    other = bb.prepare(plain(transformers, "Qwen3Moe"), Recipe.bbq(3))
    with pytest.raises(BellboxError, match="is of another recipe"):
        other.load_state_dict(model.state_dict())


def test_transformers_saves_the_plain_model(transformers: Any, tmp_path: Path) -> None:
    model = trained(bb.prepare(plain(transformers, "Qwen3Moe"), BBQ))
    model.save_pretrained(tmp_path)
    read = type(plain(transformers, "Qwen3Moe")).from_pretrained(tmp_path)
    assert torch.equal(experts_of(read).down_proj, experts_of(model).down_proj)
    assert list(read.state_dict()) == list(plain(transformers, "Qwen3Moe").state_dict())


def test_weights_quantized_once_give_the_same_gradients(transformers: Any) -> None:
    model = bb.prepare(plain(transformers, "Qwen3Moe"), BBQ).train()
    model(IDS)
    once, each = copy.deepcopy(model), model
    with weights_quantized_once(once):
        for shift in range(2):
            once(IDS + shift, labels=IDS).loss.backward()
    for shift in range(2):
        each(IDS + shift, labels=IDS).loss.backward()
    for ours, theirs in zip(once.parameters(), each.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_graph_of_packed_experts_gives_the_same_bits(transformers: Any) -> None:
    packed = experts_of(bb.convert(trained(bb.prepare(plain(transformers, "GptOss"), BBQ), 1)))
    x, weights = torch.randn(6, 32), torch.rand(6, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    with torch.no_grad():
        program = torch.export.export(packed, (x, index, weights))
        assert torch.equal(program.module()(x, index, weights), packed(x, index, weights))
        assert torch.equal(program.module()(x, 3 - index, weights), packed(x, 3 - index, weights))


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def test_every_code_of_every_expert_is_the_same_packed(transformers: Any) -> None:
    model = trained(bb.prepare(plain(transformers, "Qwen3Moe"), BBQ), 1)
    found = agreement(Logits(model), Logits(bb.convert(model)), [IDS])
    assert (found.layers, found.mismatches, found.logit_difference) == (2 * (4 + 2 * 4), 0, 0.0)


def test_an_expert_that_no_token_reached_does_not_block_the_rest(transformers: Any) -> None:
    model = bb.prepare(plain(transformers, "Qwen3Moe"), Recipe.of("lsq", 2))
    experts, index = experts_of(model), torch.zeros(16, 2, dtype=torch.int64)
    for layer in model.model.layers:
        layer.mlp.gate.forward = lambda x: (
            None,
            torch.ones(len(x), 2) / 2,
            index.new_tensor([[0, 1]] * len(x)),
        )
    model(IDS)
    assert not experts.expert_layers["down_proj"][3].activation_quantizer.quantizer.is_set
    with pytest.warns(UserWarning, match=r"no data ever reached .*experts\.expert_layers\.gate_up_proj\.2"):
        packed = bb.convert(model.eval())
    assert torch.equal(logits(packed), logits(model))


def test_what_is_quantized_and_left_is_said(transformers: Any, caplog: Any) -> None:
    with warnings.catch_warnings(), caplog.at_level("INFO", "bellbox"):
        warnings.simplefilter("error")
        model = bb.prepare(plain(transformers, "Mixtral"), BBQ)
    line = caplog.records[-1].getMessage()
    assert "87% of the parameters are quantized" in line
    assert "experts" not in line
    text = bb.summary(model)
    assert "model.layers.*.mlp.experts.expert_layers.gate_up_proj.*  96 x 32" in text
    assert "left: model.layers.*.mlp.gate (2), 256 weights (parameters of MixtralTopKRouter)" in text
    packed = bb.summary(bb.convert(trained(model, 1)))
    assert "model.layers.*.mlp.experts.gate_up_proj.*  96 x 32" in packed
    for each in (text, packed):
        assert "parameters: 43,008 quantized" in each


@pytest.mark.parametrize("pattern", ["*.experts", "*.mlp.experts.*", "*.gate_up_proj"])
def test_a_pattern_means_experts_by_module_or_parameter(transformers: Any, pattern: str) -> None:
    model = bb.prepare(plain(transformers, "Mixtral"), Recipe.bbq(2, keep=(pattern,)))
    names = {name.rsplit(".", 2)[-2] for name, layer in quantized_layers(model) if "expert_layers" in name}
    assert names == ({"down_proj"} if pattern == "*.gate_up_proj" else set())


class Other(nn.Module):
    """Experts in 3-D parameters that follow no interface."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.linear = nn.Parameter(torch.randn(4, 32, 64)), nn.Linear(32, 32)


def test_other_experts_are_left_whole_and_named(transformers: Any) -> None:
    with pytest.warns(UserWarning, match=r"experts in one tensor \(Other\)"):
        bb.prepare(Other(), Recipe.bbq(2, keep_ends=False))
    changed = plain(transformers, "Mixtral")
    experts_of(changed).forward = lambda *given: given[0]  # of an instance: not what the flags say
    experts_of(changed)
    with pytest.warns(UserWarning, match=r"layers.0.mlp.experts .*experts in one tensor \(MixtralExperts\)"):
        bb.prepare(changed, BBQ)
    assert type(experts_of(changed)).__name__ == "MixtralExperts"
