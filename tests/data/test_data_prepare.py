from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_prose import sentences

from bellbox.data.prepare import Progress, prepare
from bellbox.data.shards import TokenDataset, TokenSplit
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError


def documents_of(split: TokenSplit) -> list[str]:
    ids = split.read(0, len(split)).tolist()
    tokenizer = split.dataset.tokenizer
    found, current = [], []
    for one in ids:
        if one == split.dataset.end_of_text:
            found.append(tokenizer.decode(current))
            current = []
        else:
            current.append(one)
    assert not current
    return found


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_every_document_comes_back_from_exactly_one_split(dataset: TokenDataset, documents: Path) -> None:
    expected = documents.read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    train, valid = documents_of(dataset.train), documents_of(dataset.valid)
    assert sorted(train + valid) == sorted(expected)
    assert 2 <= len(valid) <= 16
    assert (dataset.train.documents, dataset.valid.documents) == (len(train), len(valid))


def test_prepared_twice_it_is_the_same_to_the_byte(tmp_path: Path, documents: Path) -> None:
    for name in ("one", "two"):
        prepare([documents], tmp_path / name, vocab_size=300, valid_fraction=0.2)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["manifest.json", "tokenizer.json", "train-00000.bin", "valid-00000.bin"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_split_of_a_document_does_not_depend_on_the_others(
    tmp_path: Path, documents: Path, dataset: TokenDataset, small_tokenizer: Tokenizer
) -> None:
    more = tmp_path / "more.txt"
    more.write_text("another\n<|endoftext|>\n" + documents.read_text(encoding="utf-8"), encoding="utf-8")
    other = prepare([more], tmp_path / "other", tokenizer=small_tokenizer, valid_fraction=0.2)
    assert set(documents_of(dataset.valid)) <= set(documents_of(other.valid)) | {"another"}
    assert set(documents_of(dataset.train)) <= set(documents_of(other.train))


def test_a_trained_tokenizer_has_not_seen_the_validation_split(tmp_path: Path, documents: Path) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_text("zqzqzqzqzq " * 500)
    with_files = prepare([documents], tmp_path / "a", vocab_size=300, valid=[marked])
    assert not any("zq" in name for name in with_files.tokenizer.vocab)
    by_hash = prepare([documents], tmp_path / "b", vocab_size=300, valid_fraction=0.2)
    only_train = Tokenizer.train(documents_of(by_hash.train), 300)
    assert by_hash.tokenizer.text == only_train.text


@pytest.mark.parametrize("piece_chars", [300, 1 << 18])
def test_of_a_single_document_the_tail_is_held_out(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, piece_chars: int
) -> None:
    monkeypatch.setattr("bellbox.data.pieces.PIECE_CHARS", piece_chars)
    text = sentences(300)
    file = tmp_path / "book.txt"
    file.write_text(text, encoding="utf-8")
    made = prepare([file], tmp_path / "out", tokenizer=small_tokenizer, valid_fraction=0.1)
    (head,), (tail,) = documents_of(made.train), documents_of(made.valid)
    assert head + tail == text
    assert 0.09 < len(tail) / len(text) < 0.11
    assert made.train.bytes + made.valid.bytes == len(text.encode())


@pytest.mark.parametrize("piece_chars", [300, 1 << 18])
def test_of_a_few_documents_the_tail_of_the_text_is_held_out(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, piece_chars: int
) -> None:
    monkeypatch.setattr("bellbox.data.pieces.PIECE_CHARS", piece_chars)
    books = [sentences(100 + i) for i in range(6)]
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for number, book in enumerate(books):
        (shelf / f"{number}.txt").write_text(book, encoding="utf-8")
    made = prepare([shelf], tmp_path / "out", tokenizer=small_tokenizer, valid_fraction=0.02)
    train, valid = documents_of(made.train), documents_of(made.valid)
    assert train[:5] == books[:5]
    assert len(train) == 6
    assert train[5] + "".join(valid) == books[5]
    assert 0.01 < len("".join(valid)) / sum(map(len, books)) < 0.03


def test_the_tail_may_begin_in_any_document(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    rows = [f"row {i} of a short file" for i in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    made = prepare([file], tmp_path / "out", tokenizer=small_tokenizer, valid_fraction=0.4)
    # By their hashes all four rows would train: 60 % of the characters do instead.
    assert "".join(documents_of(made.train) + documents_of(made.valid)) == "".join(rows)
    assert made.train.documents == 3
    assert documents_of(made.valid)[-1] == rows[3]


def test_several_inputs_are_one_corpus_and_files_end_documents(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("no newline at the end")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": f"row {i}"}) for i in range(3)))
    (tmp_path / "v.txt").write_text("held out")
    made = prepare(
        [tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out", tokenizer=small_tokenizer,
        valid=[tmp_path / "v.txt"], text_field="body",
    )  # fmt: skip
    assert documents_of(made.train) == ["no newline at the end", "row 0", "row 1", "row 2"]
    assert documents_of(made.valid) == ["held out"]


def test_a_separator_inside_a_json_text_does_not_end_the_document(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\n<|endoftext|>\nb"}))
    (tmp_path / "v.txt").write_text("held out")
    made = prepare(
        [tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=small_tokenizer, valid=[tmp_path / "v.txt"]
    )
    assert documents_of(made.train) == ["a\n<|endoftext|>\nb"]


def test_options_that_contradict_or_do_nothing_are_refused(tmp_path: Path, documents: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    for options, message in [
        ({"tokenizer": tokenizer, "vocab_size": 300}, "the size is the tokenizer's own"),
        ({"valid": [tmp_path / "v.txt"], "valid_fraction": 0.1}, "drop one of them"),
        ({"valid_fraction": 0.0}, "validation fraction 0.0: must be between 0 and 1"),
        ({"valid_fraction": float("nan")}, "validation fraction nan"),
        ({"text_field": "body"}, "text field 'body': no input is JSON, CSV"),
        ({"shard_tokens": 0}, "shards of 0 tokens"),
        ({"tokenizer": tokenizer}, "no such tokenizer"),
        ({"valid": [documents]}, "both in the input and in the validation files"),
        ({"vocab_size": 100}, "vocabulary of 100: needs at least 257"),
        (
            {"valid_fraction": 1e-9},
            "validation split would be empty: nothing falls into the fraction 1e-09",
        ),
        ({"valid_fraction": 0.999999}, "no text is left for training|no text to train a tokenizer on"),
    ]:
        with pytest.raises(BellboxError, match=message):
            prepare([documents], tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert hidden(tmp_path) == []
    with pytest.raises(BellboxError, match="no input"):
        prepare([], tmp_path / "out")


def test_only_a_dataset_is_ever_overwritten_and_only_when_asked(
    tmp_path: Path, documents: Path, small_tokenizer: Tokenizer
) -> None:
    def again(out: Path, *, overwrite: bool = False) -> TokenDataset:
        return prepare([documents], out, tokenizer=small_tokenizer, valid_fraction=0.3, overwrite=overwrite)

    empty = tmp_path / "deep" / "empty"
    empty.mkdir(parents=True)
    first = again(empty)
    with pytest.raises(BellboxError, match="not empty; name another, or replace a dataset with --overwrite"):
        again(empty)
    (empty / "stray").write_text("from the first one")
    assert again(empty, overwrite=True).manifest == first.manifest
    assert not (empty / "stray").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(BellboxError):
            again(precious, overwrite=overwrite)
    assert (precious / "thesis.txt").read_text() == "years of work"
    with pytest.raises(BellboxError, match="is no folder"):
        again(precious / "thesis.txt", overwrite=True)
    assert hidden(empty.parent) == hidden(tmp_path) == []


def test_an_error_on_the_way_leaves_the_old_dataset_as_it_was(
    tmp_path: Path, documents: Path, dataset: TokenDataset, small_tokenizer: Tokenizer
) -> None:
    before = {path.name: path.read_bytes() for path in dataset.path.iterdir()}
    bad = tmp_path / "bad.txt"
    bad.write_bytes(documents.read_bytes() * 3 + b"\xff")
    with pytest.raises(BellboxError, match="not UTF-8 at byte"):
        prepare([bad], dataset.path, tokenizer=small_tokenizer, overwrite=True)
    assert {path.name: path.read_bytes() for path in dataset.path.iterdir()} == before
    assert hidden(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, documents: Path, small_tokenizer: Tokenizer
) -> None:
    with pytest.raises(BellboxError, match=r"documents\.txt: a file, so no folder can be made in it"):
        prepare([documents], documents / "out", tokenizer=small_tokenizer)


def test_the_folder_is_as_readable_as_any_other(dataset: TokenDataset, tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    assert dataset.path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_progress_ends_with_everything_read_and_counted(tmp_path: Path, documents: Path) -> None:
    states: list[Progress] = []
    made = prepare([documents], tmp_path / "out", vocab_size=300, valid_fraction=0.2, progress=states.append)
    assert list(dict.fromkeys(state.phase for state in states)) == ["survey", "tokenizer", "encode"]
    last = states[-1]
    assert last.bytes_read == last.bytes_total == documents.stat().st_size
    assert last.documents == made.train.documents + made.valid.documents == 40
    assert last.tokens == len(made.train) + len(made.valid)


def test_the_tokenizer_is_trained_on_a_bounded_part_of_a_long_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join([json.dumps({"text": "ab " * 100}), json.dumps({"text": "xy " * 100})])
    )
    (tmp_path / "v.txt").write_text("held out")
    monkeypatch.setattr("bellbox.data.prepare.TOKENIZER_SAMPLE_CHARS", 300)
    made = prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300, valid=[tmp_path / "v.txt"])
    assert "ab" in made.tokenizer.vocab
    assert "xy" not in made.tokenizer.vocab


@pytest.mark.slow
def test_preparing_takes_the_same_memory_however_long_the_text(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    small_tokenizer.save(tmp_path / "tokenizer.json")
    block = sentences(400).replace("\n", " ") + " "
    for name, megabytes in (("short", 3), ("long", 18)):
        with (tmp_path / name).open("w", encoding="utf-8") as file:
            for _ in range((megabytes << 20) // len(block.encode())):
                file.write(block)
    script = """
import resource, sys
from pathlib import Path
from bellbox.data.prepare import prepare
folder, peaks = Path(sys.argv[1]), []
for name in ("short", "long"):
    made = prepare([folder / name], folder / f"{name}-out", tokenizer=folder / "tokenizer.json")
    assert made.train.documents == 1 and made.train.bytes > 2 << 20
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    short, long = map(int, done.stdout.split())
    assert long - short < 12 << 10, f"peak memory went from {short} to {long} KiB"
