"""Sequences that are decoded together: each gets what it gets alone, to the last bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.inference.batching import Batcher, Continuation, generate_batch
from bellbox.inference.decoding import steps_for
from bellbox.inference.generation import PROMPT_PIECE, evaluate, generate, prompt_pieces
from bellbox.inference.sampling import Sampling
from bellbox.inference.slots import SlotDecoder
from bellbox.models import build, preset
from bellbox.ops import native

needs_kernels = pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
VOCABULARY = 96
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"name": "tiny", "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    # Whole vectors do not make up a row, nor a head.
    "odd llama": {"name": "tiny", "hidden_size": 60, "num_attention_heads": 3, "intermediate_size": 100},
    "gpt": {"name": "gpt-tiny", "num_attention_heads": 4, "intermediate_size": 256},
    "odd gpt": {"name": "gpt-tiny", "hidden_size": 60, "num_attention_heads": 2, "intermediate_size": 90},
    "opt": {"name": "gpt-tiny", "num_attention_heads": 2, "activation": "relu"},
}


def model_of(shape: str, recipe: bb.Recipe | None = None, embeddings: Any = "fp32", **overrides: Any) -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 600, **SHAPES[shape]}
    model = build(preset(sizes.pop("name"), vocab_size=VOCABULARY, **{**sizes, **overrides}), seed=0)
    model = bb.prepare(model, recipe or bb.Recipe.bbq(2)).eval()
    bb.calibrate(model, [torch.arange(64).view(4, 16)])
    return bb.convert(model, embeddings)


def alone(model: Any, prompt: list[int], tokens: list[int], precision: Any) -> list[Tensor]:
    """Logits after the prompt and after each token but the last, as `generate` computes them."""
    cache = model.new_cache(1, len(prompt) + len(tokens), precision)
    steps = steps_for(model, cache)
    with torch.no_grad():
        found = [evaluate(model, piece, cache)[:, -1] for piece in prompt_pieces(torch.tensor([prompt]))][-1:]
        for token in tokens[:-1]:
            ids = torch.tensor([[token]])
            found.append((steps.step(ids) if steps is not None else evaluate(model, ids, cache))[:, -1])
    return found


def together(
    model: Any,
    prompts: list[list[int]],
    texts: list[list[int]],
    precision: Any,
    slots: int,
    chance: random.Random,
) -> list[list[Tensor]]:
    """The same with random neighbours, arrivals and departures; some leave early, some slots were used before."""
    decoder = SlotDecoder(model, slots, max(map(len, prompts)) + max(map(len, texts)), precision)
    waiting, running = list(range(len(prompts))), {}
    found: list[list[Tensor]] = [[] for _ in prompts]
    chance.shuffle(waiting)
    while waiting or running:
        while waiting and decoder.free and chance.random() < 0.6:
            each, slot = waiting.pop(), decoder.free.pop()
            for piece in prompt_pieces(torch.tensor([prompts[each]])):
                logits = decoder.prefill(slot, piece)
            found[each].append(logits)
            running[each] = slot
        for each in [each for each in running if len(found[each]) == len(texts[each])]:
            decoder.release(running.pop(each))
        order = [each for each in running if chance.random() < 0.9]  # who is left out goes on as before
        chance.shuffle(order)
        if order:
            tokens = [texts[each][len(found[each]) - 1] for each in order]
            rows = decoder.step([running[each] for each in order], tokens)
            for each, row in zip(order, rows.split(1), strict=True):
                found[each].append(row)
    return found


def compare(model: Any, precision: Any = "fp32", slots: int = 5, seed: int = 0) -> None:
    chance = random.Random(seed)
    prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 20))] for _ in range(9)]
    texts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 12))] for _ in prompts]
    for each, logits in enumerate(together(model, prompts, texts, precision, slots, chance)):
        expected = alone(model, prompts[each], texts[each], precision)
        assert len(logits) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True)), each


@needs_kernels
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("shape", list(SHAPES))
def test_logits_are_those_of_the_sequence_alone(isa: str, shape: str) -> None:
    model = model_of(shape)
    assert SlotDecoder(model, 2, 8).is_joint
    with native.use(isa):
        compare(model)


@needs_kernels
@pytest.mark.parametrize("shape", ["llama", "odd gpt"])
@pytest.mark.parametrize("embeddings", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_with_every_head_and_cache(shape: str, embeddings: str, precision: str) -> None:
    if embeddings == "int4" and shape == "odd gpt":
        embeddings = "fp32"
    compare(model_of(shape, embeddings=embeddings), precision)


@needs_kernels
@pytest.mark.parametrize(
    ("recipe", "joint"),
    [
        (bb.Recipe.bbq(1), True),
        (bb.Recipe.bbq(levels=3), True),
        (bb.Recipe.of("quest", 4), True),
        (bb.Recipe.of("lsq", 2), True),
        (bb.Recipe.bbq(2, embedding_bits=4), True),
        (bb.Recipe.cewt(2), False),
        (bb.Recipe.of("kmeans", 4, weight_only="float"), False),
        (bb.Recipe.bbq(2, keep=("*.layers.0.mlp.*",)), False),
    ],
)
def test_with_other_methods_and_widths(recipe: bb.Recipe, joint: bool) -> None:
    model = model_of("llama", recipe)
    assert SlotDecoder(model, 2, 8).is_joint == joint
    compare(model)


@needs_kernels
def test_many_rows_and_two_threads() -> None:
    """Rows that would be shared between threads, in torch and in the kernels."""
    model = model_of(
        "llama", hidden_size=512, intermediate_size=1344, num_attention_heads=8, num_key_value_heads=8
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compare(model, slots=16)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", ["llama", "gpt"])
def test_a_model_without_a_joint_step_gives_the_same_one_by_one(shape: str) -> None:
    sizes = {**SHAPES[shape], "hidden_size": 64, "num_hidden_layers": 1}
    model = build(preset(sizes.pop("name"), vocab_size=VOCABULARY, **sizes), seed=0).eval()
    assert not SlotDecoder(model, 2, 8).is_joint
    compare(model)


def test_generate_batch_is_generate_of_each() -> None:
    model = model_of("llama", embeddings="int8")
    chance = random.Random(3)
    prompts = [[chance.randrange(VOCABULARY) for _ in range(n)] for n in (3, 1, PROMPT_PIECE + 40, 7, 20, 2)]
    settings = {"temperature": 0.9, "top_k": 30, "top_p": 0.95}
    found = generate_batch(model, prompts, 15, **settings, seeds=range(6), stop_token=7, slots=3)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        assert found[i] == [int(t) for t in generate(model, ids, 15, **settings, seed=i, stop_token=7)]
    assert any(each[-1] == 7 for each in found) or all(len(each) == 15 for each in found)
    assert generate_batch(model, [], 3) == []


def test_a_long_prompt_lets_others_go_on() -> None:
    """A round takes one piece of it, and those who are being decoded get their token."""
    model = model_of("llama")
    batcher = Batcher(SlotDecoder(model, 2, 600))
    short, long = (
        Continuation([1, 2], Sampling(20, 0.0)),
        Continuation([3] * (2 * PROMPT_PIECE + 10), Sampling(5, 0.0)),
    )
    batcher.add(short)
    batcher.advance()
    batcher.add(long)
    made = []
    while not long.new_ids:
        before = len(short.new_ids)
        batcher.advance()
        made.append(len(short.new_ids) - before)
    assert made == [1, 1, 1]


def test_a_removed_one_frees_its_slot_at_once() -> None:
    batcher = Batcher(SlotDecoder(model_of("llama"), 1, 600))
    first, second = Continuation([1] * 500, Sampling(5)), Continuation([2], Sampling(3, 0.0))
    batcher.add(first)
    with pytest.raises(BellboxError, match="all 1 slots are taken"):
        batcher.add(second)
    batcher.advance()
    batcher.remove(first)
    batcher.remove(first)
    batcher.add(second)
    while not second.finished:
        assert batcher.advance() == [second]
    assert (len(batcher), batcher.room) == (0, 1)


def test_numbers_that_are_not_finite_end_one_text_alone() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    bad, good = Continuation([5], Sampling(4, 0.0)), Continuation([6], Sampling(4, 0.0))
    batcher = Batcher(SlotDecoder(model, 2, 8))
    for each in (bad, good):
        batcher.add(each)
    while len(batcher):
        batcher.advance()
    assert bad.error is not None
    assert "not finite" in str(bad.error)
    assert good.new_ids == [int(t) for t in generate(model, torch.tensor([[6]]), 4, 0.0)]


def test_what_cannot_be_decoded_is_refused() -> None:
    model = model_of("llama")
    decoder = SlotDecoder(model, 2, 10)
    with pytest.raises(BellboxError, match="a prompt of 6 and 5 new tokens are more than the 10"):
        Batcher(decoder).add(Continuation([1] * 6, Sampling(5)))
    with pytest.raises(BellboxError, match=r"token 96, but the model's vocabulary is 0\.\.95"):
        Batcher(decoder).add(Continuation([96], Sampling(5)))
    with pytest.raises(BellboxError, match="holds token -1"):
        Batcher(decoder).add(Continuation([-1], Sampling(5)))
    with pytest.raises(BellboxError, match="the prompt is empty"):
        Continuation([], Sampling(5))
    with pytest.raises(BellboxError, match="each may come once"):
        decoder.step([0, 0], [1, 1])
    with pytest.raises(BellboxError, match="2 seeds for 1 prompts"):
        generate_batch(model, [[1]], 2, seeds=[1, 2])
    with pytest.raises(BellboxError, match="a Linear is none of the models"):
        SlotDecoder(torch.nn.Linear(2, 2), 1, 8)
    slot = decoder.free.pop()
    for token in range(10):
        decoder.prefill(slot, torch.tensor([[token]]))
    with pytest.raises(BellboxError, match="cache is full"):
        decoder.step([slot], [1])
