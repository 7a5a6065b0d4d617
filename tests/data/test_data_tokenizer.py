from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
from data_prose import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from bellbox.data.pieces import split_into_pieces
from bellbox.data.tokenizer import Tokenizer, token_bytes
from bellbox.errors import BellboxError

SHARED = Path(os.environ.get("BELLBOX_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}")
TRAINED = Tokenizer.train([sentences(200)], 300)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_comes_back_exactly_and_byte_lengths_add_up(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert b"".join(TRAINED.token_bytes()[one] for one in ids) == text.encode()
    assert TRAINED.byte_lengths()[ids].sum() == len(text.encode())


def test_the_name_of_the_end_of_text_in_a_text_is_ordinary_characters() -> None:
    ids = TRAINED.encode("a<|endoftext|>b")
    assert TRAINED.end_of_text not in ids
    assert TRAINED.decode(ids) == "a<|endoftext|>b"
    assert TRAINED.token_bytes()[TRAINED.end_of_text] == b""


def test_training_is_deterministic_and_keeps_to_the_size_asked_for() -> None:
    texts = [sentences(100, seed) for seed in range(8)]
    first, second = (Tokenizer.train(iter(texts), 320) for _ in range(2))
    assert first.text == second.text
    assert first.vocab_size == 320
    assert Tokenizer.train(["ab"], 400).vocab_size == 258  # 256 bytes, the end of text, one merge


def test_the_tokens_of_a_long_document_do_not_depend_on_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = sentences(300).replace(".", ".  \n\n ")
    monkeypatch.setattr("bellbox.data.pieces.PIECE_CHARS", 50)
    pieces = [piece.text for piece in split_into_pieces(text)]
    assert len(pieces) > 100
    assert [one for ids in TRAINED.encode_batch(pieces) for one in ids] == TRAINED.encode(text)


def test_saved_and_loaded_it_is_the_same_tokenizer(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.text == TRAINED.text
        assert loaded.sha256 == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
        assert loaded.encode("a bell 東京") == TRAINED.encode("a bell 東京")


def test_bytes_per_token_is_bytes_over_tokens() -> None:
    text = "the bell rings 東京"
    assert TRAINED.bytes_per_token(text) == len(text.encode()) / len(TRAINED.encode(text))
    with pytest.raises(BellboxError, match="empty text"):
        TRAINED.bytes_per_token("")


def test_truncation_and_padding_stored_in_a_given_file_are_not_applied(tmp_path: Path) -> None:
    spec = json.loads(TRAINED.text)
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path).encode("the bell rings again") == TRAINED.encode("the bell rings again")


def test_the_end_of_text_is_found_by_name_by_configuration_or_refused(tmp_path: Path) -> None:
    renamed = TRAINED.text.replace("<|endoftext|>", "<|finis|>")
    file = tmp_path / "tokenizer.json"
    file.write_text(renamed)
    with pytest.raises(
        BellboxError, match=r"tokenizer\.json: no token closes a document; looked for <\|endof"
    ):
        Tokenizer.load(file)
    assert Tokenizer.load(file, "<|finis|>").end_of_text == 0
    with pytest.raises(BellboxError, match="end-of-text id 5000 is not in the vocabulary"):
        Tokenizer.load(file, 5000)
    for end in ("<|finis|>", {"content": "<|finis|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        assert Tokenizer.load(tmp_path).end_of_text == 0


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    for name, content, message in [
        ("a.json", b"{}", "a.json: not a tokenizer.json that can be read"),
        ("b.json", b"\xff", "b.json: not UTF-8 at byte 0"),
        ("c.model", b"nothing", "c.model: not a sentencepiece model"),
        ("c.model", b"", "c.model: is empty, not a sentencepiece model"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BellboxError, match=message) as caught:
            Tokenizer.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(BellboxError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(BellboxError, match="none: no such tokenizer"):
        Tokenizer.load(tmp_path / "none")


def test_a_vocabulary_too_small_or_no_text_is_refused() -> None:
    with pytest.raises(BellboxError, match="vocabulary of 256: needs at least 257"):
        Tokenizer.train(["a"], 256)
    with pytest.raises(BellboxError, match="no text to train a tokenizer on"):
        Tokenizer.train([], 300)


def test_tokens_without_definite_bytes_are_refused() -> None:
    spec = json.loads(TRAINED.text)
    spec["pre_tokenizer"] = spec["decoder"] = None
    with pytest.raises(BellboxError, match="neither byte-level nor of sentencepiece's kind"):
        token_bytes(json.dumps(spec))


def test_a_special_token_need_not_be_spelled_in_the_alphabet_of_bytes() -> None:
    spec = json.loads(TRAINED.text)
    number = len(spec["model"]["vocab"])
    spec["model"]["vocab"]["<東User東>"] = number
    like = spec["added_tokens"][0]
    spec["added_tokens"].append({**like, "id": number, "content": "<東User東>"})
    spec["added_tokens"].append({**like, "id": number + 1, "content": "東", "special": False})
    found = Tokenizer(json.dumps(spec))
    assert found.token_bytes() == [*TRAINED.token_bytes(), b"", "東".encode()]
    ids = found.encode("東 rings")
    assert b"".join(found.token_bytes()[one] for one in ids) == "東 rings".encode()


@needs_shared
@pytest.mark.parametrize("name", ["models/stories260K_hf", "tokenizers/mistral_v1_tokenizer.model"])
def test_a_sentencepiece_model_tokenizes_as_sentencepiece_does(name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = SHARED / name
    original = sentencepiece.SentencePieceProcessor(
        model_file=str(path / "tokenizer.model" if path.is_dir() else path)
    )
    translated = Tokenizer.load(path)
    prose = (SHARED / "text" / "pd_classics_valid.txt").read_text(encoding="utf-8")
    random.seed(0)
    noise = "".join(random.choice("  \n\tab.é東😀▁<0x0A></s>") for _ in range(2000))
    for text in (prose[:30_000], noise, "</s>", "x" * 200):
        ids = original.encode(text)
        assert translated.encode(text) == ids
        assert translated.decode(ids) == text.replace("\u2581", " ")
    assert translated.vocab_size == original.vocab_size()
    assert translated.end_of_text == original.eos_id()
    ids = translated.encode("Once upon a 東")
    assert b"".join(translated.token_bytes()[one] for one in ids).decode() == " Once upon a 東"


def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(sentences(300), encoding="utf-8")
    for kind, fallback in (("unigram", True), ("bpe", False)):
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(tmp_path / kind), vocab_size=330,
            model_type=kind, byte_fallback=fallback, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        with pytest.raises(BellboxError, match=r"convert it to a tokenizer\.json"):
            Tokenizer.load(tmp_path / f"{kind}.model")


def test_a_merge_without_room_for_the_prefix_is_refused_before_the_library_panics(
    capfd: pytest.CaptureFixture[str],
) -> None:
    spec = json.loads(TRAINED.text)
    spec["model"]["continuing_subword_prefix"] = "much longer than a letter"
    with pytest.raises(BellboxError, match="has no room for the prefix 'much longer"):
        Tokenizer(json.dumps(spec))
    assert "panicked" not in capfd.readouterr().err
