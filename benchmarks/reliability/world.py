"""The folders and files that hostile command lines name."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import specimens
from mutations import LAUGHS
from specimens import TEXT

from bellbox.models import save_hf

ODD = "[red] $x_1 \\frac{ %s <b>"
"""A name that means something to terminals, LaTeX, format strings and pages."""
GRID = """base:
  model:
    preset: tiny
    overrides: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  data: {source: SOURCE, context: 16}
  batch: {tokens: 32, micro_sequences: 2}
  steps: STEPS
  threads: 1
lr: [1.0e-3]
rows: {full precision: {quantization: {method: none}}, BBQ: {}}
"""


def make_world(root: Path) -> dict[str, str]:
    """Folders and files that the commands name; returns what stands for each name."""
    for make in (specimens.make_packed, specimens.make_run, specimens.make_source):
        make(root)
    (root / "text.txt").unlink()
    (root / "made").mkdir()
    specimens.make_binarized(root / "made")
    shutil.move(root / "made" / "out", root / "one")
    (root / "made").rmdir()
    save_hf(specimens.tiny(), root / "hf")
    shutil.copytree(root / "run", root / ODD)
    _make_results(root)
    _make_files(root)
    specimens.make_npz(root)
    for name in ("full", "readonly", "empty", "pictures"):
        (root / name).mkdir()
    specimens.make_pictures(root / "pictures")
    for name in ("fifo", "fifo.npz"):
        os.mkfifo(root / name)
    for name, target in (("link", "empty"), ("dead", "nowhere"), ("loop", "loop")):
        (root / name).symlink_to(target)
    return _names(root)


def _make_results(root: Path) -> None:
    for name, study in (("names", "../up"), ("markupnames", ODD.replace("\\", ""))):
        (root / name).mkdir()
        specimens.make_results(root / name)
        shutil.rmtree(root / name / "grids")
        file = root / name / "results.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line | {"study": study}) + "\n" for line in lines))


def _make_files(root: Path) -> None:
    grid = GRID.replace("SOURCE", str(root / "set"))
    rows = "".join(json.dumps({"text": f"{TEXT}{number}"}) + "\n" for number in range(200))
    files = {
        "text": TEXT * 100, "csv.csv": "a,b\n1,2\n", "pdf": "%PDF-1.4 and more", "nothing.txt": "",
        "grid.yaml": "rows: {a: {}}\n", "good.yaml": grid.replace("STEPS", "2"),
        "long.yaml": grid.replace("STEPS", "100000"), "laughs.yaml": LAUGHS,
        "up.yaml": "lr: 1.0e-3\nrows: {../up: {model: {preset: nope}}}\n", "rows.jsonl": rows,
        "bad.json": '[{"text": "a"}', "bad.parquet": "PAR1 and nothing", "bad.txt.gz": "no gzip",
        "sp.model": "no model",
    }  # fmt: skip
    for name, content in files.items():
        (root / name).write_text(content)
    (root / "binary").write_bytes(bytes(range(256)) * 50)
    (root / "zip").write_bytes(b"PK\x03\x04" + bytes(100))
    (root / "good.txt.gz").write_bytes(gzip.compress(TEXT.encode()))


def _names(root: Path) -> dict[str, str]:
    same = "packed run hf one source empty names markupnames text pdf fifo link dead loop binary zip full readonly new"
    paths = {name: name for name in (*same.split(), "pictures")} | {
        "tokens": "set", "csv": "csv.csv", "grid": "grid.yaml", "goodgrid": "good.yaml", "longgrid": "long.yaml",
        "gridlaughs": "laughs.yaml", "gridup": "up.yaml", "fifonpz": "fifo.npz", "nothing": "nothing.txt",
        "jsonl": "rows.jsonl", "badjson": "bad.json", "badparquet": "bad.parquet", "gz": "bad.txt.gz",
        "spmodel": "sp.model", "odd": ODD, "missing": "no", "name300": "n" * 300,
    }  # fmt: skip
    texts = {
        "oddname": ODD, "broken": "\udcff\udcfe", "blank": "", "markup": "[red]a[/red]", "laughs": LAUGHS,
        "newline": "a\nb", "latex": "$\\frac{a}{", "escape": "a\x1b[31m\x07b", "emoji": "😀 é 東",
        "long": "x" * 100_000,
    }  # fmt: skip
    return {key: str(root / name) for key, name in paths.items()} | texts


@contextlib.contextmanager
def small_disks(root: Path) -> Iterator[bool]:
    """A full disk at `full` and a read-only one at `readonly`, where this user may mount; else says no."""
    mounted = []
    try:
        for name, options in (("full", "size=16k"), ("readonly", "ro,size=16k")):
            command = ["mount", "-t", "tmpfs", "-o", options, "bellbox-test", str(root / name)]
            if (
                shutil.which("mount") is None
                or subprocess.run(command, capture_output=True, check=False).returncode
            ):
                break
            mounted.append(root / name)
        yield len(mounted) == 2
    finally:
        for place in mounted:
            subprocess.run(["umount", str(place)], check=False)
