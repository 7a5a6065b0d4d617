from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
import tracemalloc
from pathlib import Path

import pytest

from bellbox.data import chunks, pieces
from bellbox.data.pieces import PIECE_CHARS, Piece, split_into_pieces
from bellbox.data.prepare import prepare
from bellbox.data.sources import resolve
from bellbox.data.tables import Rows
from bellbox.errors import BellboxError


def texts(path: Path | str, field: str = "text") -> list[str]:
    """Whole documents of one input."""
    found, parts = [], []
    for source in resolve([path]):
        for piece in source.pieces(Rows(field)):
            parts.append(piece.text)
            if piece.ends:
                found.append("".join(parts))
                parts = []
    assert not parts, "a source must close its last document"
    return found


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def compressed(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(data))
    else:
        path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))
    return path


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_separator_line_divides_documents_and_belongs_to_none(tmp_path: Path, newline: str) -> None:
    lines = ["<|endoftext|>", "one", "", "more <|endoftext|> inside", "<|endoftext|>", "<|endoftext|>", "two"]
    file = write(tmp_path / "a.txt", newline.join([*lines, "<|endoftext|>", ""]))
    assert texts(file) == [newline.join(lines[1:4]), "two"]


def test_without_a_separator_a_file_is_one_document_kept_to_the_byte(tmp_path: Path) -> None:
    text = "\tfirst\r\n\n  last line, no newline \u2028 \x00 é 😀"
    assert texts(write(tmp_path / "a.txt", text)) == [text]
    assert texts(write(tmp_path / "b.txt", text + "\n")) == [text + "\n"]


def test_blank_documents_are_passed_over(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "\n\n<|endoftext|>\n \n<|endoftext|>\nx\n<|endoftext|>\n\n")) == [
        "x"
    ]


def test_a_byte_order_mark_at_the_beginning_is_dropped(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "\ufeffa\ufeffb")) == ["a\ufeffb"]


@pytest.mark.parametrize("offset", range(-20, 3))
def test_separators_are_found_wherever_they_fall_in_the_read_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 40)
    first = "y " * ((128 + offset) // 2) + "z" * (offset % 2)
    file = write(
        tmp_path / "a.txt", f"{first}\r\n<|endoftext|>\r\n<|endoftext|> not alone\nsecond\n<|endoftext|>"
    )
    assert texts(file) == [first, "<|endoftext|> not alone\nsecond"]


def test_a_separator_after_a_hard_cut_is_still_only_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 10)
    text = "x" * 10 + "<|endoftext|>\n" + "y" * 40
    assert texts(write(tmp_path / "a.txt", text)) == [text]


def test_long_documents_come_in_bounded_pieces_cut_before_a_space() -> None:
    text = "several words\n\n on  end. " * 40_000
    pieces = list(split_into_pieces(text))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text) for piece in pieces) <= PIECE_CHARS
    for before, after in itertools.pairwise(pieces):
        assert after.text[0] == " "
        assert not before.text[-1].isspace()


def test_a_text_without_white_space_is_cut_at_the_limit() -> None:
    pieces = list(split_into_pieces("x" * (PIECE_CHARS + 5)))
    assert pieces == [Piece("x" * PIECE_CHARS, False), Piece("x" * 5, True)]


@pytest.mark.parametrize("ending", ["gz", "xz", "zst"])
def test_compressed_files_read_as_plain_ones(tmp_path: Path, ending: str) -> None:
    text = "one é\n<|endoftext|>\n" + "two 東京 " * 50_000
    assert texts(compressed(tmp_path / f"a.txt.{ending}", text.encode())) == text.split("\n<|endoftext|>\n")


@pytest.mark.parametrize("ending", ["gz", "xz", "zst"])
def test_several_frames_in_one_file_are_all_read(tmp_path: Path, ending: str) -> None:
    file = compressed(tmp_path / f"a.txt.{ending}", b"one ")
    file.write_bytes(file.read_bytes() * 3)
    assert texts(file) == ["one one one "]


@pytest.mark.parametrize("ending", ["gz", "xz", "zst"])
def test_a_truncated_compressed_file_is_named(tmp_path: Path, ending: str) -> None:
    body = "".join(f"{i * i} " for i in range(20_000)).encode()
    file = compressed(tmp_path / f"a.txt.{ending}", body)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BellboxError, match=rf"a\.txt\.{ending}: the compressed file is truncated"):
        texts(file)


@pytest.mark.parametrize("ending", ["gz", "xz", "zst"])
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("zstandard")
    file = write(tmp_path / f"a.txt.{ending}", "plain text, long enough for any header")
    with pytest.raises(BellboxError, match=rf"a\.txt\.{ending}: cannot be read") as caught:
        texts(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [0, 5, 63, 64, 65, 200])
def test_bytes_that_are_not_utf8_are_named_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 64)
    file = tmp_path / "a.txt"
    file.write_bytes(b"x" * position + b"\xff" + b"y" * 100)
    with pytest.raises(BellboxError, match=rf"a\.txt: not UTF-8 at byte {position};"):
        texts(file)


@pytest.mark.parametrize("position", [3, 62, 63])
def test_a_character_cut_off_by_the_end_or_broken_over_two_chunks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 64)
    file = tmp_path / "a.txt"
    for tail in (b"", b"abc"):
        file.write_bytes(b"x" * position + "😀".encode()[:3] + tail)
        with pytest.raises(BellboxError, match=rf"not UTF-8 at byte {position};"):
            texts(file)


def test_json_lines_take_the_field_asked_for(tmp_path: Path) -> None:
    rows = [{"text": "a\nb", "body": "B1"}, {"text": "", "body": "B2"}, {"text": "c", "body": "B3"}]
    data = "\n\n".join(map(json.dumps, rows)).encode()
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(data)
    assert texts(plain) == ["a\nb", "c"]
    assert texts(compressed(packed, data), "body") == ["B1", "B2", "B3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "a.jsonl:2: not a line of JSON"),
        (b"[1]", "a.jsonl:2: not a JSON object but list"),
        (
            b'{"body": "a"}',
            r"a.jsonl:2: no field 'text' \(fields: body\); name the right one with --text-field",
        ),
        (b'{"text": 3}', "a.jsonl:2: field 'text' is not text but int"),
        (b'{"text": "\xff"}', "a.jsonl:2: not UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud800"}', "a.jsonl:2: field 'text' holds half a surrogate pair"),
        (b"[" * 100_000, "a.jsonl:2: not a line of JSON"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(BellboxError, match=message) as caught:
        texts(file)
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("b/c/1.txt", "b/2.txt", "a.txt", ".hidden", ".git/x.txt"):
        write(tmp_path / name, name)
    write(tmp_path / "b" / "3.jsonl", '{"text": "row"}')
    assert texts(tmp_path) == ["a.txt", "b/2.txt", "row", "b/c/1.txt"]


def test_inputs_that_cannot_be_resolved_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    file = write(tmp_path / "a.txt", "x")
    for given, message in [
        ([tmp_path / "none.txt"], "none.txt: no such file or folder"),
        ([empty], "empty: the folder holds no file"),
        ([file, tmp_path], "a.txt: given twice"),
        (["/dev/null"], "/dev/null: neither a regular file nor a folder"),
        (["hf:"], r"hf:NAME\[:CONFIG\]\[:SPLIT\]"),
        (["hf:a:b:c:d"], r"hf:NAME\[:CONFIG\]\[:SPLIT\]"),
    ]:
        with pytest.raises(BellboxError, match=message):
            resolve(given)


def test_a_name_that_is_not_utf8_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    file = folder / os.fsdecode(b"b\xff.txt")
    try:
        file.write_text("text " * 100)
    except OSError:
        pytest.skip("this file system takes no such name")
    for item in (file, folder):
        with pytest.raises(BellboxError, match=r"b\\udcff\.txt': the name is not UTF-8; rename the file"):
            prepare([item], tmp_path / "out", progress=lambda _: pytest.fail("began to work"))


def test_a_dataset_is_streamed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "stories"
    folder.mkdir()
    rows = [{"story": f"story {i}", "n": i} for i in range(5)]
    write(folder / "train.jsonl", "\n".join(map(json.dumps, rows)))
    assert texts(f"hf:{folder}", "story") == [f"story {i}" for i in range(5)]
    assert texts(f"hf:{folder}:default:train", "story") == [f"story {i}" for i in range(5)]
    with pytest.raises(BellboxError, match="row 0: no field 'text'"):
        texts(f"hf:{folder}")
    with pytest.raises(BellboxError, match="cannot be opened") as caught:
        texts(f"hf:{folder}::test", "story")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["one line", "one document", "json lines"])
def test_reading_takes_the_same_memory_however_long_the_file(tmp_path: Path, kind: str) -> None:
    text = "words without a newline " if kind == "one line" else "a line of some words\n"
    block = (text * 1000).encode()
    if kind == "json lines":
        block = json.dumps({"text": text * 1000}).encode() + b"\n"
    file = tmp_path / ("a.jsonl.gz" if kind == "json lines" else "a.txt.gz")
    peaks = []
    for blocks in (200, 1200):
        with gzip.open(file, "wb", compresslevel=1) as stream:
            for _ in range(blocks):
                stream.write(block)
        tracemalloc.start()
        length = sum(len(piece.text) for piece in resolve([file])[0].pieces())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert length == blocks * 1000 * len(text)
    assert peaks[1] < peaks[0] + (1 << 19)
    assert peaks[1] < 4 << 20


def test_bytes_read_add_up_to_the_size_on_disk(tmp_path: Path) -> None:
    file = compressed(tmp_path / "a.txt.xz", "".join(f"{i * i} " for i in range(100_000)).encode())
    counts: list[int] = []
    source = resolve([file])[0]
    list(source.pieces(on_read=counts.append))
    assert sum(counts) == source.size == file.stat().st_size
