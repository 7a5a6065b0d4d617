"""What LLaMA and GPT have in common: causality, the cache, sharing, initialisation, precision."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from bellbox.errors import BellboxError
from bellbox.models import GPTConfig, LlamaConfig, build
from bellbox.models.attention import causal_attention, erf_gelu, gated, tanh_gelu
from bellbox.models.cache import KVCache
from bellbox.models.hf_names import to_hf

VOCABULARY, CONTEXT = 61, 48
CONFIGS = {
    "llama": LlamaConfig(VOCABULARY, 48, 100, 3, 4, max_position_embeddings=CONTEXT, initializer_range=0.2),
    "grouped": LlamaConfig(VOCABULARY, 48, 76, 2, 4, 2, 20, CONTEXT, initializer_range=0.2),
    "gpt": GPTConfig(VOCABULARY, 48, 100, 2, 4, max_position_embeddings=CONTEXT, initializer_range=0.2),
    "fused": LlamaConfig(
        VOCABULARY, 48, 100, 2, 4, max_position_embeddings=CONTEXT, initializer_range=0.2, fused_qkv=True
    ),
    "paper gpt": GPTConfig(
        VOCABULARY,
        48,
        100,
        2,
        4,
        CONTEXT,
        initializer_range=0.2,
        activation="gelu_erf",
        fused_qkv=True,
        bias=False,
    ),
}
BOTH_WAYS = pytest.mark.parametrize("exact", [False, True], ids=["fused", "exact"])


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return build(CONFIGS[request.param], seed=3).eval()


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@BOTH_WAYS
@torch.no_grad()
def test_later_tokens_and_other_sequences_do_not_change_a_prefix(model, exact):
    model.exact_attention = exact
    text = ids(3, 40)
    full = model(text)
    changed = text.clone()
    changed[0, 17:] = ids(1, 23, seed=9)
    changed[1:] = ids(2, 40, seed=10)
    torch.testing.assert_close(model(changed)[0, :17], full[0, :17], atol=1e-5, rtol=1e-5)
    for length in (1, 5, 16, 33):
        torch.testing.assert_close(model(text[:1, :length])[0], full[0, :length], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(changed)[0, 20:], full[0, 20:], atol=1e-2)


def test_exact_attention_gives_the_same_bits_for_any_length_and_batch():
    generator = torch.Generator().manual_seed(5)
    shape = (3, 4, 190, 24)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    full = causal_attention(query, key, value, exact=True)
    for length in (1, 2, 7, 31, 64, 65, 129, 189):
        head = [tensor[1:2, :, :length] for tensor in (query, key, value)]
        assert torch.equal(causal_attention(*head, exact=True), full[1:2, :, :length])
        last = (head[0][:, :, -1:], head[1], head[2])
        assert torch.equal(causal_attention(*last, exact=True), full[1:2, :, length - 1 : length])


def test_exact_attention_agrees_with_the_fused_one():
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(2, 6, 9, 16, generator=generator)
    key, value = (torch.randn(2, 2, 21, 16, generator=generator) for _ in range(2))
    exact = causal_attention(query, key, value, exact=True)
    torch.testing.assert_close(causal_attention(query, key, value, exact=False), exact, atol=1e-6, rtol=1e-5)
    assert exact.dtype == torch.float32


@BOTH_WAYS
@pytest.mark.parametrize("pieces", [[1] * 30, [13, 1, 1, 9, 6], [30]], ids=["one by one", "chunks", "whole"])
@torch.no_grad()
def test_decoding_with_the_cache_is_the_full_forward(model, pieces, exact):
    model.exact_attention = exact
    text = ids(2, 30)
    cache = model.new_cache(2, 30)
    parts = [model(piece, cache=cache) for piece in text.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(text), atol=1e-5, rtol=1e-5)
    assert cache.length == 30


@torch.no_grad()
def test_last_only_is_the_last_row(model):
    text = ids(2, 11)
    last = model(text, last_only=True)
    assert last.shape == (2, 1, VOCABULARY)
    torch.testing.assert_close(last, model(text)[:, -1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_can_be_used_again_and_refuses_what_does_not_fit(model):
    cache = model.new_cache(1, 8)
    first = model(ids(1, 8), cache=cache)
    with pytest.raises(BellboxError, match=r"holds 8 of 8 tokens and 1 more"):
        model(ids(1, 1), cache=cache)
    cache.reset()
    with pytest.raises(BellboxError, match="batch of 1, not of 2"):
        model(ids(2, 1), cache=cache)
    torch.testing.assert_close(model(ids(1, 8), cache=cache), first)
    assert cache.nbytes == sum(2 * keys.nbytes for keys in cache.keys)
    with pytest.raises(BellboxError, match=f"context of {CONTEXT}"):
        model.new_cache(1, CONTEXT + 1)
    with pytest.raises(BellboxError, match=f"{CONTEXT + 1} tokens exceed the model's context of {CONTEXT}"):
        model(ids(1, CONTEXT + 1))


def test_an_empty_cache_is_refused():
    with pytest.raises(BellboxError, match="0 x 4"):
        KVCache(1, 0, 1, 4, 2)


def test_siblings_read_the_same_tensor_object(model):
    seen: dict[str, int] = {}
    kept = []  # the tensors stay alive, so an id cannot be taken over by another

    def note(name):
        def hook(module, inputs):
            seen[name] = id(inputs[0])
            kept.append(inputs[0])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    model(ids(1, 4))
    groups = 0
    for name, tensor in seen.items():
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if name.endswith(first):
                groups += 1
                assert all(seen[name.replace(first, other)] == tensor for other in others)
    expected = {"Llama": 2, "GPT": 1}[type(model).__name__] - model.config.fused_qkv
    assert groups == expected * model.config.num_hidden_layers


def test_initial_weights_follow_the_recipe():
    for name, config in (
        ("o_proj down_proj", LlamaConfig(512, 256, 640, 8, 4)),
        ("c_proj", GPTConfig(512, 256, 640, 8, 4)),
    ):
        model = build(config, seed=0)
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                output = path.rsplit(".", 1)[-1] in name.split()
                assert module.weight.std().item() == pytest.approx(0.02 / 4 if output else 0.02, rel=0.02)
                if getattr(module, "bias", None) is not None:
                    assert not module.bias.any()


def test_every_parameter_gets_a_gradient(model):
    logits = model.train()(ids(2, 12))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids(2, 12, seed=1).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_autocast_keeps_the_residual_in_fp32_and_what_linears_read_in_bf16(model):
    inputs = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    text = ids(2, 12)
    with torch.no_grad():
        reference = model(text)
        inputs.clear()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(text)
    assert set(inputs) == {torch.bfloat16}
    assert logits.dtype == torch.bfloat16
    assert reference.dtype == torch.float32
    assert (logits.float() - reference).abs().max() < 0.06 * reference.abs().max()


@torch.no_grad()
def test_float64_is_a_reference_for_fp32(model):
    text = ids(2, 30)
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(model(text).double(), wide(text), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tied_heads_are_one_parameter():
    for config in (
        LlamaConfig(VOCABULARY, 32, 32, 1, 2, tie_word_embeddings=True),
        GPTConfig(VOCABULARY, 32, 32, 1, 2, tie_word_embeddings=True),
    ):
        model = build(config, seed=0)
        assert model.lm_head.weight is model.get_parameter(next(n for n, _ in model.named_parameters()))
        assert model(ids(1, 3)).shape == (1, 3, VOCABULARY)


def test_torch_compile_takes_the_model_in_one_graph(model):
    text = ids(2, 12)
    torch._dynamo.reset()  # what earlier tests of this process compiled counts towards its limit
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(text), model(text))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(text), model(text))


class CodedLinear(nn.Module):
    """Stands in for a low-bit layer: its input is cut at thresholds, its sums are exact in any order."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.std().item()
        self.levels = 2 * (linear.weight.detach() / self.scale).round().clamp(-2, 1) + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rms = x.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)
        v = x * (1 / rms).float()
        codes = (v[..., None] >= torch.tensor([-0.67449, 0.0, 0.67449])).sum(-1)
        return ((2 * codes - 3).float() @ self.levels.t()) * (0.4 * self.scale)


@pytest.mark.parametrize(
    "config",
    [  # wide and long enough that GPT's codes do differ without it; odd widths leave loops a remainder
        LlamaConfig(VOCABULARY, 64, 172, 3, 4, 2, max_position_embeddings=150, initializer_range=0.2),
        GPTConfig(VOCABULARY, 64, 172, 3, 4, max_position_embeddings=150, initializer_range=0.2),
    ],
    ids=["llama", "gpt"],
)
@torch.no_grad()
def test_low_bit_logits_of_a_prefix_are_bit_identical_with_exact_attention(config):
    model = build(config, seed=2).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, CodedLinear(module))
    model.exact_attention = True
    text = ids(3, 150)
    full = model(text)
    for length in (1, 3, 17, 64, 100):
        for row in range(3):
            assert torch.equal(model(text[row : row + 1, :length])[0], full[row, :length])
    cache = model.new_cache(3, 150)
    pieces = text.split([50, *[1] * 8, 92], dim=1)
    assert torch.equal(torch.cat([model(piece, cache=cache) for piece in pieces], dim=1), full)


def silu(x, *, exact):
    return gated(x, torch.ones_like(x), exact=exact)


@pytest.mark.parametrize("function", [silu, tanh_gelu])
def test_exact_activations_are_the_function_and_do_not_depend_on_the_place_in_memory(function):
    x = torch.randn(200, 37, generator=torch.Generator().manual_seed(0)) * 3
    full = function(x, exact=True)
    torch.testing.assert_close(function(x, exact=False), full, atol=1e-6, rtol=1e-5)
    for row in range(200):
        assert torch.equal(function(x[row : row + 1].clone(), exact=True), full[row : row + 1])
    assert function(torch.tensor([-300.0, 0.0, 300.0]), exact=True).tolist() == [0.0, 0.0, 300.0]


def test_the_exact_gelu_is_that_of_float64():
    x = torch.linspace(-12, 12, 4001)
    wide = x.double()
    wanted = wide * torch.special.log_ndtr(wide).exp()  # ndtr itself cancels far below zero
    torch.testing.assert_close(erf_gelu(x, exact=True).double(), wanted, atol=0, rtol=1e-6)
    torch.testing.assert_close(erf_gelu(x, exact=False).double(), wanted, atol=2e-6, rtol=1e-5)


def test_one_matrix_for_queries_keys_and_values_is_the_function_of_three():
    fused = build(CONFIGS["fused"], seed=3).eval()
    three = build(dataclasses.replace(CONFIGS["fused"], fused_qkv=False)).eval()
    three.load_state_dict(to_hf(fused.state_dict(), "llama", tied=False))
    torch.testing.assert_close(fused(ids(2, 20)), three(ids(2, 20)))
    with pytest.raises(BellboxError, match="as many key and value heads"):
        dataclasses.replace(CONFIGS["grouped"], fused_qkv=True)
