"""Turn text into token shards, and look at them.

bellbox data prepare books/ --out data/books --vocab-size 4096
bellbox data prepare corpus.jsonl.zst --out data/corpus --tokenizer data/books/tokenizer.json
bellbox data prepare hf:allenai/c4:en --out data/c4 --tokenizer data/books/tokenizer.json --max-tokens 3000000000
bellbox data info data/books --verify
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from bellbox.cli.output import parse_flags, refuse_file_name
from bellbox.errors import require

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

if TYPE_CHECKING:
    from bellbox.data.prepare import Progress
    from bellbox.data.shards import TokenDataset


@dataclass(frozen=True)
class Prepare:
    """Turn text into a token dataset: tokenizer, shards, manifest."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT ...")]
    """Text files (plain, .gz, .xz, .zst), tables (.jsonl, .json, .csv, .tsv, .parquet), folders of them, or
    hf:NAME[:CONFIG][:SPLIT]. In text files a line <|endoftext|> separates documents; of a table each row is one."""
    out: Path
    """The folder to make."""
    tokenizer: Path | None = None
    """Use this one: a tokenizer.json, a sentencepiece model, or a folder with one; else one is trained."""
    vocab_size: int | None = None
    """Entries of the byte-level BPE to train; 8,192 where not given."""
    valid: tuple[str, ...] = ()
    """Files for the validation split; else a fraction of the documents, or the tail of the text where they are few."""
    valid_fraction: float | None = None
    """That fraction; 0.01 where not given."""
    text_field: str | None = None
    """The field of a table's or data set's rows that holds the text; `text` where not given."""
    skip_null: bool = False
    """Pass over rows whose text is null; they are counted."""
    shard_tokens: int = 1 << 27
    """Tokens a shard file."""
    max_tokens: int | None = None
    """Stop reading once the training split has so many tokens, at most a megabyte of text later."""
    deduplicate: Literal["exact", "near"] | None = None
    """Drop documents that are equal to an earlier one (exact), or also those that resemble one (near, by MinHash)."""
    similarity: float | None = None
    """For near: the Jaccard similarity of runs of five words from which on documents resemble; 0.8 where not given."""
    processes: int | None = None
    """Processes that encode; the result is the same. Where not given one a core, fewer for little text."""
    overwrite: bool = False
    """Replace a dataset that stands at --out."""


@dataclass(frozen=True)
class Info:
    """Show what a token dataset holds."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A folder that prepare wrote, or: classics."""
    verify: bool = False
    """Read all shards and compare their checksums."""


def main(argv: list[str]) -> None:
    """Run `bellbox data` with the arguments after that.

    Raises:
        BellboxError: for input or options that cannot be used.
    """
    command = parse_flags(Prepare | Info, argv, "bellbox data", __doc__)
    if isinstance(command, Prepare):
        _prepare(command)
    else:
        _info(command)


def _prepare(command: Prepare) -> None:
    from bellbox.data.prepare import prepare

    refuse_file_name(command.out)
    with _Bars() as bars:
        dataset = prepare(
            command.inputs,
            command.out,
            tokenizer=command.tokenizer,
            vocab_size=command.vocab_size,
            valid=command.valid,
            valid_fraction=command.valid_fraction,
            text_field=command.text_field,
            skip_null=command.skip_null,
            shard_tokens=command.shard_tokens,
            max_tokens=command.max_tokens,
            deduplicate=command.deduplicate,
            similarity=command.similarity,
            processes=command.processes,
            overwrite=command.overwrite,
            progress=bars.update,
        )
    _print(dataset)
    skipped = bars.state.skipped
    if skipped.blank or skipped.null:
        print(f"rows without a document: {skipped.blank:,} blank, {skipped.null:,} null")
    if command.deduplicate is not None:
        dropped = bars.state.dropped
        print(f"duplicates dropped: {dropped.equal:,} equal, {dropped.similar:,} similar documents")
    if bars.state.kept_bytes:
        print(f"went on from an earlier call: {bars.state.kept_bytes:,} bytes of text were encoded already")
    asked = command.vocab_size
    if asked is not None and dataset.vocab_size < asked:
        print(
            f"the text has no more pairs to merge: {dataset.vocab_size:,} of the {asked:,} entries asked for"
        )


def _info(command: Info) -> None:
    import bellbox.data

    dataset = bellbox.data.open(command.folder, verify=command.verify)
    _print(dataset)
    if command.verify:
        print("verified: all checksums match")


def _print(dataset: TokenDataset) -> None:
    manifest = dataset.manifest
    print(f"{dataset.path}")
    print(f"  tokenizer  {manifest.vocab_size:,} entries, sha256 {manifest.tokenizer_sha256[:16]}")
    for name, split in dataset.splits.items():
        shards = len(manifest.splits[name].shards)
        print(
            f"  {name:<9}  {len(split):,} tokens ({manifest.dtype}, {shards} shard{'s' * (shards != 1)}), "
            f"{split.documents:,} document{'s' * (split.documents != 1)}, {split.bytes:,} bytes, "
            f"{split.bytes / len(split):.3f} bytes per token"
        )


def _counts(state: Progress) -> str:
    return f"{state.documents:,} docs, {state.tokens / 1e6:.2f}M tokens"


_LABELS = {"survey": "survey", "tokenizer": "tokenizer", "encode": "encoding"}


class _Bars:
    """One bar a phase, on standard error: bytes, rate, documents, tokens, time left where it is known.

    Where that is no terminal, one line at the end: an error then stands alone.
    """

    def __init__(self) -> None:
        progress: Any = require("rich.progress", "cli")
        console: Any = require("rich.console", "cli").Console(stderr=True)
        self._live: bool = console.is_terminal
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=12),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TextColumn("{task.fields[counts]}"),
            progress.TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._state: Progress | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._tasks:
            self._bar.stop()
        elif kind is None and self._state is not None:
            state = self._state
            print(f"{_LABELS[state.phase]}: {state.bytes_read:,} bytes, {_counts(state)}", file=sys.stderr)

    @property
    def state(self) -> Progress:
        """The last one told."""
        assert self._state is not None
        return self._state

    def update(self, state: Progress) -> None:
        """Show a state; the bar of its phase appears with the first."""
        self._state = state
        if not self._live:
            return
        if state.phase not in self._tasks:
            self._bar.start()  # not before there is something to show: an error line then stands alone
            if "survey" in self._tasks:  # it stops early, as a rule; a bar that never fills would puzzle
                self._bar.update(self._tasks["survey"], visible=False)
            self._tasks[state.phase] = self._bar.add_task(
                _LABELS[state.phase], total=state.bytes_total, counts=""
            )
        counts = _counts(state) if state.tokens else ""
        self._bar.update(self._tasks[state.phase], completed=state.bytes_read, counts=counts)
