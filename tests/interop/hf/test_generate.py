"""Generation of a packed model by transformers: Bellbox's tokens, by the short loop and by the ordinary one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hf_models import IDS, bellbox_greedy, greedy, logits
from torch import Tensor

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
