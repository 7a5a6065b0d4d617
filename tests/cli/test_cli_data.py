from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bellbox.cli.main import main
from bellbox.data import TokenDataset


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of `bellbox data ARGUMENTS`."""
    code = 0
    try:
        main(["data", *map(str, arguments)])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text("\n<|endoftext|>\n".join(f"chapter {i}, of a bell and a box " * 20 for i in range(30)))
    return file


def test_prepare_makes_a_dataset_and_sums_it_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, book: Path
) -> None:
    out = tmp_path / "set"
    code, text, progress = run(
        capsys,
        "prepare",
        book,
        "--out",
        out,
        "--vocab-size",
        300,
        "--valid-fraction",
        0.2,
        "--shard-tokens",
        500,
    )
    assert code == 0
    made = TokenDataset.open(out, verify=True)
    assert made.vocab_size == 300
    assert f"{len(made.train):,} tokens" in text
    assert f"{made.valid.bytes / len(made.valid):.3f} bytes per token" in text
    assert "encoding" in progress
    assert run(capsys, "info", out, "--verify") == (0, text + "verified: all checksums match\n", "")


def test_every_option_reaches_the_library(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, book: Path
) -> None:
    first = tmp_path / "first"
    assert run(capsys, "prepare", book, "--out", first, "--vocab-size", 280, "--valid-fraction", 0.3)[0] == 0
    rows, held_out = tmp_path / "rows.jsonl", tmp_path / "held.txt"
    rows.write_text("\n".join(json.dumps({"body": f"row {i}"}) for i in range(5)))
    held_out.write_text("held out")
    second = tmp_path / "second"
    options = ["--tokenizer", first, "--valid", held_out, "--text-field", "body", "--shard-tokens", "7"]
    assert run(capsys, "prepare", rows, "--out", second, *options)[0] == 0
    made = TokenDataset.open(second)
    assert made.tokenizer.text == TokenDataset.open(first).tokenizer.text
    assert made.train.documents == 5
    assert made.valid.bytes == len("held out")
    assert made.manifest.splits["train"].shards[0].tokens == 7
    assert run(capsys, "prepare", rows, "--out", second, *options)[0] == 2
    assert run(capsys, "prepare", rows, "--out", second, *options, "--overwrite")[0] == 0


def test_a_vocabulary_that_could_not_be_filled_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, book: Path
) -> None:
    _, text, _ = run(
        capsys, "prepare", book, "--out", tmp_path / "set", "--vocab-size", 5000, "--valid-fraction", 0.3
    )
    assert re.search(r"no more pairs to merge: \d+ of the 5,000 entries asked for", text)


def test_a_users_error_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, book: Path
) -> None:
    out = tmp_path / "set"
    for arguments, message in [
        (["prepare", tmp_path / "none", "--out", out], "none: no such file or folder"),
        (["prepare", "--out", out], "no input; name files, folders or hf:NAME"),
        (["prepare", book, "--out", out, "--tokenizer", book, "--vocab-size", 300], "drop it"),
        (["prepare", book, "--out", out, "--vocab-size", 0], "vocabulary of 0: needs at least 257"),
        (["info", out], "no such folder; make one with: bellbox data prepare"),
        (["info", tmp_path], "no manifest.json in it"),
    ]:
        code, text, error = run(capsys, *arguments)
        assert (code, text) == (2, "")
        assert error.startswith("bellbox: error: ")
        assert error.count("\n") == 1
        assert message in error
    assert not out.exists()


def test_unknown_options_and_missing_ones_exit_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, book: Path
) -> None:
    for arguments, word in [
        (["prepare", book, "--out", tmp_path / "set", "--shuffle"], "--shuffle"),
        (["prepare", book], "--out"),
        ([], "prepare"),
    ]:
        code, _, error = run(capsys, *arguments)
        assert code == 2
        assert word in error


def test_info_knows_the_bundled_novels(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BELLBOX_CACHE", str(tmp_path))
    code, text, _ = run(capsys, "info", "classics")
    assert code == 0
    assert "1,594,194 bytes" in text
