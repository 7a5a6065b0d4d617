"""The vocabulary of a GGUF file: a `tokenizer.json` as `tokenizer.ggml.*`, where llama.cpp tokenizes alike.

Two kinds are written. *Sentencepiece's BPE with byte fallback* ("llama"): llama.cpp merges the neighbouring pair whose
union has the best score, so that the list of merges must be one by score, and every way to make a piece stand in it.
*Byte-level BPE* ("gpt2"): the list of merges goes over as it is, but the rule that cuts a text into words is known to
llama.cpp by name alone, so that it must be one of those below to the letter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bellbox.data.beginning import beginning_token, chat_template, tokenizer_of

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, llama.cpp's numbers."""
_LLAMA3_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_SPACE = "\u2581"


class NotTheSame(Exception):  # noqa: N818 (no error: an answer)
    """llama.cpp has no tokenizer that does the same; the text says why."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """`llama` or `gpt2`."""
    pre: str
    """llama.cpp's name of the rule that cuts a text into words."""
    tokens: list[str]
    kinds: list[int]
    end: int
    """The token that closes a document."""
    begin: int | None
    """The token that belongs in front of a text."""
    scores: list[float] | None = None
    merges: list[str] = field(default_factory=list)
    space_prefix: bool = False
    """Whether a text gets a space in front."""
    chat_template: str | None = None


def read_vocabulary(file: Path, size: int) -> Vocabulary:
    """That of a model with embeddings for `size` tokens.

    Args:
        file: `tokenizer.json` or a sentencepiece `.model`.
        size: rows of the embedding; the ones beyond the tokenizer are named unused.

    Raises:
        NotTheSame: llama.cpp has nothing that tokenizes alike.
        BellboxError: the tokenizer cannot be read.
    """
    tokenizer = tokenizer_of(file)
    spec = json.loads(tokenizer.text)
    if tokenizer.vocab_size > size:
        raise NotTheSame(f"it has {tokenizer.vocab_size:,} tokens and the model {size:,}")
    names: dict[int, str] = {number: name for name, number in tokenizer.vocab.items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [_NORMAL if number in names else _UNUSED for number in range(size)]
    model = spec["model"]
    if model.get("type") != "BPE":
        raise NotTheSame(f"it is no BPE but {model.get('type')}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise NotTheSame(f"its BPE has a {key}")
    for added in spec.get("added_tokens") or ():
        if added["id"] >= size:
            raise NotTheSame(
                f"its added token {added['content']!r} has the id {added['id']}, beyond the model's"
            )
        kinds[added["id"]] = _CONTROL if added.get("special") else _USER_DEFINED
    if model.get("unk_token") in tokenizer.vocab:
        kinds[tokenizer.vocab[model["unk_token"]]] = _UNKNOWN
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or ()]
    common = (tokens, kinds, tokenizer.end_of_text, beginning_token(file, tokenizer))
    if model.get("byte_fallback"):
        _require_sentencepiece(spec)
        for number, name in enumerate(tokens):
            if len(name) == 6 and name.startswith("<0x") and kinds[number] == _NORMAL:
                kinds[number] = _BYTE
        scores = _scores(pairs, tokenizer.vocab, kinds)
        return Vocabulary(
            "llama", "default", *common, scores, space_prefix=True, chat_template=chat_template(file)
        )
    pre = _pre_of(spec)
    merges = [" ".join(pair) for pair in pairs]
    if any(len(pair) != 2 for pair in pairs) or any(merge.count(" ") != 1 for merge in merges):
        raise NotTheSame("a merge of it holds a space")
    return Vocabulary("gpt2", pre, *common, merges=merges, chat_template=chat_template(file))


def _require_sentencepiece(spec: dict[str, Any]) -> None:
    """Whether spaces become U+2581, one is put in front, and nothing else is done to a text."""
    parts = spec.get("normalizer") or {}
    steps = parts.get("normalizers") if parts.get("type") == "Sequence" else [parts]
    expected = [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ]
    if steps != expected or spec.get("pre_tokenizer"):
        raise NotTheSame("it prepares texts otherwise than sentencepiece's BPE of LLaMA does")


def _scores(pairs: list[tuple[str, ...]], vocab: dict[str, int], kinds: list[int]) -> list[float]:
    """A score for each token, the earlier merged the higher.

    Raises:
        NotTheSame: scores cannot say what the list of merges says.
    """
    order: dict[str, int] = {}
    last = None
    for pair in pairs:
        # Runs of spaces have one score in sentencepiece, so that the first in the text goes first.
        piece = _class_of("".join(pair))
        if piece != last and piece in order:
            raise NotTheSame(
                f"its merges that make {piece!r} do not stand together, so no score of it says both"
            )
        order.setdefault(piece, len(order))
        last = piece
    listed = {pair for pair in pairs if len(pair) == 2}
    plain = {name for name, number in vocab.items() if kinds[number] == _NORMAL}
    for piece in plain:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair not in listed and pair[0] in plain and pair[1] in plain:
                raise NotTheSame(f"it does not merge {pair[0]!r} and {pair[1]!r}, and llama.cpp would")
    scores = [0.0] * len(kinds)
    for name, number in vocab.items():
        if kinds[number] == _NORMAL:
            scores[number] = -float(order.get(_class_of(name), len(order)))
    return scores


def _class_of(piece: str) -> str:
    """Two spaces for any run of them, else the piece."""
    return _SPACE * 2 if len(piece) > 1 and not piece.strip(_SPACE) else piece


def _pre_of(spec: dict[str, Any]) -> str:
    if spec.get("normalizer"):
        raise NotTheSame("it normalizes texts, which llama.cpp's byte-level tokenizers do not")
    found = _plain(spec.get("pre_tokenizer"))
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    whole = bool(spec["model"].get("ignore_merges"))
    if found == words and not whole:
        return "gpt-2"
    if found == _sequence({"type": "Digits", "individual_digits": True}, words) and not whole:
        return "smollm"
    split = {"type": "Split", "pattern": {"Regex": _LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    if found == _sequence(split, {**words, "use_regex": False}) and whole:
        return "llama-bpe"
    raise NotTheSame("it cuts texts into words by a rule that llama.cpp is not known to have")


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _plain(node: Any) -> Any:
    """A pre-tokenizer without what decides nothing here, and with what is left out at its default."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {key: _plain(value) for key, value in node.items() if key != "trim_offsets"}
    return {"use_regex": True, **node} if node.get("type") == "ByteLevel" else node


def write_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    """Put it into a `gguf.GGUFWriter`; without one the model takes and gives token ids only."""
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    # All of it said: what llama.cpp assumes where a file is silent are the ids of LLaMA's and GPT-2's tokenizers.
    writer.add_bos_token_id(vocabulary.end if vocabulary.begin is None else vocabulary.begin)
    writer.add_eos_token_id(vocabulary.end)
    writer.add_add_bos_token(vocabulary.begin is not None)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
