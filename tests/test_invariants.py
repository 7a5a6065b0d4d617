"""The promises that hold over the whole way, each on both architectures: one function, causal, saved exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.models import GPT, GPTConfig, Llama, LlamaConfig, build
from bellbox.nn import PackedLinear, QuantizedLinear

CONFIGS = {
    "llama": LlamaConfig(61, 48, 80, 2, 4, 2, max_position_embeddings=40, initializer_range=0.3),
    "gpt": GPTConfig(61, 48, 80, 2, 4, max_position_embeddings=40, initializer_range=0.3),
}
LEVELS = (2, 3, 4, 8, 16)  # 1 to 4 bits and ternary
TOKENS = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(5))


def prepared(architecture: str, n: int, granularity: str) -> Llama | GPT:
    model = build(CONFIGS[architecture], seed=n)
    with torch.no_grad():  # norms and biases that do something
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    model.exact_attention = True
    bb.prepare(model, bb.Recipe.bbq(levels=n, granularity=granularity))  # type: ignore[arg-type]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        model(torch.randint(0, 61, (2, 16), generator=generator)).logsumexp(-1).sum().backward()
    with torch.no_grad():  # as if trained: every scale its own
        for name, p in model.named_parameters():
            if name.endswith("gamma"):
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def input_codes(layer: QuantizedLinear | PackedLinear, x: Tensor) -> Tensor:
    """Codes of a layer's input, computed by what the layer itself holds."""
    if isinstance(layer, PackedLinear):
        return layer.input_codes(x).reshape(x.shape)
    assert layer.activation_quantizer is not None
    return layer.activation_quantizer.quantizer.codes(x)


@torch.no_grad()
def run(model: nn.Module, tokens: Tensor, **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the codes of every low-bit layer's input by the layer's name."""
    codes: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, PackedLinear)):

            def record(module: nn.Module, arguments: tuple[Tensor], name: str = name) -> None:
                codes[name] = input_codes(module, arguments[0])  # type: ignore[arg-type]

            handles.append(module.register_forward_pre_hook(record))
    try:
        return model(tokens, **options), codes
    finally:
        for handle in handles:
            handle.remove()


def assert_same_codes(ours: dict[str, Tensor], theirs: dict[str, Tensor], part: object = ...) -> None:
    assert ours.keys() == theirs.keys()
    for name, codes in ours.items():
        assert torch.equal(codes, theirs[name][part]), name  # type: ignore[index]


every_model = pytest.mark.parametrize("architecture", list(CONFIGS))
every_number = pytest.mark.parametrize("n", LEVELS)
every_granularity = pytest.mark.parametrize("granularity", ["token", "ema"])


@every_model
@every_number
@every_granularity
def test_one_function_trained_packed_saved_and_loaded(architecture, n, granularity, tmp_path):
    model = prepared(architecture, n, granularity)
    logits, codes = run(model, TOKENS)
    assert len(codes) == (14 if architecture == "llama" else 12)
    assert all(int(c.max()) == n - 1 and int(c.min()) == 0 for c in codes.values())
    packed = bb.convert(model)
    bb.save(packed, tmp_path / "model")
    loaded = bb.load(tmp_path / "model")
    loaded.exact_attention = True  # type: ignore[assignment]
    into = bb.load(tmp_path / "model", into=build(CONFIGS[architecture], seed=99))
    into.exact_attention = True
    for other in (packed, loaded, into):
        other_logits, other_codes = run(other, TOKENS)
        assert_same_codes(codes, other_codes)
        assert torch.equal(other_logits, logits)
        for name, layer in model.named_modules():
            if isinstance(layer, QuantizedLinear):
                twin = other.get_submodule(name)
                assert isinstance(twin, PackedLinear)
                assert torch.equal(twin.weight_codes(), layer.weight_codes())


@every_model
@every_granularity
def test_one_function_under_autocast(architecture, granularity):
    model = prepared(architecture, 4, granularity)
    with torch.autocast("cpu", torch.bfloat16):
        logits, codes = run(model, TOKENS)
        other_logits, other_codes = run(bb.convert(model), TOKENS)
    assert_same_codes(codes, other_codes)
    assert torch.equal(other_logits, logits)


@every_model
@every_number
@every_granularity
def test_causal_a_prefix_does_not_know_what_follows(architecture, n, granularity):
    model = bb.convert(prepared(architecture, n, granularity))
    logits, codes = run(model, TOKENS)
    changed = TOKENS.clone()
    changed[:, 10:] = (changed[:, 10:] + 7) % 61
    for tokens in (TOKENS[:, :10], changed):
        other_logits, other_codes = run(model, tokens)
        for name, values in other_codes.items():
            assert torch.equal(values[:, :10], codes[name][:, :10]), name
        torch.testing.assert_close(other_logits[:, :10], logits[:, :10], rtol=1e-5, atol=1e-5)


@every_model
@every_number
@every_granularity
def test_a_sequence_does_not_know_its_batch(architecture, n, granularity):
    model = prepared(architecture, n, granularity)
    _, codes = run(model, TOKENS)
    for i in range(len(TOKENS)):
        _, alone = run(model, TOKENS[i : i + 1])
        assert_same_codes(alone, codes, slice(i, i + 1))


@every_model
@every_number
@every_granularity
def test_decoding_with_the_cache_is_the_full_forward(architecture, n, granularity):
    model = bb.convert(prepared(architecture, n, granularity))
    tokens = TOKENS[:2, :14]
    logits, codes = run(model, tokens)
    cache = model.new_cache(2, 14)
    position = 0
    for step in (5, 1, 1, 3, 1, 1, 1, 1):
        part = slice(position, position + step)
        step_logits, step_codes = run(model, tokens[:, part], cache=cache)
        assert_same_codes(step_codes, codes, (slice(None), part))
        torch.testing.assert_close(step_logits, logits[:, part], rtol=1e-5, atol=1e-5)
        position += step
    assert position == tokens.shape[1]


@every_model
@every_granularity
def test_saving_what_was_loaded_gives_the_same_bytes(architecture, granularity, tmp_path):
    bb.save(bb.convert(prepared(architecture, 3, granularity)), tmp_path / "one")
    bb.save(bb.load(tmp_path / "one"), tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@every_model
def test_the_paper_statistic_looks_at_the_future_and_is_refused(architecture):
    model = prepared(architecture, 4, "tensor")
    loud = TOKENS.clone()
    _, codes = run(model, TOKENS)
    loud[:, 12:] = 0
    _, changed = run(model, loud)
    assert any(not torch.equal(codes[name][:, :12], changed[name][:, :12]) for name in codes)
    with pytest.raises(bb.BellboxError, match="granularity='token' or 'ema'"):
        bb.convert(model)


@every_model
def test_the_state_dict_is_the_whole_state(architecture):
    model = prepared(architecture, 4, "ema")
    other = build(CONFIGS[architecture], seed=77)
    bb.prepare(other, bb.Recipe.bbq(2, granularity="ema")).eval()
    other.exact_attention = True
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, TOKENS)[0], run(model, TOKENS)[0])
    assert torch.equal(run(bb.convert(other), TOKENS)[0], run(model, TOKENS)[0])


@every_model
def test_two_threads_or_one_the_codes_are_the_same(architecture):
    model = bb.convert(prepared(architecture, 16, "token"))
    _, codes = run(model, TOKENS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert_same_codes(run(model, TOKENS)[1], codes)
    finally:
        torch.set_num_threads(threads)
