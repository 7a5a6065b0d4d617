"""Tables of documents: JSON of any layout, CSV, TSV, Parquet; what is something else than its name says."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bellbox.data.pieces import PIECE_CHARS
from bellbox.data.prepare import Progress, prepare
from bellbox.data.sources import resolve
from bellbox.data.tables import Rows
from bellbox.errors import BellboxError

TEXTS = ['one, with "quotes"', "two\nlines and a \ttab", "three é 😀 \u2028", "x" * 1000, "[{]}"]


def texts(path: Path, rows: Rows | None = None) -> list[str]:
    found, parts = [], []
    for source in resolve([path]):
        for piece in source.pieces(rows):
            parts.append(piece.text)
            if piece.ends:
                found.append("".join(parts))
                parts = []
    return found


def dicts() -> list[dict[str, object]]:
    return [{"id": i, "text": text, "more": {"a": [1, {}]}} for i, text in enumerate(TEXTS)]


def csv_of(delimiter: str) -> str:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    return "\r\n".join([f"id{delimiter}text", *(f"{i}{delimiter}{one}" for i, one in enumerate(quoted)), ""])


WAYS: dict[str, Callable[[], str]] = {
    "array.json": lambda: json.dumps(dicts()),
    "pretty.json": lambda: "\ufeff \n" + json.dumps(dicts(), indent=2, ensure_ascii=False) + "\n\n",
    "lines.json": lambda: "\n".join(map(json.dumps, dicts())),
    "joined.json": lambda: "".join(json.dumps(one, indent=1) for one in dicts()),
    "bom.jsonl": lambda: "\ufeff" + "\n".join(map(json.dumps, dicts())),
    "table.csv": lambda: csv_of(","),
    "table.tsv": lambda: csv_of("\t"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", WAYS)
def test_every_row_of_a_table_is_a_document(
    tmp_path: Path, name: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bellbox.data.chunks._CHUNK_BYTES", 7)  # every border inside something
    data = WAYS[name]().encode()
    file = tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzip.compress(data) if packed else data)
    assert texts(file) == TEXTS


def test_an_object_may_be_larger_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    long = "word " * (PIECE_CHARS // 2)
    (tmp_path / "a.json").write_text(json.dumps([{"text": long}, {"text": "short"}]))
    assert texts(tmp_path / "a.json") == [long, "short"]


def test_parquet_is_read_by_its_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(5)), "text": TEXTS, "none": [None, "a", "", None, "b"]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet") == TEXTS
    rows = Rows("none", skip_null=True)
    assert texts(tmp_path / "a.parquet", rows) == ["a", "b"]
    assert (rows.skipped.null, rows.skipped.blank) == (2, 1)
    with pytest.raises(BellboxError, match=r"no field 'body' \(fields: id, text, none\)"):
        texts(tmp_path / "a.parquet", Rows("body"))
    with pytest.raises(BellboxError, match="field 'id' is not text but int"):
        texts(tmp_path / "a.parquet", Rows("id"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(BellboxError, match="cannot be read as a Parquet file"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}', "row 1: the array has no end"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "row 1: no comma"),
        ("a.json", '[{"text": "a"}] {"text": "b"}', "row 1: there is more behind the end"),
        ("a.json", '[{"text": "a"}, ]', "row 1: not JSON"),
        ("a.json", '{"text": tru}' + " " * 100, "row 0: not JSON"),
        ("a.json", '{"text": "a', "row 0: not JSON"),
        ("a.json", "[" * 100_000, "row 0: not JSON"),
        ("a.json", "[" + "9" * 5000 + "]", "row 0: not JSON"),
        ("a.json", '["a"]', "row 0: not a JSON object but str"),
        ("a.json", '{"data": [{"text": "a"}]}', r"no field 'text' \(fields: data\)"),
        ("a.csv", "id,body\n1,a\n", r"a.csv:2: no field 'text' \(fields: id, body\)"),
        ("a.csv", "text;id\na;1\n", r"a.csv:2: no field 'text' \(fields: text;id\)"),
        ("a.csv", "text,id\na,1,2\n", "a.csv:2: 3 cells below 2 names; quote cells"),
        ("a.csv", "text,id\na\n", "a.csv:2: 1 cells below 2 names"),
        ("a.csv", "text,text\na,b\n", "a.csv:1: two columns have the same name"),
        ("a.csv", 'text\n"a" b\n', "a.csv:2: not a row of a table"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}\n', "a.txt: looks like JSON lines; call it .jsonl"),
        ("README", '{"text": "a"}', "looks like JSON lines"),
        ("a.txt", "%PDF-1.7 text", "a.txt: is a PDF document"),
        ("a.txt", "PAR1", "a.txt: is a Parquet file; call it .parquet"),
        ("a.jsonl", "PK\x03\x04", "a.jsonl: is a zip archive"),
        ("a.txt", "\x1f\x8b", "is compressed; call it a.txt.gz"),
    ],
)
def test_what_is_something_else_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(BellboxError, match=message):
        texts(tmp_path / name)


def test_braces_that_are_text_stay_text(tmp_path: Path) -> None:
    for content in ('{"a": 1}\nand then prose', "{\n  body\n}\n", "{}\n{\n}"):
        (tmp_path / "a.txt").write_text(content)
        assert texts(tmp_path / "a.txt") == [content]
    (tmp_path / "a.txt").write_text('<|endoftext|>\n{"text": "a"}\n{"text": "b"}')
    assert texts(tmp_path / "a.txt") == ['{"text": "a"}\n{"text": "b"}']


def test_null_rows_are_refused_or_counted_and_blank_ones_counted(tmp_path: Path) -> None:
    rows = [{"text": f"story {i} of the sea. " * 5} for i in range(40)]
    odd = [{"text": None}, {"text": ""}, {"text": " \n"}, {"text": None}, {"text": "\u2028"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows + odd)))
    with pytest.raises(BellboxError, match=r"a.jsonl:41: field 'text' is null; .* --skip-null"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300)
    states: list[Progress] = []
    options = {"vocab_size": 300, "valid_fraction": 0.3, "skip_null": True}
    made = prepare([tmp_path / "a.jsonl"], tmp_path / "out", progress=states.append, **options)
    assert (states[-1].skipped.null, states[-1].skipped.blank) == (2, 3)
    assert made.train.documents + made.valid.documents == 40
    (tmp_path / "b.txt").write_text("plain")
    with pytest.raises(BellboxError, match="it has no rows"):
        prepare([tmp_path / "b.txt"], tmp_path / "other", skip_null=True)
