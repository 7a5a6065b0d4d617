"""Preparation in several processes: the same shards, after any kill, without what was done being done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_prose import sentences

from bellbox.data import duplicates, shards, units
from bellbox.data.prepare import Progress, prepare
from bellbox.data.shards import ShardWriter, TokenDataset
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from waiting import finish, wait_for


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit for each file, several parts in it."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    monkeypatch.setattr(units, "PART_CHARS", 3000)
    monkeypatch.setattr(units, "BATCH_CHARS", 1000)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Five files, one of them a single long document, one with documents that others have too."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        rows = [{"text": f"File {number}, row {i}. {sentences(6, 100 * number + i)}"} for i in range(20)]
        if number == 3:
            rows[5:15] = [{"text": f"File 1, row {i}. {sentences(6, 100 + i)}"} for i in range(10)]
        (folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "4.txt").write_text(sentences(300, 4))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(made: TokenDataset) -> list[str]:
    texts: list[str] = []
    for split in made.splits.values():
        ids = split.read(0, len(split))
        parts = np.split(ids, np.flatnonzero(ids == made.end_of_text) + 1)[:-1]
        texts += [made.tokenizer.decode(part[:-1]) for part in parts]
    return texts


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
def test_the_shards_do_not_depend_on_the_number_of_processes(tmp_path: Path, corpus: Path) -> None:
    options = {"vocab_size": 300, "valid_fraction": 0.2, "shard_tokens": 900}
    made = {n: prepare([corpus], tmp_path / f"by{n}", processes=n, **options) for n in (1, 2, 3)}
    assert len(made[1].manifest.splits["train"].shards) > 5
    assert content(tmp_path / "by1") == content(tmp_path / "by2") == content(tmp_path / "by3")
    TokenDataset.open(tmp_path / "by2", verify=True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nor_on_how_the_text_is_cut_into_units_and_parts(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bellbox.data.pieces.PIECE_CHARS", 300)
    options = {"vocab_size": 300, "valid_fraction": 0.2, "shard_tokens": 900, "deduplicate": "exact"}
    whole = prepare([corpus], tmp_path / "whole", **options)
    for name, value in (("UNIT_BYTES", 1), ("PART_CHARS", 700), ("BATCH_CHARS", 300)):
        monkeypatch.setattr(units, name, value)
    prepare([corpus], tmp_path / "cut", **options)
    assert content(tmp_path / "cut") == content(whole.path)


PREPARE = """
import sys
from pathlib import Path
from bellbox.data import units
from bellbox.data.prepare import prepare
units.UNIT_BYTES, units.PART_CHARS, units.BATCH_CHARS = 1, 3000, 1000
corpus, out, tokenizer, processes = sys.argv[1:]
prepare([corpus], out, tokenizer=tokenizer, valid_fraction=0.2, shard_tokens=900, deduplicate="exact",
        processes=int(processes))
"""


@pytest.mark.parametrize(("processes", "kills"), [(1, (3,)), pytest.param(2, (2, 9), marks=pytest.mark.slow)])
def test_a_killed_preparation_goes_on_without_doing_finished_parts_again(
    tmp_path: Path,
    corpus: Path,
    small_tokenizer: Tokenizer,
    processes: int,
    kills: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (corpus / "5.jsonl").write_text(
        "\n".join(json.dumps({"text": sentences(30, 900 + i)}) for i in range(200))
    )
    small_tokenizer.save(tmp_path / "tokenizer.json")
    out, work = tmp_path / "out", tmp_path / ".out.preparing"
    command = [sys.executable, "-c", PREPARE, corpus, out, tmp_path / "tokenizer.json", processes]
    for wanted in kills:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(
            lambda w=wanted, p=process: len(list(work.glob("parts/*.json"))) >= w or p.poll() is not None,
            "parts", process.pid,
        )  # fmt: skip
        os.kill(process.pid, signal.SIGKILL)
        finish(process)
        assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    there = {path.name: path.stat().st_mtime_ns for path in work.glob("parts/*.json")}
    assert len(there) >= kills[-1]
    for name, value in (("UNIT_BYTES", 1), ("PART_CHARS", 3000), ("BATCH_CHARS", 1000)):
        monkeypatch.setattr(units, name, value)
    encoded: list[int] = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer,
        "encode_batch",
        lambda self, texts: (encoded.append(sum(map(len, texts))), encode(self, texts))[1],
    )
    states: list[Progress] = []
    options = {"valid_fraction": 0.2, "shard_tokens": 900, "deduplicate": "exact"}
    made = prepare([corpus], out, tokenizer=small_tokenizer, progress=states.append, **options)
    again = sum(encoded)
    encoded.clear()
    fresh = prepare([corpus], tmp_path / "fresh", tokenizer=small_tokenizer, **options)
    assert content(made.path) == content(fresh.path)
    # Each finished part has at least 3,000 characters, but for the last one of a unit.
    assert again <= sum(encoded) - 3000 * (len(there) - 6)
    assert not work.exists()


def test_a_source_that_fails_leaves_the_others_done(
    tmp_path: Path, corpus: Path, small_tokenizer: Tokenizer, small_units: None
) -> None:
    bad = corpus / "2.jsonl"
    good = bad.read_text()
    bad.write_text('{"text": "once"}\n{"text": \n')
    out = tmp_path / "out"
    with pytest.raises(
        BellboxError, match=r"2\.jsonl:2: not a line of JSON.*; what is prepared so far is kept"
    ):
        prepare([corpus], out, tokenizer=small_tokenizer, valid_fraction=0.2)
    assert not out.exists()
    before = {
        path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".out.preparing/parts/00000[01]*.json")
    }
    assert before
    bad.write_text(good)
    states: list[Progress] = []
    prepare([corpus], out, tokenizer=small_tokenizer, valid_fraction=0.2, progress=states.append)
    assert states[-1].kept_bytes == sum((corpus / f"{n}.jsonl").stat().st_size for n in (0, 1))
    fresh = prepare([corpus], tmp_path / "fresh", tokenizer=small_tokenizer, valid_fraction=0.2)
    assert content(out) == content(fresh.path)


def test_other_options_or_a_changed_file_begin_anew(
    tmp_path: Path, corpus: Path, small_tokenizer: Tokenizer, small_units: None
) -> None:
    def killed(state: Progress) -> None:
        if state.tokens > 1500:
            raise KeyboardInterrupt

    for number, (change, options) in enumerate((("nothing", {"shard_tokens": 800}), ("first", {}))):
        out = tmp_path / f"out{number}"
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], out, tokenizer=small_tokenizer, valid_fraction=0.2, progress=killed)
        assert list((tmp_path / f".out{number}.preparing" / "parts").glob("*.json"))
        if change == "first":
            (corpus / "0.jsonl").write_text(
                json.dumps({"text": "another"}) + "\n" + (corpus / "0.jsonl").read_text()
            )
        made = prepare([corpus], out, tokenizer=small_tokenizer, valid_fraction=0.2, **options)
        fresh = prepare(
            [corpus], tmp_path / f"fresh{number}", tokenizer=small_tokenizer, valid_fraction=0.2, **options
        )
        assert content(made.path) == content(fresh.path)


def test_two_at_once_for_one_target_refuse_each_other(
    tmp_path: Path, corpus: Path, small_tokenizer: Tokenizer
) -> None:
    refused: list[str] = []

    def meanwhile(state: Progress) -> None:
        if not refused:
            with pytest.raises(BellboxError) as caught:
                prepare([corpus], tmp_path / "out", tokenizer=small_tokenizer)
            refused.append(str(caught.value))

    prepare([corpus], tmp_path / "out", tokenizer=small_tokenizer, valid_fraction=0.2, progress=meanwhile)
    assert refused[0].startswith("another process is preparing")


def test_a_process_that_is_killed_ends_the_preparation_in_one_line(
    tmp_path: Path,
    corpus: Path,
    small_tokenizer: Tokenizer,
    small_units: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bellbox.data import processes

    started: list[subprocess.Popen[str]] = []

    class Popen(subprocess.Popen[str]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            started.append(self)
            self.send_signal(signal.SIGKILL)

    monkeypatch.setattr(processes.subprocess, "Popen", Popen)
    with pytest.raises(BellboxError, match=r"was killed by signal 9.*take fewer --processes"):
        prepare([corpus], tmp_path / "out", tokenizer=small_tokenizer, valid_fraction=0.2, processes=2)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_equal_documents_are_dropped_but_for_the_first(
    tmp_path: Path, corpus: Path, small_tokenizer: Tokenizer, small_units: None
) -> None:
    options = {"tokenizer": small_tokenizer, "valid_fraction": 0.2}
    every = documents_of(prepare([corpus], tmp_path / "every", **options))
    states: list[Progress] = []
    made = prepare([corpus], tmp_path / "once", deduplicate="exact", progress=states.append, **options)
    once = documents_of(made)
    assert len(every) == 81
    assert len(once) == 71
    assert sorted(once) == sorted(set(every))
    assert states[-1].dropped.equal == 10
    # What is validated with is not trained on.
    (tmp_path / "valid.jsonl").write_text((corpus / "1.jsonl").read_text())
    held = prepare(
        [corpus],
        tmp_path / "held",
        tokenizer=small_tokenizer,
        valid=[tmp_path / "valid.jsonl"],
        deduplicate="exact",
    )
    assert (held.valid.documents, held.train.documents) == (20, 51)


def test_similar_documents_are_dropped(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    pytest.importorskip("datasketch")
    long = sentences(60, 7)
    edited = long.replace(long.split()[100], "elsewhere", 1)
    texts = [long, sentences(60, 8), edited, long, sentences(60, 9)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "v.txt").write_text("held out")
    states: list[Progress] = []
    made = [
        prepare([tmp_path / "a.jsonl"], tmp_path / f"out{n}", tokenizer=small_tokenizer, valid=[tmp_path / "v.txt"],
                deduplicate="near", processes=n, progress=states.append)
        for n in (1, 2)
    ]  # fmt: skip
    assert content(made[0].path) == content(made[1].path)
    assert documents_of(made[0]) == [long, texts[1], texts[4], "held out"]
    assert (states[-1].dropped.equal, states[-1].dropped.similar) == (1, 1)


def test_seen_hashes_are_those_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_MOST_RUNS", 3)
    numbers = np.random.default_rng(0).integers(-(2**62), 2**62, 400)
    stream = np.random.default_rng(1).choice(numbers, 2000)
    seen, known, expected = duplicates.Seen(), set(), []
    for value in stream.tolist():
        expected.append(value not in known)
        known.add(value)
    found = np.concatenate([seen.new(stream[at : at + 90]) for at in range(0, 2000, 90)])
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"processes": 0}, "0 processes: must be from 1"),
        ({"similarity": 0.8}, "a similarity is for near duplicates"),
        ({"deduplicate": "fuzzy"}, "there are exact and near"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, corpus: Path, options, says) -> None:
    with pytest.raises(BellboxError, match=says):
        prepare([corpus], tmp_path / "out", **options)


@pytest.mark.slow
def test_a_dataset_of_several_files_is_streamed_file_by_file(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "stories"
    folder.mkdir()
    texts = [[f"file {n}, story {i}: {sentences(4, 50 * n + i)}" for i in range(12)] for n in range(3)]
    for number, rows in enumerate(texts):
        parquet.write_table(arrow.table({"text": rows}), folder / f"train-{number:05d}-of-00003.parquet")
    made = [
        prepare(
            [f"hf:{folder}"], tmp_path / f"by{n}", tokenizer=small_tokenizer, valid_fraction=0.2, processes=n
        )
        for n in (1, 2)
    ]
    assert sorted(documents_of(made[0])) == sorted(text for rows in texts for text in rows)
    assert content(made[0].path) == content(made[1].path)
    assert made[0].manifest.sources == [f"hf:{folder}"]
    # Cut at a budget, it is the beginning of the same stream.
    monkeypatch.setattr("bellbox.data.assemble.MARGIN", 1)
    part = prepare(
        [f"hf:{folder}"], tmp_path / "part", tokenizer=small_tokenizer, valid_fraction=0.2, max_tokens=900
    )
    assert 900 <= len(part.train) < len(made[0].train)
    assert (part.train.read(0, len(part.train)) == made[0].train.read(0, len(part.train))).all()


def write_ids(folder: Path, ids: list[int], vocab_size: int, tokenizer: Tokenizer) -> TokenDataset:
    folder.mkdir()
    dtype = shards.dtype_for(vocab_size)
    entries = {}
    for name in shards.SPLITS:
        writer = ShardWriter(folder, name, dtype, 100)
        writer.append(np.array(ids), 3)
        writer.documents = 1
        entries[name] = writer.close()
    tokenizer.save(folder / "tokenizer.json")
    shards.write_manifest(
        folder,
        shards.Manifest(
            dtype=dtype, vocab_size=vocab_size, end_of_text=0, tokenizer_sha256=tokenizer.sha256, sources=["a"],
            splits=entries,
        ),
    )  # fmt: skip
    return TokenDataset.open(folder, verify=True)


def test_ids_above_65535_do_not_wrap(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    ids = [65535, 65536, 69999, 0]
    made = write_ids(tmp_path / "large", ids, 70_000, small_tokenizer)
    assert made.train.read(0, 4).tolist() == ids
    assert made.manifest.dtype == "uint32"
    with pytest.raises(BellboxError, match="token id 69999 does not fit into uint16, which holds 0 to 65535"):
        ShardWriter(tmp_path, "train", "uint16", 10).append(np.array(ids), 3)
    # As the wrong type, with checksums that fit.
    for dtype in ("uint16", "uint32"):
        vocab_size = 70_000 if dtype == "uint16" else 300
        shards.write_manifest(
            made.path, made.manifest.model_copy(update={"dtype": dtype, "vocab_size": vocab_size})
        )
        with pytest.raises(BellboxError, match=f"says {dtype} for {vocab_size} tokens, which are stored as"):
            TokenDataset.open(made.path)


def test_a_tokenizer_of_70000_entries_is_encoded_with_whole(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(small_tokenizer.text)
    names = [f"<w{i}>" for i in range(70_000 - small_tokenizer.vocab_size)]
    backend.add_tokens([AddedToken(name, normalized=False) for name in names])
    (tmp_path / "large.json").write_text(backend.to_str())
    wanted = [65535, 65536, 69999]
    (tmp_path / "a.txt").write_text("".join(names[i - small_tokenizer.vocab_size] for i in wanted))
    (tmp_path / "v.txt").write_text("held out")
    made = prepare(
        [tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "large.json", valid=[tmp_path / "v.txt"]
    )
    assert made.vocab_size == 70_000
    assert made.train.read(0, 4).tolist() == [*wanted, made.end_of_text]
