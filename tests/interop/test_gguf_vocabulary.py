"""Tokenizers in GGUF files: what is written, read back by transformers, and what is left out with a word."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox as bb
from bellbox.data.beginning import beginning_token, prefix_token, tokenizer_of
from bellbox.data.tokenizer import Tokenizer
from bellbox.models import LlamaConfig, build

gguf = pytest.importorskip("gguf")

from bellbox.interop.gguf import export_gguf  # noqa: E402
from bellbox.interop.gguf.vocabulary import NotTheSame, read_vocabulary  # noqa: E402

SHARED = Path(__file__).parents[3] / "shared" / "data"
MODELS = [SHARED / "models" / "stories260K_hf" / "tokenizer.model"]
if os.environ.get("BELLBOX_ZOO") == "all":
    MODELS += [SHARED / "tokenizers" / "mistral_v1_tokenizer.model"]
TEXTS = ["Once upon a time, there was a fox.", "  two  spaces\n\nand it's 1984!", "naïve 東京 😀", ""]


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    Tokenizer.train(["the quick brown fox jumps over the lazy dog, again and again. " * 40], 300).save(
        tmp_path / "tokenizer.json"
    )
    return tmp_path / "tokenizer.json"


def begin(file: Path) -> int | None:
    return beginning_token(file, tokenizer_of(file))


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    spec = json.loads(file.read_text())
    change(spec)
    file.write_text(json.dumps(spec))
    return file


def test_transformers_tokenizes_alike_from_the_file(byte_level: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own = Tokenizer.load(byte_level)
    model = build(LlamaConfig(own.vocab_size + 5, 32, 32, 1, 2), seed=0)
    made = export_gguf(model, tmp_path / "m.gguf", tokenizer=byte_level)
    assert (made.vocabulary, made.remark) == ("gpt2", None)
    fields = gguf.GGUFReader(made.path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == own.end_of_text
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == own.vocab_size + 5
    assert tokens[-1] == f"[PAD{own.vocab_size + 4}]"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == own.encode(text)


@pytest.mark.parametrize("file", MODELS, ids=lambda path: path.name)
def test_scores_of_sentencepiece_put_pieces_in_the_order_of_its_own(file: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    if not file.is_file():
        pytest.skip("the shared data are not here")
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    size = model.vocab_size()
    found = read_vocabulary(file, size)
    assert (found.model, found.pre, found.begin, found.end, found.space_prefix) == (
        "llama",
        "default",
        1,
        2,
        True,
    )
    assert found.kinds[:4] == [2, 3, 3, 6]
    assert found.tokens == [model.id_to_piece(number) for number in range(size)]
    scores = found.scores
    assert scores is not None
    merged = [number for number in range(size) if found.kinds[number] == 1 and scores[number] > min(scores)]
    assert len(merged) > size // 4
    ranks = sorted({model.get_score(number) for number in merged}, reverse=True)
    by_theirs = {score: rank for rank, score in enumerate(ranks)}
    assert len({(scores[number], by_theirs[model.get_score(number)]) for number in merged}) == len(ranks)
    assert sorted(merged, key=lambda n: -scores[n]) == sorted(merged, key=lambda n: -model.get_score(n))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(normalizer={"type": "NFC"}), "normalizes"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "by a rule"),
        (lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [s["pre_tokenizer"]]}), "by a rule"),
        (lambda s: s["model"].update(ignore_merges=True), "by a rule"),
        (lambda s: s["model"].update(dropout=0.5), "dropout"),
    ],
)  # fmt: skip
def test_a_tokenizer_of_another_kind_is_left_out_with_a_word(
    change: Any, reason: str, byte_level: Path, tmp_path: Path
) -> None:
    rewritten(byte_level, change)
    with pytest.raises(NotTheSame, match=reason):
        read_vocabulary(byte_level, 400)
    made = export_gguf(
        build(LlamaConfig(400, 32, 32, 1, 2), seed=0), tmp_path / "m.gguf", tokenizer=byte_level
    )
    assert made.vocabulary is None
    assert made.remark is not None
    assert reason in made.remark
    fields = gguf.GGUFReader(made.path).fields
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert "tokenizer.ggml.tokens" not in fields


def test_a_tokenizer_with_more_tokens_than_the_model_is_left_out(byte_level: Path) -> None:
    size = Tokenizer.load(byte_level).vocab_size
    with pytest.raises(NotTheSame, match=f"{size} tokens and the model {size - 1}"):
        read_vocabulary(byte_level, size - 1)


def small_sentencepiece(merges: list[list[str]], pieces: list[str]) -> dict[str, Any]:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    return {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None, "post_processor": None,
        "added_tokens": [{"id": number, "content": names[number], **special} for number in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True, "merges": merges,
            "vocab": {name: number for number, name in enumerate(names)},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        ([["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]], "'abc' do not stand together"),
        ([["a", "b"], ["b", "c"], ["ab", "c"]], "does not merge 'a' and 'bc'"),
        ([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]], None),
    ],
)
def test_merges_that_no_score_can_say(merges: list[list[str]], reason: str | None, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(small_sentencepiece(merges, ["a", "b", "c", "ab", "bc", "abc"])))
    if reason is not None:
        with pytest.raises(NotTheSame, match=reason):
            read_vocabulary(file, 300)
        return
    found = read_vocabulary(file, 300)
    assert found.begin is None
    assert found.scores is not None
    scores = dict(zip(found.tokens, found.scores, strict=True))
    assert scores["ab"] > scores["bc"] > scores["abc"] > scores["a"]


def test_the_beginning_token(byte_level: Path) -> None:
    assert begin(byte_level) is None
    end = Tokenizer.load(byte_level).end_of_text
    template = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    rewritten(byte_level, lambda s: s.update(post_processor=template))
    assert begin(byte_level) == end
    config = byte_level.parent / "tokenizer_config.json"
    config.write_text(json.dumps({"add_bos_token": False}))
    assert begin(byte_level) is None
    config.write_text(json.dumps({"add_bos_token": True, "bos_token": {"content": "a"}}))
    assert begin(byte_level) == Tokenizer.load(byte_level).vocab["a"]
    config.write_text(json.dumps({"add_bos_token": False, "bos_token": "b", "eos_token": "c"}))
    tokenizer = tokenizer_of(byte_level)
    assert tokenizer.end_of_text == tokenizer.vocab["c"]
    assert prefix_token(byte_level, tokenizer) == tokenizer.vocab["b"]
    config.write_text(json.dumps({"add_bos_token": True, "bos_token": "<begin>"}))
    with pytest.raises(bb.BellboxError, match="'<begin>' is no token"):
        begin(byte_level)


def test_a_template_of_conversations_comes_along(byte_level: Path, tmp_path: Path) -> None:
    (byte_level.parent / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    with torch.no_grad():
        made = export_gguf(
            build(LlamaConfig(300, 32, 32, 1, 2), seed=0), tmp_path / "m.gguf", tokenizer=byte_level
        )
    fields = gguf.GGUFReader(made.path).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
