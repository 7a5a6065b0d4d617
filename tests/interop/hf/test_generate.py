"""Generation of a packed model by transformers: Bellbox's tokens, by the short loop and by the ordinary one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import IDS, bellbox_greedy, greedy, logits, packed_model
from torch import Tensor

import bellbox as bb
from bellbox.models import LlamaConfig

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_gives_bellboxs_tokens(cache, ours, theirs) -> None:
    for ids in (IDS[:, :7], IDS[:1, :1], IDS):
        found = greedy(theirs, ids, 20, cache_implementation=cache)
        assert torch.equal(found, bellbox_greedy(ours, ids, 20))


@pytest.fixture
def ordinary(theirs, monkeypatch) -> list[int]:
    """How often transformers' own loop was asked."""
    from transformers import GenerationMixin

    asked: list[int] = []
    own = GenerationMixin._sample

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_sample", counted)
    return asked


def slow(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` by transformers' own loop: a hook is reason enough for that."""
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    try:
        return model.generate(*args, pad_token_id=0, **kwargs)
    finally:
        handle.remove()


@pytest.mark.parametrize("cache", [None, "static"])
def test_the_short_loop_is_taken_and_gives_what_the_ordinary_one_gives(cache, theirs, ordinary) -> None:
    for more in (
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.7},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "eos_token_id": 5, "min_new_tokens": 4},
        {"do_sample": False, "eos_token_id": list(range(0, 97, 3))},
    ):
        asked = {"max_new_tokens": 20, "cache_implementation": cache, **more}
        torch.manual_seed(1)
        fast = theirs.generate(IDS[:, :6], pad_token_id=0, **asked)
        assert ordinary == []
        torch.manual_seed(1)
        assert torch.equal(fast, slow(theirs, IDS[:, :6], **asked)), more
        assert ordinary.pop()


@pytest.mark.parametrize(
    "name",
    [
        "GPT2LMHeadModel", "OPTForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "Phi3ForCausalLM",
    ],
)  # fmt: skip
def test_other_families_with_a_short_loop(name, ordinary, transformers, tmp_path) -> None:
    """Trained and packed in transformers, whose norms the fused step rounds otherwise."""
    import zoo_models

    from bellbox.interop.transformers import save_transformers

    about = next(m for m in zoo_models.TRANSFORMERS if m.name == name)
    if name == "MistralForCausalLM":
        about = zoo_models.hf(name, "lm_head", sliding_window=None, **zoo_models.DECODER)
    model = bb.prepare(
        about.build(), bb.Recipe.of("lsq", 4, share_inputs=True)
    )  # coarse steps, far thresholds
    with torch.no_grad():
        model(IDS)
    save_transformers(model, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert bb.backend_report(loaded).splitlines()[-1].split() == ["generate", "fused", "steps"]
    for cache in (None, "static"):
        asked = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
        fast = loaded.generate(IDS[:, :6], pad_token_id=0, **asked)
        assert ordinary == []
        handle = loaded.get_input_embeddings().register_forward_hook(lambda *_: None)
        assert torch.equal(fast, loaded.generate(IDS[:, :6], pad_token_id=0, **asked))
        assert ordinary.pop()
        handle.remove()
    if (
        name == "GPT2LMHeadModel"
    ):  # whose q, k and v are split for the step, and made anew where a tensor changes
        loaded.transformer.h[0].attn.c_attn.weight_scale[64:].mul_(3.0)
        changed = loaded.generate(IDS[:, :6], pad_token_id=0, **asked)
        assert ordinary == []
        assert not torch.equal(fast, changed)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Gemma2ForCausalLM", "Gemma2ForCausalLM has no fused step"),
        ("MistralForCausalLM", "such as a sliding window"),
        ("MixtralForCausalLM", "MixtralForCausalLM has no fused step"),
    ],
)
def test_the_report_says_why_a_family_has_none(name, says, ordinary, transformers, tmp_path) -> None:
    import zoo_models

    from bellbox.interop.transformers import save_transformers

    about = next(m for m in zoo_models.TRANSFORMERS if m.name == name)
    model = bb.prepare(about.build(), bb.Recipe.bbq(2))
    with torch.no_grad():
        model(IDS)
    save_transformers(model, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    last = bb.backend_report(loaded).splitlines()[-1]
    assert last.startswith("generate ")
    assert "transformers' own loop" in last
    assert says in last
    loaded.generate(IDS[:, :6], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ordinary == [1]


@pytest.mark.parametrize(
    "shape",
    [(101, 24, 36, 1, 3, 1), (97, 40, 56, 3, 2, 2), (300, 96, 100, 2, 6, 2)],
    ids=["24", "40", "96"],
)
def test_odd_shapes(shape, transformers, tmp_path) -> None:
    from bellbox.interop.transformers.export import export_packed

    model = packed_model(LlamaConfig(*shape, max_position_embeddings=40))
    export_packed(model, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.inference_mode():
        found = greedy(loaded, IDS[:, :5], 30, cache_implementation="static")
    assert torch.equal(found, bellbox_greedy(model, IDS[:, :5], 30))


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_cache_holds_what_was_read(kind, theirs, ordinary, transformers) -> None:
    def fresh() -> Any:
        if kind == "static":
            return transformers.StaticCache(config=theirs.config, max_cache_len=32)
        return transformers.DynamicCache(config=theirs.config)

    fast, plain = fresh(), fresh()
    asked = {"max_new_tokens": 9, "do_sample": False}
    found = theirs.generate(IDS[:, :6], past_key_values=fast, pad_token_id=0, **asked)
    assert ordinary == []
    assert torch.equal(found, slow(theirs, IDS[:, :6], past_key_values=plain, **asked))
    assert int(fast.get_seq_length()) == int(plain.get_seq_length()) == 14
    for one, other in zip(fast.layers, plain.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-5)
    again = theirs.generate(found, past_key_values=fast, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again, theirs.generate(IDS[:, :6], max_new_tokens=13, do_sample=False, pad_token_id=0))


def test_a_streamer_gets_every_token_and_the_end(theirs, ordinary) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.seen += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ended += 1

    streamer = Streamer()
    found = theirs.generate(IDS[:1, :6], max_new_tokens=7, do_sample=False, pad_token_id=0, streamer=streamer)
    assert (streamer.seen, streamer.ended, ordinary) == (found[0].tolist(), 1, [])


def test_what_asks_for_more_goes_the_ordinary_way(theirs, ordinary) -> None:
    ids = IDS[:, :6]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for more in (
        {"attention_mask": mask},
        {"return_dict_in_generate": True, "output_scores": True},
        {"use_cache": False},
        {"max_time": 60.0},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ):
        theirs.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, **more)
        assert ordinary.pop(), more
    theirs.to(torch.bfloat16).generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert ordinary.pop()


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padding_changes_no_row(cache, ours, theirs) -> None:
    prompts = [IDS[0, :3].tolist(), IDS[1, :9].tolist()]
    ids = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    found = greedy(theirs, ids, 10, attention_mask=mask, cache_implementation=cache)
    for row, prompt in zip(found, prompts, strict=True):
        assert torch.equal(row, bellbox_greedy(ours, torch.tensor([prompt]), 10)[0])


def test_a_copy_generates_and_is_its_own(theirs) -> None:
    before = greedy(theirs, IDS[:, :6])
    copied = copy.deepcopy(theirs)
    assert torch.equal(greedy(copied, IDS[:, :6]), before)
    copied.model.layers[0].self_attn.o_proj.weight_scale.zero_()
    assert torch.equal(greedy(theirs, IDS[:, :6]), before)
    assert not torch.equal(logits(copied), logits(theirs))
