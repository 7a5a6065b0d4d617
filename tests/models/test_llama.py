from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from bellbox.models import LlamaConfig, build
from bellbox.models.llama import LlamaMLP, RMSNorm, RotaryEmbedding

CONFIG = LlamaConfig(31, 32, 48, 2, 4, 2, max_position_embeddings=64)


def test_module_names_are_those_of_hugging_face():
    names = set(build(CONFIG, seed=0).state_dict())
    layer = {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    }
    expected = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("size", [1, 48, 256, 257])
def test_rms_norm_is_its_formula_and_its_gradient(size):
    norm = RMSNorm(size, 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, size, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(norm, x)
    single = RMSNorm(size, 1e-5)
    single.load_state_dict(norm.state_dict())
    torch.testing.assert_close(single(x.float()), expected.float())


def test_rms_norm_of_a_row_does_not_depend_on_the_number_of_rows():
    for size in (48, 172, 256, 640):
        norm = RMSNorm(size, 1e-5)
        x = torch.randn(301, size)
        full = norm(x)
        for start, count in ((0, 1), (7, 1), (300, 1), (3, 2), (11, 50), (150, 151)):
            assert torch.equal(norm(x[start : start + count]), full[start : start + count])
            assert torch.equal(norm(x[None, start : start + count]), full[None, start : start + count])


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
    norm = RMSNorm(16, 1e-5)
    x = torch.zeros(2, 16, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert not norm(x).any()


def test_forward_mode_derivatives_are_those_of_reverse_mode():
    norm, mlp = RMSNorm(32, 1e-5).double(), LlamaMLP(CONFIG).double()
    for module in (norm, lambda x: mlp(x, False)):
        x, along, back = (torch.randn(2, 32, dtype=torch.float64) for _ in range(3))
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, along))).tangent
        assert tangent is not None
        x.requires_grad_()
        (g,) = torch.autograd.grad(module(x), x, back)
        torch.testing.assert_close((tangent * back).sum(), (g * along).sum())


def test_rms_norm_returns_the_inputs_dtype_or_autocasts():
    norm = RMSNorm(16, 1e-5)
    assert norm(torch.randn(2, 16)).dtype == torch.float32
    assert norm(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(2, 16)).dtype == torch.bfloat16


def test_rotation_keeps_lengths_and_depends_on_the_distance_only():
    rotary = RotaryEmbedding(CONFIG)
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    torch.testing.assert_close(rotary(query, 37).norm(), query.norm())
    torch.testing.assert_close(rotary(query, 0), query)
    near = (rotary(query, 5) * rotary(key, 2)).sum()
    torch.testing.assert_close((rotary(query, 61) * rotary(key, 58)).sum(), near, atol=1e-4, rtol=1e-4)


def test_rotary_tables_stay_fp32_and_survive_moves():
    model = build(CONFIG, seed=0)
    cos = model.model.rotary_emb.cos.clone()
    assert torch.equal(model.bfloat16().model.rotary_emb.cos, cos)
    with torch.device("meta"):
        empty = build(CONFIG)
    assert torch.equal(empty.to_empty(device="cpu").model.rotary_emb.cos, cos)
    assert "rotary" not in " ".join(model.state_dict())
