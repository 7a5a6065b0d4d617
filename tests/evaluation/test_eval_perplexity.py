from __future__ import annotations

import math
import types
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bellbox.data import TokenDataset
from bellbox.data.prepare import prepare
from bellbox.errors import BellboxError
from bellbox.evaluation import perplexity

VOCAB = 23


class Bigram(nn.Module):
    """Logits from the last token and its place in the window, so that every protocol has its own loss."""

    def __init__(self, seed: int = 0, places: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator))
        self.place = nn.Parameter(torch.randn(places, VOCAB, generator=generator))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(tokens.shape))
        return self.table[tokens] + self.place[: tokens.shape[1]]


def tokens_of(length: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def by_hand(model: Bigram, tokens: np.ndarray, context: int, stride: int) -> tuple[float, list[int]]:
    """The protocol as a plain loop in float64: nats, and the places scored in order."""
    table, place = model.table.detach().double().numpy(), model.place.detach().double().numpy()
    nats, scored, start = 0.0, [], 0
    while not scored or scored[-1] < len(tokens) - 1:
        for offset in range(min(context, len(tokens) - 1 - start)):
            target = start + offset + 1
            if scored and target <= scored[-1]:
                continue
            logits = table[tokens[start + offset]] + place[offset]
            nats += math.log(np.exp(logits).sum()) - logits[tokens[target]]
            scored.append(target)
        start += stride
    return nats, scored


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 33, 200])
@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 16), (16, 5), (16, 1), (1, None), (7, 3)])
def test_it_equals_a_plain_loop_in_float64(length: int, context: int, stride: int | None) -> None:
    model, tokens = Bigram(), tokens_of(length)
    result = perplexity(model, tokens, context, stride=stride, batch_size=3)
    nats, scored = by_hand(model, tokens, context, stride or context)
    assert scored == list(range(1, length)), "every token but the first, once"
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(nats / (length - 1), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / (length - 1)), rel=1e-5)
    assert (result.context, result.stride) == (context, stride or context)


def test_a_uniform_model_has_exactly_the_perplexity_of_its_vocabulary() -> None:
    model = nn.Embedding(VOCAB, VOCAB)
    nn.init.zeros_(model.weight)
    result = perplexity(model, tokens_of(5000), 64, byte_lengths=np.full(VOCAB, 3))
    assert result.loss == pytest.approx(math.log(VOCAB), rel=1e-7)
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB) / 3, rel=1e-7)
    assert result.bytes == 3 * 4999


@pytest.mark.parametrize("stride", [None, 4])
def test_the_batch_size_and_the_chunks_change_nothing(
    stride: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = Bigram(), tokens_of(300)
    losses = [perplexity(model, tokens, 16, stride=stride, batch_size=size).loss for size in (1, 2, 7, 100)]
    monkeypatch.setattr(import_module("bellbox.evaluation.perplexity"), "_LOGITS_AT_ONCE", 50)
    losses.append(perplexity(model, tokens, 16, stride=stride).loss)
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-7)


def test_no_window_is_longer_than_the_context() -> None:
    model = Bigram()
    perplexity(model, tokens_of(100), 16, batch_size=4)
    assert model.shapes == [(4, 16), (2, 16), (1, 3)]


def test_low_precision_logits_are_scored_in_fp32() -> None:
    model = Bigram()
    rounded = Bigram()
    with torch.no_grad():
        rounded.table.copy_(model.table.bfloat16())
        rounded.place.zero_()
    low = nn.Embedding(VOCAB, VOCAB, _weight=model.table.detach().bfloat16())
    tokens = tokens_of(500)
    assert perplexity(low, tokens, 16).loss == pytest.approx(perplexity(rounded, tokens, 16).loss, rel=1e-7)


def test_a_model_that_returns_an_object_with_logits_is_taken() -> None:
    class Wrapped(Bigram):
        def forward(self, tokens):  # type: ignore[no-untyped-def, override]
            return types.SimpleNamespace(logits=super().forward(tokens))

    tokens = tokens_of(50)
    assert perplexity(Wrapped(), tokens, 16).loss == perplexity(Bigram(), tokens, 16).loss


def test_tensors_and_arrays_of_any_integer_type_are_taken() -> None:
    tokens = tokens_of(50)
    expected = perplexity(Bigram(), tokens, 16).loss
    assert perplexity(Bigram(), tokens.astype(np.uint16), 16).loss == expected
    assert perplexity(Bigram(), torch.from_numpy(tokens.astype(np.int32)), 16).loss == expected


def test_each_module_gets_its_own_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, VOCAB), nn.Dropout(0.9))
    model.train()
    model[0].eval()
    first = perplexity(model, tokens_of(50), 16).loss
    assert first == perplexity(model, tokens_of(50), 16).loss, "dropout is off"
    assert [module.training for module in model.modules()] == [True, False, True]
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.raises(BellboxError):
        perplexity(model, tokens_of(50), 16)
    assert [module.training for module in model.modules()] == [True, False, True]


def test_nan_logits_are_an_error_that_says_where() -> None:
    model = Bigram()
    tokens = np.concatenate([tokens_of(40) % 22, [22], tokens_of(20) % 22])
    with torch.no_grad():
        model.table[22] = math.nan
    with pytest.raises(BellboxError, match="logits are NaN among scored tokens 33 to 48"):
        perplexity(model, tokens, 16, batch_size=1)


def test_a_token_held_impossible_gives_infinite_perplexity() -> None:
    model = Bigram()
    with torch.no_grad():
        model.place[:, 5] = -math.inf
    result = perplexity(model, np.array([1, 5, 1]), 16)
    assert result.loss == result.perplexity == math.inf


def test_progress_counts_up_to_all_tokens() -> None:
    calls: list[tuple[int, int]] = []
    perplexity(Bigram(), tokens_of(100), 16, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls == [(32, 99), (64, 99), (96, 99), (99, 99)]


def test_max_tokens_scores_the_first_ones() -> None:
    tokens = tokens_of(100)
    cut = perplexity(Bigram(), tokens, 16, max_tokens=40)
    assert cut.loss == perplexity(Bigram(), tokens[:41], 16).loss
    assert cut.tokens == 40
    assert cut.protocol == (
        "40 tokens (the first 41 of 100) scored once each, context 16, stride 16 (disjoint targets)"
    )
    assert perplexity(Bigram(), tokens, 16, max_tokens=1000).tokens == 99


def test_sizes_that_do_not_fit_are_refused() -> None:
    for arguments, message in [
        ({"context": 0}, "context 0"),
        ({"batch_size": 0}, "batch size 0"),
        ({"stride": 17}, "stride 17: must be between 1 and the context, 16"),
        ({"stride": 0}, "stride 0"),
        ({"max_tokens": 0}, "at most 0 tokens"),
    ]:
        with pytest.raises(BellboxError, match=message):
            perplexity(Bigram(), tokens_of(50), **({"context": 16} | arguments))
    with pytest.raises(BellboxError, match="1 tokens to evaluate on: at least 2"):
        perplexity(Bigram(), tokens_of(1), 16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder: Path = tmp_path_factory.mktemp("eval")
    train, valid = folder / "train.txt", folder / "valid.txt"
    train.write_text("the bell rings in the box, café 東京. " * 200, encoding="utf-8")
    valid.write_text("東京 bell\n<|endoftext|>\nthe box rings 😀 in the café", encoding="utf-8")
    return prepare([train], folder / "out", valid=[valid], vocab_size=300, shard_tokens=10)


def test_bits_per_byte_counts_the_bytes_of_the_scored_text(dataset: TokenDataset) -> None:
    split = dataset.valid
    ids = split.read(0, len(split))
    model = nn.Embedding(dataset.vocab_size, dataset.vocab_size)
    nn.init.zeros_(model.weight)
    lengths = dataset.byte_lengths()
    for limit in (None, 7):
        result = perplexity(model, split, 4, max_tokens=limit)
        scored = ids[1:] if limit is None else ids[1 : limit + 1]
        assert result.bytes == lengths[scored].sum()
        nats = len(scored) * math.log(dataset.vocab_size)
        assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-6)
    whole = perplexity(model, split, 4)
    first = len(dataset.tokenizer.decode([ids[0]]).encode(errors="ignore"))
    assert whole.bytes == split.bytes - lengths[ids[0]]
    assert first > 0
    assert whole.loss == perplexity(model, ids, 4).loss
    assert perplexity(model, ids, 4).bits_per_byte is None
