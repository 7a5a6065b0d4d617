"""Text to token shards, in two passes over a stream: train the tokenizer (unless one is given), then encode.

Nothing here grows with the corpus: pieces come in, tokens go out. The dataset is written into a hidden folder
beside the target and renamed when it is whole, so a killed run leaves no half-written dataset behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bellbox.data import shards, sources
from bellbox.data.sources import Piece, Rows, Skipped, Source
from bellbox.data.tokenizer import FILE_NAME, Tokenizer, check_vocab_size
from bellbox.errors import BellboxError
from bellbox.utils.files import new_folder

DEFAULT_VOCAB = 8192
DEFAULT_VALID_FRACTION = 0.01
DEFAULT_SHARD_TOKENS = 1 << 27
_MOST_SHARD_TOKENS = 1 << 40
# A tokenizer learns nothing more from further text, and its table of words would go on growing.
TOKENIZER_SAMPLE_CHARS = 1 << 28
_BATCH_CHARS = 1 << 20


@dataclass(frozen=True)
class Progress:
    """Where a preparation stands."""

    phase: str
    """`survey` (whether both splits get a document), `tokenizer` (training it) or `encode`."""
    bytes_read: int = 0
    """Bytes read from disk in this phase."""
    bytes_total: int | None = None
    """Bytes on disk of all sources of this phase; None where a source's size is not known."""
    documents: int = 0
    tokens: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    """Rows that gave no document, counted while encoding."""


@dataclass
class _Reporter:
    callback: Callable[[Progress], None] | None
    state: Progress = field(default_factory=lambda: Progress("survey"))
    skipped: Skipped = field(default_factory=Skipped)
    """To be counted in; also that of `state`."""

    def start(self, phase: str, read: Iterable[Source]) -> None:
        sizes = [source.size for source in read]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        self.state = Progress(phase, bytes_total=total)
        self.skipped = self.state.skipped
        self._tell()

    def on_read(self, count: int) -> None:
        self.state = replace(self.state, bytes_read=self.state.bytes_read + count)
        self._tell()

    def on_encoded(self, documents: int, tokens: int) -> None:
        self.state = replace(self.state, documents=documents, tokens=tokens)
        self._tell()

    def _tell(self) -> None:
        if self.callback is not None:
            self.callback(self.state)


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    vocab_size: int | None = None,
    valid: Sequence[str | Path] = (),
    valid_fraction: float | None = None,
    text_field: str | None = None,
    skip_null: bool = False,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    max_tokens: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> shards.TokenDataset:
    """Turn text into a token dataset.

    Args:
        inputs: files, folders and `hf:` names, see `bellbox.data.sources`.
        out: the folder to make.
        tokenizer: one to use; where None, a byte-level BPE is trained on the training split (on its first
            268 million characters where it is longer).
        vocab_size: entries of the tokenizer to train, 8,192 where None; not together with `tokenizer`.
        valid: files for the validation split. Without them a fraction of the documents is taken, chosen by
            a hash of their beginning, hence the same ones every time. Where that leaves a split without any (a
            single book, a shelf of them), it is the tail of the whole text instead.
        valid_fraction: that fraction, 0.01 where None; not together with `valid`.
        text_field: field of a table's rows (JSON, CSV, TSV, Parquet, datasets) that holds the text, `text` where None.
        skip_null: pass over rows whose text is null, which are refused otherwise. They are counted
            (`Progress.skipped`), and so are blank ones, which give no document in any case.
        shard_tokens: tokens a file.
        max_tokens: reading stops once the training split has so many tokens, at most a megabyte of text later. All
            where None.
        overwrite: replace a dataset that stands at `out`. Anything else there is never removed.
        progress: called now and then with a `Progress`.

    Raises:
        BellboxError: for a source, tokenizer or option that cannot be used, or an `out` that is not empty.
    """
    out = Path(out)
    size = size_to_train(tokenizer, vocab_size)
    if valid and valid_fraction is not None:
        raise BellboxError("validation files and a validation fraction were given; drop one of them")
    if not 1 <= shard_tokens <= _MOST_SHARD_TOKENS:
        raise BellboxError(f"shards of {shard_tokens} tokens: a shard holds from 1 to {_MOST_SHARD_TOKENS:,}")
    if text_field is not None and not text_field:
        raise BellboxError("the text field has no name; leave it out for 'text'")
    if max_tokens is not None and max_tokens < 1:
        raise BellboxError(f"at most {max_tokens} tokens: must be at least 1")
    fraction = DEFAULT_VALID_FRACTION if valid_fraction is None else valid_fraction
    if not 0.0 < fraction < 1.0:
        raise BellboxError(f"validation fraction {fraction}: must be between 0 and 1, both excluded")
    if not inputs:
        raise BellboxError("no input; name files, folders or hf:NAME")
    train_sources, valid_sources = sources.resolve(inputs), sources.resolve(valid)
    everything = train_sources + valid_sources
    _refuse_overlap(train_sources, valid_sources)
    if text_field is not None and all(source.kind == "text" for source in everything):
        raise BellboxError(
            f"text field '{text_field}': no input is JSON, CSV, TSV, Parquet or a dataset, so it has no fields"
        )
    _refuse_target(out, overwrite)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)

    reporter = _Reporter(progress)
    if skip_null and all(source.kind == "text" for source in everything):
        raise BellboxError(
            "rows to skip: no input is JSON, CSV, TSV, Parquet or a dataset, so it has no rows"
        )

    def rows() -> Rows:
        return Rows("text" if text_field is None else text_field, skip_null, reporter.skipped)

    budget = _Budget(max_tokens)
    head: int | None = None
    if not valid_sources:
        reporter.start("survey", train_sources)
        head = _head_to_cut(train_sources, rows(), fraction, reporter)

    def from_inputs() -> Iterator[tuple[str, Piece]]:
        router = _Router(None if valid_sources else fraction, head)
        for source in train_sources:
            for split, piece in router.route(source.pieces(rows(), reporter.on_read)):
                yield split, piece
                if piece.ends and budget.is_spent:
                    return

    def from_everything() -> Iterator[tuple[str, Piece]]:
        yield from from_inputs()
        for source in valid_sources:
            yield from (("valid", piece) for piece in source.pieces(rows(), reporter.on_read))

    if tokenizer is None:
        reporter.start("tokenizer", train_sources)
        texts = (piece.text for split, piece in from_inputs() if split == "train")
        tokenizer = Tokenizer.train(_at_most(texts, TOKENIZER_SAMPLE_CHARS), size)

    reporter.start("encode", everything)
    names = [source.name for source in everything]
    explanation = (
        "no text in the validation files"
        if valid_sources
        else f"nothing falls into the fraction {fraction:g}; raise --valid-fraction or give --valid FILE"
    )
    try:
        _write(
            out, from_everything(), tokenizer, names, shard_tokens, explanation, overwrite, reporter, budget
        )
    except OSError as error:
        raise BellboxError(f"{out}: cannot be written: {error.strerror or error}") from error
    return shards.TokenDataset.open(out)


def size_to_train(tokenizer: object, vocab_size: int | None) -> int:
    """Entries of the tokenizer that `prepare` would train.

    Raises:
        BellboxError: a size beside a tokenizer, or one that no tokenizer has.
    """
    if tokenizer is not None and vocab_size is not None:
        raise BellboxError(
            "a tokenizer and a vocabulary size were given; the size is the tokenizer's own: drop it"
        )
    size = DEFAULT_VOCAB if vocab_size is None else vocab_size
    check_vocab_size(size)
    return size


@dataclass
class _Budget:
    """Tokens that the training split may have."""

    most: int | None
    written: int = 0

    @property
    def is_spent(self) -> bool:
        return self.most is not None and self.written >= self.most


class _Router:
    """Sends each document to a split, piece by piece; all to training where there is no fraction.

    Args:
        fraction: of the documents, for validation.
        head: characters that are for training, where the whole text is cut in two instead.
    """

    def __init__(self, fraction: float | None, head: int | None) -> None:
        self._fraction, self._head = fraction, head

    def route(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, Piece]]:
        if self._head is not None:
            yield from self._cut(pieces, self._head)
            return
        split: str | None = None
        for piece in pieces:
            split = split or ("train" if self._fraction is None else _split_of(piece.text, self._fraction))
            yield split, piece
            if piece.ends:
                split = None

    def _cut(self, pieces: Iterable[Piece], head: int) -> Iterator[tuple[str, Piece]]:
        for piece in pieces:
            if head <= 0:
                yield "valid", piece
            elif len(piece.text) <= head:
                head -= len(piece.text)
                yield "train", Piece(piece.text, piece.ends or not head)
            else:
                cut = sources.cut_point(piece.text, head)
                head = 0
                yield "train", Piece(piece.text[:cut], True)
                yield "valid", Piece(piece.text[cut:], piece.ends)
        self._head = head  # the next source goes on from here


def _split_of(beginning: str, fraction: float) -> str:
    """A function of the document alone, so equal documents stay on one side."""
    place = int.from_bytes(hashlib.sha256(beginning.encode()).digest()[:7], "big") / (1 << 56)
    return "valid" if place < fraction else "train"


def _head_to_cut(read: Sequence[Source], rows: Rows, fraction: float, reporter: _Reporter) -> int | None:
    """Characters for training where the documents alone would leave a split empty; None where they do not.

    Stops reading as soon as each split has a document, which is early in a corpus of many.
    """
    total = 0
    seen: set[str] = set()
    for source in read:
        begins = True
        for piece in source.pieces(rows, reporter.on_read):
            if begins:
                seen.add(_split_of(piece.text, fraction))
                if len(seen) == 2:
                    return None
            begins = piece.ends
            total += len(piece.text)
    return total - round(total * fraction)


def _at_most(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text
        limit -= len(text)


def _refuse_overlap(train: Sequence[Source], valid: Sequence[Source]) -> None:
    names = set(map(sources.identity, train))
    for source in valid:
        if sources.identity(source) in names:
            raise BellboxError(
                f"{source.name}: both in the input and in the validation files; keep it in one"
            )


def _refuse_target(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        nearest = next(parent for parent in out.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise BellboxError(f"{nearest}: a file, so no folder can be made in it; name another")
        return
    if not out.is_dir() or out.is_symlink():
        raise BellboxError(f"{out}: stands there already and is no folder; name another")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise BellboxError(
            f"{out}: the folder is not empty; name another, or replace a dataset with --overwrite"
        )
    if not (out / shards.MANIFEST).is_file():
        raise BellboxError(f"{out}: not a token dataset, so it is not overwritten; name another folder")


def _write(
    out: Path,
    stream: Iterable[tuple[str, Piece]],
    tokenizer: Tokenizer,
    names: list[str],
    shard_tokens: int,
    explanation: str,
    overwrite: bool,
    reporter: _Reporter,
    budget: _Budget,
) -> None:
    dtype = shards.dtype_for(tokenizer.vocab_size)
    with new_folder(out, replaces=shards.MANIFEST) as folder:
        writers = {name: shards.ShardWriter(folder, name, dtype, shard_tokens) for name in shards.SPLITS}
        try:
            _encode(stream, tokenizer, writers, reporter, budget)
            entries = {name: writer.close() for name, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.abandon()
        if not entries["train"].bytes:
            raise BellboxError(
                "no text is left for training; give more text, or a smaller validation fraction"
            )
        if not entries["valid"].bytes:
            raise BellboxError(f"the validation split would be empty: {explanation}")
        tokenizer.save(folder / FILE_NAME)
        shards.write_manifest(
            folder,
            shards.Manifest(
                dtype=dtype,
                vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.end_of_text,
                tokenizer_sha256=tokenizer.sha256,
                sources=names,
                splits=entries,
            ),
        )
        _refuse_target(out, overwrite)  # it may have appeared while we worked


def _encode(
    stream: Iterable[tuple[str, Piece]],
    tokenizer: Tokenizer,
    writers: dict[str, shards.ShardWriter],
    reporter: _Reporter,
    budget: _Budget,
) -> None:
    end = np.array([tokenizer.end_of_text])
    waiting: list[tuple[str, Piece]] = []

    def flush() -> None:
        batch = tokenizer.encode_batch([piece.text for _, piece in waiting])
        for (split, piece), ids in zip(waiting, batch, strict=True):
            writers[split].append(ids, len(piece.text.encode()))
            if piece.ends:
                writers[split].append(end, 0)
                writers[split].documents += 1
        waiting.clear()
        budget.written = writers["train"].tokens
        reporter.on_encoded(
            sum(writer.documents for writer in writers.values()),
            sum(writer.tokens for writer in writers.values()),
        )

    size = 0
    for item in stream:
        waiting.append(item)
        size += len(item[1].text) + 1
        if size >= _BATCH_CHARS:
            flush()
            size = 0
    flush()
