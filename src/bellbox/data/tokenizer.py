"""Byte-level BPE: any text comes back exactly, and every token stands for a definite number of bytes.

That number is what makes models with different tokenizers comparable (bits per byte). A tokenizer is its
`tokenizer.json` (the `tokenizers` library's format), and its identity is the SHA-256 of that file. A given
tokenizer of another kind works too; a sentencepiece `tokenizer.model` is translated (see `spm.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bellbox.data.pieces import END_OF_TEXT
from bellbox.errors import BellboxError, require
from bellbox.utils.files import TOKENIZER_LIMIT, one_line, parsing, read_json, read_text, write_text

FILE_NAME = "tokenizer.json"
_SMALLEST = 256 + 1  # every byte and the end of text
_LARGEST = 1 << 24
# Ids may have gaps (reserved ones), but a table of a line for each must not outgrow the file that names a few.
_MOST_UNUSED_IDS = 1 << 17
# Names under which other tokenizers keep the token that closes a document, in order of preference.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


def check_vocab_size(size: int) -> None:
    """Refuse a vocabulary that has no room for every byte and the end of a text.

    Raises:
        BellboxError: such a size.
    """
    if size < _SMALLEST:
        raise BellboxError(f"vocabulary of {size}: needs at least {_SMALLEST} (256 bytes and {END_OF_TEXT})")
    if size > _LARGEST:
        raise BellboxError(f"vocabulary of {size}: may have at most {_LARGEST:,} entries")


def plain_ids(backend: Any, text: str) -> list[int]:
    """Token ids of a text as data preparation makes them, whatever a `tokenizers.Tokenizer` is set to.

    Nothing is added by a template, cut or padded, and the name of a special token is a text like any other. (What the
    normalizer puts in front of every text, such as sentencepiece's first space, belongs to the documents too.)

    Args:
        backend: it is left as it was.
        text: to encode.

    Raises:
        BellboxError: the text is no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BellboxError(f"{text[:100]!r} is not text in UTF-8") from None
    truncation, padding, special = backend.truncation, backend.padding, backend.encode_special_tokens
    try:
        if truncation is not None:
            backend.no_truncation()
        if padding is not None:
            backend.no_padding()
        if not special:
            backend.encode_special_tokens = True
        return list(backend.encode(text, add_special_tokens=False).ids)
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        if not special:
            backend.encode_special_tokens = special


class Tokenizer:
    """Text to token ids and back.

    Use `Tokenizer.train` or `Tokenizer.load`. A literal `<|endoftext|>` inside a text is encoded as ordinary
    characters: only the data pipeline places the token of that name.
    """

    def __init__(self, text: str, end_of_text: int | str | None = None) -> None:
        """From the contents of a `tokenizer.json`.

        Args:
            text: the file's contents.
            end_of_text: id or name of the token that closes a document; found by its usual names where None.

        Raises:
            BellboxError: where the contents are no tokenizer, or no token closes a document.
        """
        tokenizers = require("tokenizers", "cli")
        check_specification(text)
        with parsing("this", "a tokenizer.json"):
            self.backend: Any = tokenizers.Tokenizer.from_str(text)
        """The `tokenizers.Tokenizer`, set as data preparation uses it."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.text = text
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.vocab: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values()) + 1
        self.end_of_text = self._find_end(end_of_text)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE; the same texts in the same order give the same tokenizer.

        Args:
            texts: the text, read once.
            vocab_size: number of entries, at least 257; fewer come out where the text has no more pairs.

        Raises:
            BellboxError: for a size under 257, or no text.
        """
        check_vocab_size(vocab_size)
        tokenizers = require("tokenizers", "cli")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        seen = 0

        def counted() -> Iterator[str]:
            nonlocal seen
            for text in texts:
                seen += len(text)
                yield text

        backend.train_from_iterator(counted(), trainer)
        if not seen:
            raise BellboxError("no text to train a tokenizer on")
        return cls(backend.to_str())

    @classmethod
    def load(cls, path: str | Path, end_of_text: int | str | None = None) -> Tokenizer:
        """Open a `tokenizer.json`, a sentencepiece `.model`, or a folder that holds one of them.

        Raises:
            BellboxError: where there is none, or it cannot be read.
        """
        path = Path(path)
        file = path
        if path.is_dir():
            candidates = [path / FILE_NAME, path / "tokenizer.model"]
            file = next((one for one in candidates if one.is_file()), path)
            if file == path:
                raise BellboxError(f"{path}: the folder holds neither {FILE_NAME} nor tokenizer.model")
            end_of_text = end_of_text if end_of_text is not None else configured_end(path)
        if not file.is_file():
            raise BellboxError(f"{path}: no such tokenizer")
        if file.suffix == ".model":
            from bellbox.data.spm import translate

            text = translate(file)
        else:
            text = read_text(file, TOKENIZER_LIMIT)
        try:
            return cls(text, end_of_text)
        except BellboxError as error:
            raise BellboxError(f"{file}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the `tokenizer.json`, byte for byte what `sha256` was taken of."""
        write_text(path, self.text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added at either end."""
        return plain_ids(self.backend, text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int64) of each text, on all cores."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 by themselves become U+FFFD."""
        return self.backend.decode([int(one) for one in ids], skip_special_tokens=False)

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token id stands for, by id; none for a special token or an unused id.

        Lets a stream be decoded token by token: join the bytes, decode as far as they are whole.

        Raises:
            BellboxError: for a tokenizer that is neither byte-level nor of sentencepiece's kind.
        """
        return list(self._token_bytes)

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        return token_bytes(self.text)

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each token id stands for, int64 `[vocab_size]`; 0 for a special token."""
        return np.array([len(one) for one in self._token_bytes], dtype=np.int64)

    def bytes_per_token(self, text: str) -> float:
        """UTF-8 bytes of the text over its number of tokens; the higher, the shorter the sequences."""
        if not text:
            raise BellboxError("bytes per token of an empty text are not defined")
        return len(text.encode()) / len(self.encode(text))

    def _find_end(self, asked: int | str | None) -> int:
        if isinstance(asked, int):
            if asked not in set(self.vocab.values()):
                raise BellboxError(f"end-of-text id {asked} is not in the vocabulary of {self.vocab_size}")
            return asked
        names = _END_NAMES if asked is None else (asked,)
        for name in names:
            if name in self.vocab:
                return self.vocab[name]
        raise BellboxError(f"no token closes a document; looked for {', '.join(names)}")


def check_specification(text: str) -> dict[str, Any]:
    """The contents of a `tokenizer.json` as values, once its ids are found to be such that a table can hold them.

    Raises:
        BellboxError: no JSON object, or ids that are no numbers, beyond 16,777,216, or far more than there are tokens.
    """
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BellboxError(f"not a tokenizer.json that can be read: {one_line(error)}") from None
    model = spec.get("model") if isinstance(spec, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) else None
    added = spec.get("added_tokens") if isinstance(spec, dict) else None
    if not isinstance(vocab, dict | list) or not isinstance(added, list | None):
        raise BellboxError("not a tokenizer.json that can be read: it has no vocabulary")
    if isinstance(vocab, list) and not all(
        isinstance(one, list) and one and isinstance(one[0], str) for one in vocab
    ):
        raise BellboxError(
            "not a tokenizer.json that can be read: its vocabulary is no list of pieces and scores"
        )
    if not all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in added or ()):
        raise BellboxError("not a tokenizer.json that can be read: an added token has no content")
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [one.get("id") for one in added or ()]
    if not ids:
        raise BellboxError("not a tokenizer.json that can be read: its vocabulary is empty")
    for number in ids:
        if type(number) is not int or not 0 <= number < min(_LARGEST, len(ids) + _MOST_UNUSED_IDS):
            raise BellboxError(
                f"a token of it has the id {number!r}; of {len(ids):,} tokens, ids are whole numbers from 0 to at most "
                f"{min(_LARGEST, len(ids) + _MOST_UNUSED_IDS) - 1:,}"
            )
    _check_merges(model if isinstance(model, dict) else {})
    return spec


def _check_merges(model: dict[str, Any]) -> None:
    """Whether a merge's right part is as long as the prefix that is cut from it: `tokenizers` would panic."""
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not isinstance(prefix, str) or not prefix or not isinstance(merges, list):
        return
    length = len(prefix.encode(errors="replace"))
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        right = (
            parts[1] if isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], str) else None
        )
        # Cut in the middle of a character is as bad as beyond the end.
        if right is not None and not _cuts(right.encode(errors="replace"), length):
            raise BellboxError(
                f"not a tokenizer.json that can be read: the merge {merge!r} has no room for the prefix {prefix[:50]!r}"
            )


def _cuts(text: bytes, at: int) -> bool:
    return len(text) == at or (len(text) > at and text[at] & 0xC0 != 0x80)


def token_bytes(text: str) -> list[bytes]:
    """`Tokenizer.token_bytes` from the contents of a `tokenizer.json`, without the `tokenizers` library."""
    spec = check_specification(text)
    vocab = spec["model"]["vocab"]
    names: dict[int, str] = (
        {number: name for name, number in vocab.items()}
        if isinstance(vocab, dict)
        else {number: entry[0] for number, entry in enumerate(vocab)}
    )
    added = spec.get("added_tokens") or []
    for token in added:  # their names are spelled out, in characters that no alphabet of bytes need have
        names.pop(token["id"], None)
    parts = " ".join(_part_types(spec.get("pre_tokenizer")) + _part_types(spec.get("decoder")))
    if "ByteLevel" in parts:
        alphabet = _byte_alphabet()
        try:
            table = {number: bytes(alphabet[char] for char in name) for number, name in names.items()}
        except KeyError as error:
            raise BellboxError(
                f"a token of it has the character {error.args[0]!r}, which stands for no byte"
            ) from None
    elif "ByteFallback" in parts or "Metaspace" in parts:
        table = {number: _fallback_bytes(name) for number, name in names.items()}
    else:
        raise BellboxError(
            "the tokenizer is neither byte-level nor of sentencepiece's kind: bytes of its tokens unknown"
        )
    for token in added:
        table[token["id"]] = b"" if token.get("special") else token["content"].encode()
    return [table.get(number, b"") for number in range(max(table) + 1)]


def _part_types(node: object) -> list[str]:
    """The `type` names of a pre-tokenizer or decoder and of the parts of a sequence."""
    if isinstance(node, dict):
        own = [str(node["type"])] if "type" in node else []
        return own + [name for value in node.values() for name in _part_types(value)]
    if isinstance(node, list):
        return [name for value in node for name in _part_types(value)]
    return []


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE.

    A byte with a visible Latin-1 character is that character; the 68 others, in order, are U+0100 and on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _fallback_bytes(name: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", name):
        return bytes([int(byte[1], 16)])
    return name.replace("\u2581", " ").encode()


def configured_end(folder: Path) -> str | None:
    """The `eos_token` of a Hugging Face folder's `tokenizer_config.json`, where there is one."""
    if not (folder / "tokenizer_config.json").exists():
        return None
    end = read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(end, dict):
        end = end.get("content")
    return end if isinstance(end, str) else None
