from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize(
    ("shape", "bits"), [("llama", 1), ("llama", 2), ("llama", 3), ("llama", 4), ("gpt", 2), ("opt", 4)]
)
def test_steps_are_the_layers_to_the_last_bit(isa: str, shape: str, bits: int) -> None:
    model = packed(bb.Recipe.bbq(bits), **SHAPES[shape])
    ids = torch.randint(0, 96, (3, 30), generator=torch.Generator().manual_seed(bits))
    with native.use(isa), torch.no_grad():
        caches = [model.new_cache(3, 30) for _ in range(2)]
        for cache in caches:
            model(ids[:, :5], cache=cache)
        steps = steps_for(model, caches[0])
        assert steps is not None
        for i in range(5, 30):
            token = ids[:, i : i + 1]
            assert torch.equal(steps.step(token), model(token, cache=caches[1], last_only=True))
    assert caches[0].length == 30
    for a, b in zip(caches[0].keys + caches[0].values, caches[1].keys + caches[1].values, strict=True):
        assert torch.equal(a, b)
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
