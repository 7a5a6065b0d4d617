from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.inference.decoding import steps_for
from bellbox.inference.generation import generate
from bellbox.models import build, preset
from bellbox.ops import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")


def packed(recipe: bb.Recipe | None = None, name: str = "tiny", embeddings="fp32", **overrides):
    config = preset(
        name, vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **overrides
    )
    model = bb.prepare(build(config, seed=0), recipe or bb.Recipe.bbq(2)).eval()
    with torch.no_grad():
        model(torch.randint(0, 96, (2, 16)))
    return bb.convert(model, embeddings)


SHAPES = {
    "llama": {"name": "tiny", "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt": {"name": "gpt-tiny", "num_attention_heads": 4},
    "opt": {"name": "gpt-tiny", "num_attention_heads": 2, "activation": "relu"},
}


def step_beside_the_layers(model: Any, ids: Tensor, caches: list[Any]) -> Any:
    """A prompt of five tokens, then the short steps over one cache and the layers over the other: the same bits."""
    for cache in caches:
        model(ids[:, :5], cache=cache)
    steps = steps_for(model, caches[0])
    assert steps is not None
    for i in range(5, ids.shape[1]):
        token = ids[:, i : i + 1]
        assert torch.equal(steps.step(token), model(token, cache=caches[1], last_only=True))
    for a, b in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
        assert torch.equal(a, b)
    return steps


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize(
    ("shape", "bits"), [("llama", 1), ("llama", 2), ("llama", 3), ("llama", 4), ("gpt", 2), ("opt", 4)]
)
def test_steps_are_the_layers_to_the_last_bit(isa: str, shape: str, bits: int) -> None:
    model = packed(bb.Recipe.bbq(bits), **SHAPES[shape])
    ids = torch.randint(0, 96, (3, 30), generator=torch.Generator().manual_seed(bits))
    with native.use(isa), torch.no_grad():
        caches = [model.new_cache(3, 30) for _ in range(2)]
        steps = step_beside_the_layers(model, ids, caches)
    assert caches[0].length == 30
    with pytest.raises(BellboxError, match="cache is full"):
        steps.step(ids[:, :1])


@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_generation_takes_them_and_writes_the_same(name: str) -> None:
    model = packed(name=name, embeddings="int8")
    prompt = torch.randint(0, 96, (2, 4))
    short = torch.stack(list(generate(model, prompt, 20, seed=1)))
    handle = model.register_forward_hook(lambda *_: None)
    assert steps_for(model, model.new_cache(2, 8)) is None
    assert torch.equal(torch.stack(list(generate(model, prompt, 20, seed=1))), short)
    handle.remove()


def test_other_models_keep_to_their_layers() -> None:
    def served(model) -> bool:
        return steps_for(model, model.new_cache(1, 8)) is not None

    assert served(packed(embeddings="bf16"))
    assert not served(build(preset("tiny")))
    assert served(packed(name="gpt-tiny"))
    assert not served(packed(bb.Recipe.bbq(2, keep=("*.h.1.mlp.*",)), name="gpt-tiny"))
    alone = packed(bb.Recipe.bbq(2, share_inputs=False))
    assert served(alone)  # inputs are coded alike, number for number
    alone.model.layers[0].self_attn.v_proj.act_thresholds.mul_(0.5)
    assert not served(alone)
    static = packed(bb.Recipe.bbq(2, share_inputs=False, granularity="ema"))
    static.model.layers[0].self_attn.v_proj.act_rstd.mul_(3)
    assert not served(static)
    assert not served(packed(bb.Recipe.bbq(2, keep=("*.layers.0.mlp.*",))))
    exact = packed()
    exact.exact_attention = True
    assert not served(exact)
    assert steps_for(packed(), object()) is None
    half, position = packed(), packed(name="gpt-tiny")
    half.model.embed_tokens.to(torch.bfloat16)
    position.transformer.wpe.to(torch.float16)
    assert not served(half)
    assert not served(position)
    with torch.autocast("cpu", torch.bfloat16):
        assert not served(packed())


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_steps_over_a_coded_cache_are_the_layers_to_the_last_bit(isa: str, precision, shape: str) -> None:
    model = packed(**SHAPES[shape])
    ids = torch.randint(0, 96, (3, 30), generator=torch.Generator().manual_seed(1))
    with native.use(isa), torch.no_grad():
        caches = [model.new_cache(3, 30, precision) for _ in range(2)]
        step_beside_the_layers(model, ids, caches)
    for layer in range(2):
        for a, b in zip(caches[0].layer(layer)[2:4], caches[1].layer(layer)[2:4], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_a_coded_cache_is_one_causal_function(name: str, precision) -> None:
    """With exact attention: whole, in pieces, token by token, and whatever follows or stands beside."""
    model = packed(name=name)
    model.exact_attention = True
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[:, 15:] = 95 - other[:, 15:]
    with torch.no_grad():
        first, changed, alone, pieces = (model.new_cache(batch, 24, precision) for batch in (2, 2, 1, 2))
        whole = model(ids, cache=first)
        ends = model(other, cache=changed)[:, :15], model(ids[1:], cache=alone)
        at, parts = 0, []
        for tokens in (7, 1, 5, 1, 1, 9):
            parts.append(model(ids[:, at : at + tokens], cache=pieces))
            at += tokens
        # Every code of the cache, and with it every scale; torch's head alone sums by the number of rows.
        for layer in range(2):
            for i in range(4):
                held, of_changed, of_alone, of_pieces = (
                    c.layer(layer)[i] for c in (first, changed, alone, pieces)
                )
                assert torch.equal(of_changed[:, :, :15], held[:, :, :15])
                assert not torch.equal(of_changed, held)
                assert torch.equal(of_alone, held[1:])
                assert torch.equal(of_pieces, held)
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-6)
        assert torch.allclose(ends[0], whole[:, :15], atol=1e-6)
        assert torch.allclose(ends[1], whole[1:], atol=1e-6)
        # It rounds: int8 little, 4 bits more; not at all would be another cache.
        plain = model(ids)
        change = float((whole - plain).norm() / plain.norm())
        assert 1e-4 < change < {"int8": 0.1, "int4": 0.6}[precision]


def test_generation_over_a_coded_cache() -> None:
    model = packed(embeddings="int8")
    prompt = torch.randint(0, 96, (2, 4))
    texts = {}
    for precision in ("fp32", "int8", "int4"):
        short = torch.stack(list(generate(model, prompt, 20, seed=1, kv_cache=precision)))
        handle = model.register_forward_hook(lambda *_: None)  # by its layers
        assert torch.equal(torch.stack(list(generate(model, prompt, 20, seed=1, kv_cache=precision))), short)
        handle.remove()
        texts[precision] = short
    assert torch.equal(texts["fp32"], torch.stack(list(generate(model, prompt, 20, seed=1))))
    with pytest.raises(BellboxError, match="a KV cache in 'fp8': it must be fp32, int8 or int4"):
        generate(model, prompt, 2, kv_cache="fp8")  # pyright: ignore[reportArgumentType]

    class Other(torch.nn.Module):
        def new_cache(self, batch: int, max_length: int) -> None: ...

    with pytest.raises(BellboxError, match="kv_cache is int4; a Other has a cache of its own"):
        generate(Other(), prompt, 2, kv_cache="int4")
