"""Text to token shards: train the tokenizer (unless one is given), encode in as many processes as wanted, assemble.

Nothing here grows with the corpus: pieces come in, tokens go out. The dataset is made in a hidden folder beside the
target and renamed when it is whole, so a killed run leaves no half-written dataset behind. What it leaves is that
folder, `.NAME.preparing`, from which the same call goes on; another call for the same target clears it away.

The corpus is cut into units (`units.py`), which processes make into parts (`processes.py`), of which shards are made
(`assemble.py`). The shards are the same for any number of processes, and after any number of kills.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bellbox.data import shards, sources, units
from bellbox.data.assemble import Assembler, Dropped
from bellbox.data.duplicates import PERMUTATIONS, check_threshold
from bellbox.data.processes import UnfinishedError, encode_apart, encode_here
from bellbox.data.sources import Source
from bellbox.data.tables import Rows, Skipped
from bellbox.data.tokenizer import FILE_NAME, Tokenizer, check_vocab_size
from bellbox.data.units import Job, Part, Unit, parts_of, router_of, split_of
from bellbox.errors import BellboxError, require
from bellbox.utils.files import lock, put_in_place, read_json, write_text
from bellbox.utils.processor import MAX_THREADS, usable_cores

DEFAULT_VOCAB = 8192
DEFAULT_VALID_FRACTION = 0.01
DEFAULT_SHARD_TOKENS = 1 << 27
DEFAULT_SIMILARITY = 0.8
_MOST_SHARD_TOKENS = 1 << 40
# A tokenizer learns nothing more from further text, and its table of words would go on growing.
TOKENIZER_SAMPLE_CHARS = 1 << 28
# A further process takes longer to start than less text to encode.
_BYTES_A_PROCESS = 1 << 24
_STATE = "state.json"
_TRAINED = "trained.json"
_GOES_ON = "what is prepared so far is kept, and the same command goes on from there"


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
    dropped: Dropped = field(default_factory=Dropped)
    """Documents that were dropped as duplicates."""
    kept_bytes: int = 0
    """Of the bytes read, those that an earlier call had read: it was killed, and this one goes on."""


@dataclass
class _Reporter:
    callback: Callable[[Progress], None] | None
    state: Progress = field(default_factory=lambda: Progress("survey"))
    skipped: Skipped = field(default_factory=Skipped)
    """To be counted in; also that of `state`."""

    def start(self, phase: str, read: Iterable[Source], kept: int = 0) -> None:
        sizes = [source.size for source in read]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        self.state = Progress(phase, bytes_read=kept, bytes_total=total, kept_bytes=kept)
        self.skipped = self.state.skipped
        self._tell()

    def on_read(self, count: int) -> None:
        self.state = replace(self.state, bytes_read=self.state.bytes_read + count)
        self._tell()

    def on_assembled(self, assembler: Assembler) -> None:
        writers = assembler.writers.values()
        self.state = replace(
            self.state,
            documents=sum(writer.documents for writer in writers),
            tokens=sum(writer.tokens for writer in writers),
            dropped=assembler.dropped,
        )
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
    deduplicate: Literal["exact", "near"] | None = None,
    similarity: float | None = None,
    processes: int | None = 1,
    resumable: bool = True,
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
        deduplicate: `exact` drops documents that are equal to an earlier one, `near` also those that resemble one
            (`bellbox.data.duplicates`, which says what each costs). Of validation files and the input, those of the
            input are dropped.
        similarity: Jaccard similarity from which on documents resemble each other, 0.8 where None; for `near`.
        processes: that encode; the result does not depend on it. Where None, as many as there are cores, and fewer
            where there is little text.
        resumable: keep what is done where the call is killed, stopped, or fails at a source or the disk, so that the
            same call goes on from there. Two such calls for one target refuse each other.
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
    if processes is not None and not 1 <= processes <= MAX_THREADS:
        raise BellboxError(f"{processes} processes: must be from 1 to {MAX_THREADS}")
    similarity = _similarity(deduplicate, similarity)
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
    if skip_null and all(source.kind == "text" for source in everything):
        raise BellboxError(
            "rows to skip: no input is JSON, CSV, TSV, Parquet or a dataset, so it has no rows"
        )
    job = Job(
        units=(),
        fraction=fraction,
        column="text" if text_field is None else text_field,
        skip_null=skip_null,
        # Duplicates count for nothing, and only who has seen all documents knows them.
        enough_tokens=max_tokens if deduplicate is None else None,
        permutations=PERMUTATIONS if deduplicate == "near" else 0,
        part_chars=units.PART_CHARS,
        batch_chars=units.BATCH_CHARS,
    )
    with _work_folder(out, resumable) as work:
        preparation = _Preparation(
            work=work,
            job=job,
            train=sources.expand(train_sources),
            valid=sources.expand(valid_sources),
            shard_tokens=shard_tokens,
            max_tokens=max_tokens,
            deduplicate=deduplicate,
            similarity=similarity,
            reporter=_Reporter(progress),
        )
        dataset = preparation.run(tokenizer, size, processes, [source.name for source in everything])
        _refuse_target(out, overwrite)  # it may have appeared while we worked
        (work / _STATE).unlink()  # nothing to go on from: the shards are about to leave this folder
        put_in_place(dataset, out.absolute(), shards.MANIFEST)
    return shards.TokenDataset.open(out)


def _similarity(deduplicate: str | None, similarity: float | None) -> float | None:
    if deduplicate not in (None, "exact", "near"):
        raise BellboxError(f"deduplicate {deduplicate!r}: there are exact and near")
    if deduplicate != "near":
        if similarity is not None:
            raise BellboxError(
                "a similarity is for near duplicates; give --deduplicate near, or leave it out"
            )
        return None
    require("datasketch", "dedup")
    similarity = DEFAULT_SIMILARITY if similarity is None else similarity
    check_threshold(similarity)
    return similarity


@dataclass
class _Preparation:
    """One call, in a folder where an earlier one may have been killed."""

    work: Path
    job: Job
    train: list[Source]
    valid: list[Source]
    shard_tokens: int
    max_tokens: int | None
    deduplicate: str | None
    similarity: float | None
    reporter: _Reporter

    def run(
        self, tokenizer: Tokenizer | None, vocab_size: int, processes: int | None, names: list[str]
    ) -> Path:
        """Make the dataset; returns its folder."""
        state = self._open(tokenizer, vocab_size)
        lengths: list[int] | None = state.get("lengths")
        if not self.valid and "lengths" not in state:
            self.reporter.start("survey", self.train)
            lengths = self._survey()
            self._remember({**state, "lengths": lengths})
        self.job = replace(self.job, units=tuple(self._units(lengths)))
        self._drop_changed_units()
        tokenizer = self._tokenizer(tokenizer, vocab_size)
        assembler = self._encode(tokenizer, processes)
        return self._finish(assembler, tokenizer, names)

    def _open(self, tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
        """What an earlier call with the same options has left, once everything else is cleared away."""
        asked = {
            **self.job.options(),
            "train": [[source.name, source.shard] for source in self.train],
            "valid": [[source.name, source.shard] for source in self.valid],
            "shard_tokens": self.shard_tokens,
            "max_tokens": self.max_tokens,
            "deduplicate": self.deduplicate,
            "similarity": self.similarity,
            "tokenizer": vocab_size if tokenizer is None else [tokenizer.sha256, tokenizer.end_of_text],
        }
        looks = [unit.look() for unit in units.grouped([*self.train, *self.valid])]
        wanted = json.loads(json.dumps({"asked": asked, "looks": looks}))
        found = read_json(self.work / _STATE) if (self.work / _STATE).is_file() else {}
        if found.get("asked") == wanted["asked"]:
            if found.get("looks") == wanted["looks"]:
                return found
            if tokenizer is not None:  # else it was trained on what the files held before
                self._remember(wanted)
                return wanted
        self._clear()
        self._remember(wanted)
        return wanted

    def _remember(self, state: dict[str, Any]) -> None:
        write_text(self.work / _STATE, json.dumps(state))

    def _clear(self) -> None:
        for entry in self.work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()
        (self.work / "parts").mkdir()

    def _drop_changed_units(self) -> None:
        """A unit with a changed file is made anew; where parts of it stand in shards already, everything is."""
        file = self.work / "units.json"
        looks = json.loads(json.dumps([unit.look() for unit in self.job.units]))
        before = read_json(file)["units"] if file.is_file() else looks
        parts = self.work / "parts"
        changed = [n for n, look in enumerate(looks) if n >= len(before) or look != before[n]]
        if len(before) > len(looks) or any(parts_of(parts, number) for number in changed):
            state = read_json(self.work / _STATE)
            self._clear()
            self._remember(state)
        for stray in parts.glob("writing-*"):
            stray.unlink()
        write_text(file, json.dumps({"units": looks}))

    def _rows(self) -> Rows:
        return Rows(self.job.column, self.job.skip_null, self.reporter.skipped)

    def _survey(self) -> list[int] | None:
        """Characters of each source where the documents alone would leave a split empty; None where they do not.

        Stops reading as soon as each split has a document, which is early in a corpus of many.
        """
        lengths: list[int] = []
        seen: set[str] = set()
        for source in self.train:
            begins, length = True, 0
            for piece in source.pieces(self._rows(), self.reporter.on_read):
                if begins:
                    seen.add(split_of(piece.text, self.job.fraction))
                    if len(seen) == 2:
                        return None
                begins = piece.ends
                length += len(piece.text)
            lengths.append(length)
        return lengths

    def _units(self, lengths: list[int] | None) -> list[Unit]:
        if self.valid:
            # First: of two equal documents, the one to validate with is kept.
            return [*units.grouped(self.valid, "valid"), *units.grouped(self.train, "train")]
        found = units.grouped(self.train)
        if lengths is None:
            return found
        total = sum(lengths)
        head, place, cut = total - round(total * self.job.fraction), 0, list[Unit]()
        for unit in found:
            cut.append(replace(unit, head=max(0, head)))
            head -= sum(lengths[place : place + len(unit.sources)])
            place += len(unit.sources)
        return cut

    def _tokenizer(self, given: Tokenizer | None, vocab_size: int) -> Tokenizer:
        """The one that is given or was trained before, else one trained now; the processes find it in the folder."""
        trained = self.work / _TRAINED
        if given is None and trained.is_file():
            given = Tokenizer.load(trained)
        elif given is None:
            self.reporter.start("tokenizer", self.train)
            given = Tokenizer.train(_at_most(self._training_text(), TOKENIZER_SAMPLE_CHARS), vocab_size)
            given.save(trained)
        given.save(self.work / FILE_NAME)
        return given

    def _training_text(self) -> Iterator[str]:
        for unit in self.job.units:
            if unit.split == "valid":
                continue
            router = router_of(unit, self.job.fraction)
            for source in unit.sources:
                for split, piece in router.route(source.pieces(self._rows(), self.reporter.on_read)):
                    if split == "train":
                        yield piece.text

    def _encode(self, tokenizer: Tokenizer, processes: int | None) -> Assembler:
        parts, dataset = self.work / "parts", self.work / "dataset"
        if not (self.work / "journal.json").is_file():
            shutil.rmtree(dataset, ignore_errors=True)
            dataset.mkdir()
        assembler = Assembler(
            self.job,
            self.work,
            shards.dtype_for(tokenizer.vocab_size),
            self.shard_tokens,
            most_tokens=self.max_tokens,
            exact=self.deduplicate is not None,
            similarity=self.similarity,
        )
        whole = [unit for n, unit in enumerate(self.job.units) if _is_whole(parts, n)]
        self.reporter.start("encode", [*self.train, *self.valid], sum(unit.size or 0 for unit in whole))
        wanted = iter(range(len(self.job.units)))
        count = min(len(self.job.units), self._choose() if processes is None else processes)
        said = (
            encode_here(self.job, self.work, tokenizer, wanted)
            if count == 1
            else encode_apart(self.job, self.work, tokenizer.end_of_text, wanted, count)
        )
        failed: dict[int, str] = {}
        try:
            for message in said:
                if "read" in message:
                    self.reporter.on_read(message["read"])
                    continue
                if "error" in message:
                    failed[message["unit"]] = message["error"]
                while not assembler.is_done and (part := Part.find(parts, assembler.unit, assembler.part)):
                    self._count(part)
                    assembler.take(part)
                    self.reporter.on_assembled(assembler)
                if assembler.is_done:
                    break
                # Only where its turn has come: what lies behind the budget is not needed, however it was read.
                if assembler.unit in failed:
                    raise UnfinishedError(failed[assembler.unit])
        except BaseException:
            for writer in assembler.writers.values():
                writer.abandon()
            raise
        finally:
            said.close()
        return assembler

    def _count(self, part: Part) -> None:
        if part.is_last:
            self.reporter.skipped.blank += part.skipped.blank
            self.reporter.skipped.null += part.skipped.null

    def _choose(self) -> int:
        sizes = [unit.size for unit in self.job.units]
        cores = usable_cores()
        known = sum(size for size in sizes if size is not None)
        return cores if None in sizes else max(1, min(cores, known // _BYTES_A_PROCESS))

    def _finish(self, assembler: Assembler, tokenizer: Tokenizer, names: list[str]) -> Path:
        entries = {name: writer.close() for name, writer in assembler.writers.items()}
        if not entries["train"].bytes:
            raise BellboxError(
                "no text is left for training; give more text, or a smaller validation fraction"
            )
        if not entries["valid"].bytes:
            nothing = f"nothing falls into the fraction {self.job.fraction:g}"
            why = (
                "no text in the validation files"
                if self.valid
                else f"{nothing}; raise --valid-fraction or give --valid FILE"
            )
            raise BellboxError(f"the validation split would be empty: {why}")
        folder = self.work / "dataset"
        tokenizer.save(folder / FILE_NAME)
        shards.write_manifest(
            folder,
            shards.Manifest(
                dtype=shards.dtype_for(tokenizer.vocab_size),
                vocab_size=tokenizer.vocab_size,
                end_of_text=tokenizer.end_of_text,
                tokenizer_sha256=tokenizer.sha256,
                sources=names,
                splits=entries,
            ),
        )
        return folder


def _is_whole(parts: Path, unit: int) -> bool:
    found = parts_of(parts, unit)
    return bool(found) and found[-1].is_last


@contextmanager
def _work_folder(out: Path, resumable: bool) -> Iterator[Path]:
    """Where a dataset is made, beside its place. What is in it stays where going on from it is of use."""
    target = out.absolute()
    stays = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if resumable:
            work = target.parent / f".{target.name}.preparing"
            work.mkdir(exist_ok=True)
        else:
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with lock(work, "preparing"):
            try:
                yield work
            except BaseException as error:
                done = any((work / "parts").glob("*.json")) or (work / _TRAINED).is_file()
                # What else is refused would be refused again, or needs other options.
                stays = (
                    resumable
                    and done
                    and (isinstance(error, UnfinishedError) or not isinstance(error, BellboxError))
                )
                raise
            finally:
                if not stays:
                    shutil.rmtree(work, ignore_errors=True)
    except UnfinishedError as error:
        raise (BellboxError(f"{error}; {_GOES_ON}") if stays else error) from error
    except OSError as error:
        what = f"{out}: cannot be written: {error.strerror or error}"
        raise BellboxError(f"{what}; {_GOES_ON}" if stays else what) from error


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
