from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import pytest
import torch

from bellbox.errors import BellboxError
from bellbox.inference.generation import TextStream, generate, generate_text
from bellbox.inference.sampling import Sampling, probabilities
from bellbox.models import GPTConfig, LlamaConfig, build, load_hf

SHARED = Path(
    os.environ.get("BELLBOX_SHARED_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data"
)
STORIES = SHARED / "models" / "stories260K_hf"
VOCABULARY = 300
CONFIGS = {
    "llama": LlamaConfig(VOCABULARY, 32, 48, 2, 4, 2, max_position_embeddings=64, initializer_range=0.3),
    "gpt": GPTConfig(VOCABULARY, 32, 48, 2, 4, max_position_embeddings=64, initializer_range=0.3),
}


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return build(CONFIGS[request.param], seed=0).eval()


@pytest.fixture
def llama():
    return build(CONFIGS["llama"], seed=0).eval()


PROMPT = torch.tensor([[5, 17, 101], [250, 3, 3]])


def all_tokens(model, prompt=PROMPT, count=20, **options) -> torch.Tensor:
    return torch.stack(list(generate(model, prompt, count, **options)), dim=1)


@torch.no_grad()
def test_greedy_with_the_cache_is_greedy_by_the_full_forward(model):
    text = PROMPT
    for _ in range(40):
        text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], dim=1)
    made = all_tokens(model, count=40, temperature=0.0)
    assert torch.equal(made, text[:, 3:])
    assert len(set(made[0].tolist())) > 5  # no constant


def test_samples_are_a_function_of_the_seed_and_leave_the_global_state_alone(model):
    state = torch.random.get_rng_state()
    first = all_tokens(model, seed=4)
    assert torch.equal(first, all_tokens(model, seed=4))
    assert not torch.equal(first, all_tokens(model, seed=5))
    assert not torch.equal(all_tokens(model), all_tokens(model))
    assert torch.equal(state, torch.random.get_rng_state())


def test_one_candidate_is_greedy(model):
    greedy = all_tokens(model, temperature=0.0)
    assert torch.equal(all_tokens(model, top_k=1, seed=0), greedy)
    assert torch.equal(all_tokens(model, top_p=1e-9, seed=0), greedy)
    assert torch.equal(all_tokens(model, temperature=1e-300, seed=0), greedy)


def test_supports_of_top_k_and_top_p():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))
    plain = probabilities(logits, Sampling(1, 1.0, None, None))
    torch.testing.assert_close(plain, logits.double().exp(), atol=1e-7, rtol=1e-6)
    two = probabilities(logits, Sampling(1, 1.0, 2, None))
    torch.testing.assert_close(two[0], torch.tensor([0, 4 / 7, 0, 3 / 7]).double(), atol=1e-7, rtol=1e-6)
    assert (two[1] > 0).sum() == 2  # exactly k among ties
    for top_p, kept in ((0.05, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4), (1.0, 4)):
        assert (probabilities(logits, Sampling(1, 1.0, None, top_p))[0] > 0).sum() == kept
    # after top-k, the probabilities that top-p sums are those of the k
    assert (probabilities(logits, Sampling(1, 1.0, 2, 0.5))[0] > 0).tolist() == [False, True, False, False]
    assert torch.equal(
        probabilities(logits, Sampling(1, 1.0, 99, None)), probabilities(logits, Sampling(1, 1.0, None, 1.0))
    )
    torch.testing.assert_close(
        probabilities(logits, Sampling(1, 0.5, None, None))[0],
        torch.tensor([1, 16, 4, 9]).double() / 30,
        atol=1e-7,
        rtol=1e-6,
    )


def test_samples_follow_the_probabilities(llama):
    prompt = PROMPT[:1].expand(4000, 3)
    drawn = next(generate(llama, prompt, 1, temperature=0.7, top_k=5, seed=1))
    with torch.no_grad():
        expected = probabilities(llama(PROMPT[:1])[:, -1], Sampling(1, 0.7, 5, None))[0]
    counts = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    assert set(drawn.tolist()) <= set(expected.nonzero().flatten().tolist())
    torch.testing.assert_close(counts.double(), expected, atol=0.03, rtol=0)


def test_a_stopped_sequence_stays_stopped_and_the_last_one_ends_it(llama):
    plain = all_tokens(llama, temperature=0.0, count=30)
    stop = int(plain[0, 4])
    made = all_tokens(llama, temperature=0.0, count=30, stop_token=stop)
    first = plain[0].tolist().index(stop)
    assert torch.equal(made[0, : first + 1], plain[0, : first + 1])
    assert (made[0, first:] == stop).all()
    alone = all_tokens(llama, PROMPT[:1], temperature=0.0, count=30, stop_token=stop)
    assert alone.shape[1] == first + 1


def test_tokens_stream_and_the_callers_modes_are_left_alone(llama):
    llama.train()
    llama.model.layers[0].eval()
    calls = []
    llama.register_forward_pre_hook(
        lambda module, _: calls.append((module.training, torch.is_grad_enabled()))
    )
    stream = generate(llama, PROMPT, 5, seed=0)
    assert calls == []
    next(stream)
    assert calls == [(False, False)]
    assert llama.training
    assert llama.model.layers[1].mlp.training
    assert not llama.model.layers[0].mlp.training
    assert torch.is_grad_enabled()
    made = next(stream)
    assert not made.is_inference()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        (
            {"max_new_tokens": 62},
            "a prompt of 3 and 62 new tokens: 65 tokens exceed the model's context of 64",
        ),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "the prompt is empty"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"shape \[3\]"),
        ({"input_ids": torch.zeros(1, 3)}, "float32"),
        ({"input_ids": torch.tensor([[1, VOCABULARY]])}, "token 300, but the model's vocabulary is 0..299"),
        ({"input_ids": torch.tensor([[1, -1]])}, "token -1"),
    ],
)
def test_bad_values_are_refused_at_the_call(llama, options, says):
    with pytest.raises(BellboxError, match=says) as caught:
        generate(llama, **{"input_ids": PROMPT, "max_new_tokens": 4, **options})
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_an_error(llama):
    with torch.no_grad():
        llama.lm_head.weight[7] = math.nan
    with pytest.raises(BellboxError, match="new token 1 are not finite"):
        next(generate(llama, PROMPT, 4))


def test_a_model_that_is_not_causal_is_refused(llama):
    bellbox = pytest.importorskip("bellbox.recipe")
    from bellbox.convert import prepare

    prepare(llama, bellbox.Recipe.bbq(bits=2, granularity="tensor"))
    with pytest.raises(BellboxError, match="tensor"):
        generate(llama, PROMPT, 4)


# --- text ---

TEXTS = [
    "The cat sat, and the dog sat too.",
    "naïve café — „Grüße“ 你好, мир! 👩‍👩‍👧 🙂🙂 é",
    "  two  spaces\n\nand lines ",
    "a \N{REPLACEMENT CHARACTER} of one's own",
]


def byte_level():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat and the dog sat and the cat ran to the sea"] * 5, trainer)
    return tokenizer


def byte_fallback():
    """As in LLaMA: words begin with a row_scale that stands for a space; rare characters become byte tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyzT.,"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text_and_never_hold_half_a_character(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert sum(map(bool, pieces)) > len(text) / 3  # streamed, not withheld to the end
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_text_goes_on_after_a_prompt_as_in_one_decoding(make):
    tokenizer = make()
    ids = tokenizer.encode("the cat sat and the dog 你好 ran").ids
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        start = tokenizer.decode(ids[:cut])
        if not start.endswith("\N{REPLACEMENT CHARACTER}"):
            stream = TextStream(tokenizer, prompt=ids[:cut])
            assert start + "".join(map(stream.push, ids[cut:])) + stream.flush() == whole


def test_an_unfinished_character_comes_out_at_the_end():
    tokenizer = byte_level()
    ids = tokenizer.encode("sea 🙂").ids[:-1]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) == "sea "
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.flush() == ""
    assert stream.push(tokenizer.token_to_id("<|endoftext|>")) == ""


def test_generated_text_is_streamed_and_timed(llama):
    tokenizer = byte_level()
    stream = generate_text(llama, tokenizer, "the cat", 40, seed=2)
    first = next(stream)
    assert stream.text == first != ""
    assert stream.prefill_tokens_per_second > 0
    rest = "".join(stream)
    prompt = torch.tensor([tokenizer.encode("the cat").ids])
    assert stream.new_ids == [int(token) for token in generate(llama, prompt, 40, seed=2)]
    assert stream.text == first + rest
    assert stream.decode_tokens_per_second > 0
    whole = tokenizer.decode(stream.prompt_ids + stream.new_ids)
    assert "the cat" + stream.text == whole


def test_the_stop_token_ends_the_text_and_is_no_part_of_it(llama):
    tokenizer = byte_level()
    plain = generate_text(llama, tokenizer, "the cat", 30, seed=2)
    list(plain)
    stop = plain.new_ids[10]
    stopped = generate_text(llama, tokenizer, "the cat", 30, seed=2, stop_token=stop)
    list(stopped)
    assert stopped.new_ids == list(itertools.takewhile(lambda token: token != stop, plain.new_ids))
    assert plain.text.startswith(stopped.text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_an_empty_prompt_is_refused(llama):
    with pytest.raises(BellboxError, match="the prompt is empty"):
        generate_text(llama, byte_level(), "", 4)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")
def test_a_real_model_tells_a_story():
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(STORIES / "tokenizer.model"))
    model = load_hf(STORIES)
    sentence = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
    ids = torch.tensor([[pieces.bos_id(), *pieces.encode(sentence)]])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    assert math.exp(loss) < 2.5
    prompt = torch.tensor([[pieces.bos_id(), *pieces.encode("Once upon a time")]])
    made = all_tokens(model, prompt, 120, temperature=0.0)[0].tolist()
    story = pieces.decode(prompt[0].tolist() + made)
    assert story.startswith("Once upon a time, there was a")
    assert {"She", "the", "and", "to"} <= set(story.split())
