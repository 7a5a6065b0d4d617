"""Older LLaMA checkpoints come with a sentencepiece `tokenizer.model`; this writes it as a `tokenizer.json`.

Only the kind that those checkpoints use is translated: BPE with byte fallback, spaces kept and written as
U+2581, one put in front of the text. Rather than trust the file's settings, the translation is tried against
sentencepiece itself on probe texts, and refused where a single id differs.

Sentencepiece always merges the neighbouring pair whose union has the best score. `tokenizers` merges the
pair that stands first in a list. So the list holds every way to make a piece out of two, by its score.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bellbox.errors import BellboxError, require
from bellbox.utils.files import parsing, read_bytes

_SPACE = "\u2581"
_MOST_BYTES, _LONGEST_PIECE = 64 << 20, 512
_PROBES = (
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces, then three   and a tail  ",
    "tabs\tand\nnew lines\n\n\nand\r\n",
    "naïve Ａ① ﬁn, 東京, \u2581 itself, 😀 and \x00",
    "for (int i = 0; i < 10; i++) { sum += 3.14159e-10; }",
    "THE QUICK BROWN FOX; isn't it? aaaaaaaaaaaaaaaa --------",
)


def translate(path: Path) -> str:
    """The `tokenizer.json` contents that tokenize as the sentencepiece model does.

    Raises:
        BellboxError: where the file is no sentencepiece model, or one of another kind.
    """
    sentencepiece = require("sentencepiece", "transformers")
    tokenizers = require("tokenizers", "cli")
    content = read_bytes(path, _MOST_BYTES)
    if not content:  # which the library takes for a model to come
        raise BellboxError(f"{path}: is empty, not a sentencepiece model")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except (OSError, RuntimeError, ValueError) as error:
        raise BellboxError(f"{path}: not a sentencepiece model that can be read") from error
    with parsing(path, "a sentencepiece model"):
        size: int = model.vocab_size()
        known = any(model.is_byte(number) for number in range(size))
        longest = max((len(model.id_to_piece(number)) for number in range(size)), default=0)
    if not known or longest > _LONGEST_PIECE:  # each piece is cut at every place
        raise BellboxError(f"{path}: {_REFUSAL}")
    with parsing(path, "a sentencepiece model"):
        text = json.dumps(_specification(model, size), ensure_ascii=False)
        backend = tokenizers.Tokenizer.from_str(text)
        pairs = [(backend.encode(one, add_special_tokens=False).ids, model.encode(one)) for one in _PROBES]
    if any(ours != theirs for ours, theirs in pairs):
        raise BellboxError(f"{path}: {_REFUSAL}")
    return text


_REFUSAL = (
    "a sentencepiece model of another kind than BPE with byte fallback; "
    "convert it to a tokenizer.json with the transformers library and give that"
)


def _specification(model: Any, size: int) -> dict[str, Any]:
    pieces = [model.id_to_piece(number) for number in range(size)]
    special = [n for n in range(size) if model.is_control(n) or model.is_unknown(n)]
    plain = {p: n for n, p in enumerate(pieces) if not (n in set(special) or model.is_byte(n))}
    merges = [
        (-model.get_score(number), plain[piece[:cut]], plain[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, number in plain.items()
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    merges.sort(key=lambda one: one[:3])
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": pieces[number], **added} for number in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[model.unk_id()] if model.unk_id() >= 0 else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": [pair for *_, pair in merges],
        },
    }
