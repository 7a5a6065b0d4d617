"""Mutated files of every format that Bellbox reads, each given to its real reader: what becomes of them.

    python benchmarks/reliability/fuzz.py --count 100000 --seed 1          # all formats, an hour or two
    python benchmarks/reliability/fuzz.py --formats packed npz --count 2000
    python benchmarks/reliability/fuzz.py --formats yaml --replay 417      # one mutation again, with its traceback

A mutation is a function of (format, seed, number). It knows the file's structure: it changes values of JSON, headers of
safetensors, NumPy and IDX, lines of JSON lines, YAML as text and as values, and bytes anywhere; where a format has
checksums, half of the mutated files are sealed anew, so that what lies behind the checksums is reached as well.

Readers run in a forked worker with a limit of time and of memory. Verdicts:

    refused      one line of BellboxError
    same         read as what it was before
    read         read as something else, where the format has no checksum or was sealed anew
    another      read as something else although its checksums do not match: a failure, as are all that follow
    traceback    another exception than BellboxError, or a message of several lines
    noise        something was printed past the message (a panic of Rust's)
    memory       more than twice what the unchanged file takes, and 256 MiB
    hang         more than 10 seconds
    crash        the process died
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import bellbox as bb
from bellbox.comparison import summarise, tables
from bellbox.comparison.results import Result, Results
from bellbox.data.images import open_images
from bellbox.data.prepare import prepare
from bellbox.data.shards import MANIFEST, TokenDataset
from bellbox.data.sources import resolve
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.formats.auto import open_model
from bellbox.formats.description import SECTION, seal
from bellbox.models import LlamaConfig, build, load_hf, save_hf
from bellbox.report.record import read_record
from bellbox.runs.checkpoint import Checkpoints, State
from bellbox.runs.config import BatchSection, DataSection, ModelSection, TrainConfig
from bellbox.runs.config_file import load_config
from bellbox.utils.files import describe_file, sha256_file

SECONDS = 10.0
MEMORY = 256 << 20
"""Beyond twice the honest amount."""
ADDRESSES = 6 << 30
"""Bytes of address space that a worker may ask for beyond what it begins with."""
GOOD = ("refused", "same", "read")
BAD = ("another", "traceback", "noise", "memory", "hang", "crash")
VOCABULARY = 300
TEXT = "It was a dark and cold night; the sea was far away, and nobody knew the way home. "

Random = random.Random


# --- mutations of bytes, values, texts ---


def mutate_bytes(data: bytes, draw: Random) -> bytes:
    """One to three changes at random places."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice((1, 2, 4, 8, 64, 4096)))
        kind = draw.randrange(8)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << draw.randrange(8)
        elif kind == 1 and content:
            content[at % len(content)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22))
        elif kind == 2:
            del content[at:end]
        elif kind == 3:
            content[at:at] = content[at:end]
        elif kind == 4:
            content[at:at] = draw.randbytes(end - at)
        elif kind == 5:
            del content[at:]
        elif kind == 6:
            content[at:end] = bytes(end - at)
        else:
            content += draw.randbytes(draw.choice((1, 8, 1000)))
    return bytes(content)


HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 255, 65536, 2**24, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64,
    10**40, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"), "", "0", "a", "nan", "../../up",
    "/etc/passwd", "a\nb", "a\0b", "\ud800", "<script>alert(1)</script>", "\\input{x}", "$\\frac{$", "%s{0}",
    "x" * 50_000, [], {}, [[]], [None], {"": None}, [0] * 1000, "float8_e4m3fn", "bbq", "none", "auto",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a value."""
    yield path
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from places(inside, (*path, key))
    elif isinstance(value, list):
        for number, inside in enumerate(value[:50]):
            yield from places(inside, (*path, number))


def mutate_value(value: Any, draw: Random) -> Any:
    """A JSON value with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = [path for path in places(value) if path]
        if not found:
            return draw.choice(HOSTILE)
        path = draw.choice(found)
        owner: Any = value
        for step in path[:-1]:
            owner = owner[step]
        kind, key = draw.randrange(8), path[-1]
        old = owner[key]
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[draw.choice(("", "x", key + "x", "weight", "..", "a\nb"))] = owner.pop(key)
        elif kind == 2 and type(old) in (int, float):
            owner[key] = draw.choice((old + 1, old - 1, -old, old * 2, old * 1024, old / 2))
        elif kind == 3:
            other = draw.choice(found)
            with contextlib.suppress(KeyError, IndexError, TypeError):
                taken: Any = value
                for step in other:
                    taken = taken[step]
                owner[key] = json.loads(json.dumps(taken))
        elif kind == 4 and isinstance(old, list):
            owner[key] = draw.choice((old[:-1], old * 2, old[::-1], old[1:]))
        elif kind == 5 and isinstance(old, str) and old:
            owner[key] = draw.choice((old + "x", old[:-1], old.upper(), old * 2, old.replace(old[0], "é")))
        else:
            owner[key] = draw.choice(HOSTILE)
    return value


def mutate_json(text: str, draw: Random) -> str:
    """A JSON text: mostly other values, sometimes another text."""
    kind = draw.randrange(12)
    if kind == 0:
        return mutate_bytes(text.encode(), draw).decode("utf-8", "surrogateescape")
    if kind == 1:
        depth = draw.choice((100, 5000, 200_000))
        return draw.choice(("[" * depth, '{"a":' * depth, "[" * depth + "]" * depth))
    if kind == 2:
        at = text.find(":", draw.randrange(max(1, len(text))))
        return (
            text[: at + 1]
            + draw.choice(("1" * 5000, "1e999", "NaN", '"\\ud800"', "[" * 50_000))
            + text[at + 1 :]
        )
    return json.dumps(mutate_value(json.loads(text), draw))


def mutate_safetensors(data: bytes, draw: Random) -> bytes:
    """A header with other values, another length of it, or other bytes."""
    kind = draw.randrange(4)
    size = int.from_bytes(data[:8], "little")
    if kind == 0:
        return mutate_bytes(data, draw)
    if kind == 1:
        claimed = draw.choice((0, 1, size - 1, size + 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + data[8:]
    header = json.loads(data[8 : 8 + size])
    if kind == 2:
        name = draw.choice(sorted(set(header) - {"__metadata__"}))
        dtypes = (
            "F64",
            "F32",
            "F16",
            "BF16",
            "F8_E4M3",
            "F8_E5M2",
            "F4",
            "F8_E8M0",
            "I64",
            "I8",
            "U8",
            "BOOL",
            "C64",
            "X",
        )
        entry, dtype = header[name], draw.choice(dtypes)
        widths = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2}
        entry["dtype"] = dtype
        begin, end = entry["data_offsets"]
        count = (end - begin) // widths.get(dtype, 1)
        entry["shape"] = draw.choice(([count], [count, 1], [1, count], [0, 2**40], entry["shape"]))
        new = header
    else:
        new = mutate_value(header, draw)
    text = json.dumps(new).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
YAML_TEXTS = (
    LAUGHS,
    MERGED,
    "&a [*a]",
    "a: &a\n  b: *a\n",
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000 + "x",
    "? " * 500,
    "!!python/object:os.system x",
    "!!python/name:os.system",
    "a: !!timestamp x",
    "a: 2023-13-45",
    "a: !!int x",
    "a: !!binary '@@'",
    "a: 1" + "0" * 5000,
    "a: !!float x",
    "a: 0b",
    "a: 1:99:99",
    "a: '\\ud800'",
    'a: "\\ud800"',
    "a: !!set {b}",
    "a: !!omap [b: 1]",
    "? [a]\n: b",
    "? {a: 1}\n: b",
    "%YAML 9.9\n---\na: 1",
    "a: 1\n---\nb: 2",
    "\t- a",
    "a: !x y",
    "*a",
    "a: @b",
    "a: `b",
    "\ufeffa: 1",
    "=: 1",
    "!!str : 1",
    "a: =",
    "<<: 1",
    "<<: [1]",
    "a: !!null x",
    "a: !!bool x",
    "- 1",
    "1",
    "",
    "\0",
    "a: .inf",
    "model: .nan",
)


def mutate_yaml(text: str, draw: Random) -> str:
    """Other values, a hostile text behind or in place of it, or other bytes."""
    kind = draw.randrange(5)
    if kind == 0:
        return draw.choice(YAML_TEXTS)
    if kind == 1:
        return text + draw.choice(YAML_TEXTS)
    if kind == 2:
        return mutate_bytes(text.encode(), draw).decode("utf-8", "surrogateescape")
    value = mutate_value(yaml.safe_load(text), draw)
    try:
        return yaml.safe_dump(value)
    except UnicodeEncodeError:
        return json.dumps(value)


def mutate_lines(text: str, draw: Random) -> str:
    """JSON lines: one of them changed, twice, gone, or cut short."""
    lines = text.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    kind = draw.randrange(8)
    if kind == 0:
        lines[at:at] = [lines[at]]
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        return mutate_bytes(text.encode(), draw).decode("utf-8", "surrogateescape")
    else:
        lines[at] = mutate_json(lines[at], draw).replace("\n", " ") + "\n"
    return "".join(lines)


def mutate_npz(data: bytes, draw: Random) -> bytes:
    """Another header or other bytes of an array, an array more or less, or other bytes of the archive."""
    if draw.randrange(4) == 0:
        return mutate_bytes(data, draw)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        arrays = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(sorted(arrays))
    kind = draw.randrange(5)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = arrays[draw.choice(sorted(arrays))]
    elif kind == 2:
        arrays[name] = mutate_bytes(arrays[name], draw)
    else:
        numbers = (-1, 0, 1, 3, 2**31, 2**40, 2**62, 2**64)
        dtypes = (
            "|u1",
            "<i8",
            "<u8",
            "<f4",
            "|O",
            "|V0",
            "<U0",
            "<U99999999",
            "|b1",
            "<M8[s]",
            "bad",
            "<f2",
            ">i2",
        )
        shape = tuple(draw.choice(numbers) for _ in range(draw.randrange(6)))
        odd = draw.choice(("x" * 30_000, "(" * 9000, "{1: 2}", "'", "", "[" * 500, "{'descr': }"))
        header = repr(
            {"descr": draw.choice(dtypes), "fortran_order": draw.choice((True, False, 3)), "shape": shape}
        )
        text = (odd if draw.randrange(4) == 0 else header).encode() + b"\n"
        body = arrays[name][128:]
        arrays[name] = (
            b"\x93NUMPY" + bytes((draw.choice((1, 2, 3)), 0)) + len(text).to_bytes(2, "little") + text + body
        )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for key, content in arrays.items():
            archive.writestr(key, content)
    return out.getvalue()


def mutate_idx(data: bytes, draw: Random) -> bytes:
    """Another header, or other bytes, of the packed or of the unpacked file."""
    packed = data[:2] == b"\x1f\x8b"
    if packed and draw.randrange(3) == 0:
        return mutate_bytes(data, draw)
    content = bytearray(gzip.decompress(data) if packed else data)
    if draw.randrange(2):
        at = draw.choice((2, 3, 4, 8, 12))
        content[at : at + 4] = draw.choice((0, 1, 2, 2**16, 2**31, 2**32 - 1)).to_bytes(4, "big")
        out = bytes(content)
    else:
        out = mutate_bytes(bytes(content), draw)
    return gzip.compress(out) if packed else out


def of_text(mutate: Callable[[str, Random], str]) -> Callable[[bytes, Random], bytes]:
    def on_bytes(data: bytes, draw: Random) -> bytes:
        text = data.decode("utf-8", "surrogateescape")
        return mutate(text, draw).encode("utf-8", "surrogatepass" if draw.randrange(2) else "replace")

    return on_bytes


def mutation_of(name: str) -> Callable[[bytes, Random], bytes]:
    """How a file of this name is mutated."""
    endings: dict[str, Callable[[bytes, Random], bytes]] = {
        ".json": of_text(mutate_json),
        ".jsonl": of_text(mutate_lines),
        ".yaml": of_text(mutate_yaml),
        ".safetensors": mutate_safetensors,
        ".npz": mutate_npz,
        "-ubyte": mutate_idx,
        "-ubyte.gz": mutate_idx,
    }
    return next((how for ending, how in endings.items() if name.endswith(ending)), mutate_bytes)


# --- formats ---


@dataclass
class Format:
    """A kind of file or folder."""

    make: Callable[[Path], None]
    """Writes a good one into an empty folder."""
    read: Callable[[Path], Any]
    """Reads it and uses it; what it gives is compared by its repr."""
    files: tuple[str, ...]
    """What is mutated, as patterns."""
    seal: Callable[[Path], None] | None = None
    """Makes all checksums match again; None where there are none."""
    honest: int = 0
    """Bytes that reading the good one takes; measured."""
    content: str = ""
    """What reading the good one gives."""


def tiny() -> torch.nn.Module:
    return build(LlamaConfig(VOCABULARY, 16, 32, 1, 2, max_position_embeddings=32), seed=0)


def logits(model: torch.nn.Module) -> Any:
    with torch.no_grad():
        return model.eval()(torch.arange(6)[None] % 7).flatten()[:50].tolist()


def make_tokens(folder: Path, name: str = "") -> Path:
    source = folder / "text.txt"
    source.write_text("\n<|endoftext|>\n".join(TEXT * 3 + str(i) for i in range(40)))
    prepare([source], folder / (name or "set"), vocab_size=VOCABULARY, valid_fraction=0.2)
    source.unlink()
    return folder / (name or "set")


def make_packed(folder: Path) -> None:
    model = bb.prepare(tiny(), bb.Recipe.bbq(bits=2))
    logits(model)
    tokens = make_tokens(folder)
    bb.save(bb.convert(model), folder / "packed", tokenizer=tokens / "tokenizer.json")
    shutil.rmtree(tokens)


def read_packed(folder: Path) -> Any:
    opened = open_model(folder / "packed")
    return logits(opened.model), opened.load_tokenizer().encode(TEXT)


def seal_packed(folder: Path) -> None:
    path = folder / "packed" / "config.json"
    config = json.loads(path.read_bytes())
    section = config[SECTION]
    for name in section["files"]:
        if os.path.basename(name) == name:
            section["files"][name] = describe_file(path.parent / name)
    section["sha256"] = seal(config)
    path.write_text(json.dumps(config))


def read_tokens(folder: Path) -> Any:
    dataset = TokenDataset.open(folder / "set", verify=True)
    split = dataset.split("train")
    ids = split.read(0, min(50, len(split)))
    return ids.tolist(), dataset.byte_lengths()[:300].tolist(), dataset.tokenizer.decode(ids), len(split)


def seal_tokens(folder: Path) -> None:
    from bellbox.data.shards import Manifest, write_manifest

    path = folder / "set" / MANIFEST
    fields = json.loads(path.read_bytes())
    fields.pop("sha256")
    fields["tokenizer_sha256"] = sha256_file(path.parent / "tokenizer.json")
    for split in fields["splits"].values():
        for shard in split["shards"]:
            shard["sha256"] = sha256_file(path.parent / os.path.basename(shard["file"]))
    write_manifest(path.parent, Manifest.model_construct(**fields))


def make_npz(folder: Path) -> None:
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (12, 6, 6, 3), dtype=np.uint8), np.arange(12) % 3
    names = np.array(["red", "green", "blue"])
    arrays = {
        f"{split}_{what}": a
        for split in ("train", "test")
        for what, a in (("images", images), ("labels", labels))
    }
    np.savez(folder / "a.npz", class_name=names, **arrays)


def read_images(source: Path) -> Any:
    dataset = open_images(str(source))
    read = dataset.train.read(range(min(8, len(dataset.train))))
    return read.flatten()[:100].tolist(), dataset.classes[:10], dataset.train.shape, dataset.statistics()


def make_idx(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("train", 6), ("t10k", 4)):
        images = draw.integers(0, 256, (count, 5, 5), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 3)):
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            data = bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()
            if name == "train":
                (folder / f"{name}-{kind}-ubyte").write_bytes(data)
            else:
                (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))


def make_yaml(folder: Path) -> None:
    config = TrainConfig().to_dict()
    config["model"]["overrides"] = {"hidden_size": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def make_results(folder: Path) -> None:
    with (folder / "results.jsonl").open("w") as file:
        for row, seed in (("BBQ", 0), ("BBQ", 1), ("LSQ", 0)):
            config = {**TrainConfig().to_dict(), "seed": seed, "steps": 10}
            config["quantization"]["method"] = row.lower()
            history = [
                {"step": 10, "tokens": 100, "loss": 2.0, "weight_entropy": 1.9, "activation_entropy": 1.8}
            ]
            gamma = {"up": {"low": 0.1, "high": 0.2, "counts": [1, 2]}}
            one = Result(
                "study",
                row,
                2,
                1e-3,
                seed,
                {},
                config,
                "ab",
                None,
                10,
                100,
                2.0,
                7.0,
                history=history,
                gamma=gamma,
            )
            file.write(json.dumps(vars(one)) + "\n")


def read_results(folder: Path) -> Any:
    studies = summarise(Results(folder).all, {})
    return tables.markdown(studies), tables.latex(studies), tables.comma_separated(studies)


def make_tokenizer(folder: Path) -> None:
    shutil.copyfile(make_tokens(folder) / "tokenizer.json", folder / "tokenizer.json")
    shutil.rmtree(folder / "set")


def read_tokenizer(folder: Path) -> Any:
    found = Tokenizer.load(folder / "tokenizer.json")
    ids = found.encode(TEXT + "<|endoftext|> é 😀")
    return ids, found.decode(ids), found.byte_lengths()[:300].tolist(), found.end_of_text, found.vocab_size


def make_hf(folder: Path) -> None:
    save_hf(tiny(), folder)


def make_checkpoint(folder: Path) -> None:
    state = State(step=3, tokens=30, seconds=1.0, loss=2.0, best_loss=2.0)
    Checkpoints(folder / "checkpoints").save(state, dict(tiny().state_dict()), {"a/exp_avg": torch.ones(4)})


def read_checkpoint(folder: Path) -> Any:
    found = Checkpoints(folder / "checkpoints").at(3)
    model = tiny()
    stored = found.model_tensors()
    odd = set(model.state_dict()) ^ set(stored)
    return (
        vars(found.state),
        sorted(odd),
        found.optimizer_tensors(),
        [value.sum() for value in stored.values()],
    )


def seal_checkpoint(folder: Path) -> None:
    root = next((folder / "checkpoints").iterdir())
    for root in [*(folder / "checkpoints").glob("step-*"), *(folder / "run" / "checkpoints").glob("step-*")]:
        manifest = json.loads((root / "manifest.json").read_bytes())
        for name in manifest["files"]:
            manifest["files"][name] = describe_file(root / os.path.basename(name))
        (root / "manifest.json").write_text(json.dumps(manifest))


def make_run(folder: Path) -> None:
    from bellbox.training import train

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = TrainConfig(
        folder=str(folder / "run"),
        model=ModelSection(overrides=dict(sizes)),
        data=DataSection(source=str(make_tokens(folder)), context=16),
        batch=BatchSection(tokens=32, micro_sequences=2),
        steps=2,
        eval_every=1,
        checkpoint_every=1,
        log_every=1,
        precision="fp32",
        tensorboard=False,
    )
    train(config, show=False)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000001")


def read_run(folder: Path) -> Any:
    opened = open_model(folder / "run")
    return logits(opened.model), opened.context


def read_report(folder: Path) -> Any:
    from bellbox.report import ReportInput, render

    record = read_record(folder / "run")
    render(ReportInput(record=record, step=2, model="a model"))  # has the date in it
    return record


def make_documents(folder: Path) -> None:
    rows = [{"text": f"{TEXT}{i}", "id": i} for i in range(6)]
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.csv").write_text("id,text\n" + "".join(f'{i},"{TEXT}""{i}"""\n' for i in range(6)))
    (folder / "d.txt.gz").write_bytes(gzip.compress(TEXT.encode() * 5))
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows]}), folder / "e.parquet")


def read_documents(folder: Path) -> Any:
    return [piece for source in resolve([folder]) for piece in source.pieces()]


FORMATS: dict[str, Format] = {
    "packed": Format(make_packed, read_packed, ("packed/*",), seal_packed),
    "tokens": Format(lambda folder: make_tokens(folder) and None, read_tokens, ("set/*",), seal_tokens),
    "npz": Format(make_npz, lambda folder: read_images(folder / "a.npz"), ("a.npz",)),
    "idx": Format(make_idx, read_images, ("*",)),
    "yaml": Format(make_yaml, lambda folder: load_config(folder / "config.yaml"), ("config.yaml",)),
    "results": Format(make_results, read_results, ("results.jsonl",)),
    "tokenizer": Format(make_tokenizer, read_tokenizer, ("tokenizer.json",)),
    "huggingface": Format(make_hf, lambda folder: logits(load_hf(folder)), ("*.safetensors", "config.json")),
    "checkpoint": Format(make_checkpoint, read_checkpoint, ("checkpoints/*/*",), seal_checkpoint),
    "run": Format(make_run, read_run, ("run/config.yaml", "run/checkpoints/*/*.json"), seal_checkpoint),
    "metrics": Format(make_run, read_report, ("run/metrics.jsonl", "run/environment.json")),
    "documents": Format(make_documents, read_documents, ("*",)),
}


def mutate(kind: Format, good: Path, folder: Path, draw: Random) -> bool:
    """Copy a good folder and mutate a file of it; returns whether its checksums were made to match again."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    files = sorted(file for pattern in kind.files for file in folder.glob(pattern) if file.is_file())
    file = draw.choice(files)
    file.write_bytes(mutation_of(file.name)(file.read_bytes(), draw))
    if kind.seal is None:
        return True
    if draw.randrange(2):
        return False
    try:
        kind.seal(folder)
    except Exception:  # there is no longer anything to seal
        return False
    return True


# --- the worker ---


@dataclass
class Verdicts:
    """What became of a format's mutations."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Failures by what they say, and the numbers of the mutations."""

    @property
    def failures(self) -> int:
        return sum(self.counts[name] for name in BAD)


def _peak() -> int:
    """Bytes in memory at most since the last `_forget_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def judge(kind: Format, good: Path, folder: Path, seed: str, noise: int) -> tuple[str, str]:
    """The verdict on one mutation, in the process that asks, and what there is to say of it."""
    sealed = mutate(kind, good, folder, Random(seed))
    os.ftruncate(noise, 0)
    os.lseek(noise, 0, os.SEEK_SET)
    _forget_peak()
    before = _peak()
    try:
        content = repr(kind.read(folder))
        verdict = "same" if content == kind.content else "read" if sealed else "another"
        said = ""
    except BellboxError as error:
        verdict, said = ("refused" if "\n" not in str(error) else "traceback"), str(error)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [one for one in traceback.extract_tb(error.__traceback__) if "/bellbox/" in one.filename] or [
            last
        ]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        verdict, said = (
            "traceback",
            f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:150]}",
        )
    if _peak() - before > 2 * kind.honest + MEMORY:
        verdict, said = "memory", f"{(_peak() - before) >> 20} MiB; {verdict} {said}"
    elif verdict in GOOD and os.fstat(noise).st_size:
        verdict, said = "noise", os.pread(noise, 200, 0).decode(errors="replace")
    return verdict, said


def _work(name: str, good: Path, seed: int, numbers: list[int], out: int) -> None:
    """Judge mutations one after another; a line before and one after each."""
    kind = FORMATS[name]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")  # meant for the user, and no line of an error
    noise = os.memfd_create("noise")
    os.dup2(noise, 2)
    folder = good.with_name(f"{name}-mutated-{os.getpid()}")
    for number in numbers:
        os.write(out, f"{number}\n".encode())
        found = judge(kind, good, folder, f"{name} {seed} {number}", noise)
        os.write(out, (json.dumps([number, *found]) + "\n").encode())
    shutil.rmtree(folder, ignore_errors=True)


def run_format(name: str, good: Path, seed: int, numbers: list[int], limit: float = SECONDS) -> Verdicts:
    """Judge mutations in forked workers; a new one is started where one dies or hangs."""
    found = Verdicts()
    waiting = list(numbers)

    def note(number: int, verdict: str, said: str) -> None:
        found.counts[verdict] += 1
        if verdict in BAD:
            found.examples.setdefault(f"{verdict}: {said}", []).append(number)

    while waiting:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                os.close(reading)
                _work(name, good, seed, waiting, writing)
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        current, buffer, ended = waiting[0], b"", False
        while not ended:
            ready, _, _ = select.select([reading], [], [], limit)
            data = os.read(reading, 1 << 16) if ready else b""
            if not data:
                os.kill(child, signal.SIGKILL) if not ready else None
                _, status = os.waitpid(child, 0)
                if current in waiting:
                    how = "hang" if not ready else "crash"
                    note(current, how, f"signal {os.WTERMSIG(status)}" if ready else f"{limit:g} s")
                    waiting.remove(current)
                ended = True
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                value = json.loads(line)
                if isinstance(value, int):
                    current = value
                else:
                    note(*value)
                    waiting.remove(value[0])
        os.close(reading)
    return found


def prepare_format(name: str, root: Path) -> Path:
    """A good folder of a format, and what reading it gives and takes."""
    good = root / name
    good.mkdir(parents=True)
    kind = FORMATS[name]
    kind.make(good)
    kind.content = repr(kind.read(good))
    _forget_peak()
    before = _peak()
    assert repr(kind.read(good)) == kind.content, f"{name}: reading it twice gives two contents"
    kind.honest = _peak() - before
    return good


def run(
    formats: list[str],
    count: int,
    seed: int,
    first: int = 0,
    limit: float = SECONDS,
    tell: Callable[[str, Verdicts], None] | None = None,
) -> dict[str, Verdicts]:
    """Judge `count` mutations, spread evenly over the formats."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    share = -(-count // len(formats))
    found = {}
    with tempfile.TemporaryDirectory(prefix="bellbox-fuzz-") as root:
        for name in formats:
            good = prepare_format(name, Path(root))
            found[name] = run_format(name, good, seed, list(range(first, first + share)), limit)
            if tell is not None:
                tell(name, found[name])
    return found


def replay(name: str, seed: int, number: int) -> None:
    """One mutation in this process, with the traceback that it may end in."""
    with tempfile.TemporaryDirectory() as root:
        good = prepare_format(name, Path(root))
        folder = Path(root) / "mutated"
        sealed = mutate(FORMATS[name], good, folder, Random(f"{name} {seed} {number}"))
        print("checksums match" if sealed else "checksums as they were")
        for file in sorted(one for one in folder.rglob("*") if one.is_file()):
            old = good / file.relative_to(folder)
            if not old.is_file() or old.read_bytes() != file.read_bytes():
                print(f"{file.relative_to(folder)}: {file.read_bytes()[:600]!r}")
        content = repr(FORMATS[name].read(folder))
        print("the same" if content == FORMATS[name].content else f"read: {content[:600]}")


def show(name: str, verdicts: Verdicts) -> None:
    """A format's line, and what failed."""
    print(name.ljust(12) + "".join(f"{verdicts.counts[each]:10,}" for each in (*GOOD, *BAD)), flush=True)
    for said, numbers in sorted(verdicts.examples.items(), key=lambda item: -len(item[1])):
        print(f"    {len(numbers):5,} x {said[:240]}   (--formats {name} --replay {numbers[0]})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--count", type=int, default=1200, help="mutations in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation of each format")
    parser.add_argument("--replay", type=int, help="a mutation of the one format that is named")
    command = parser.parse_args()
    if command.replay is not None:
        replay(command.formats[0], command.seed, command.replay)
        return
    begun = time.monotonic()
    print("format".ljust(12) + "".join(each.rjust(10) for each in (*GOOD, *BAD)), flush=True)
    found = run(command.formats, command.count, command.seed, command.first, tell=show)
    total = sum(sum(each.counts.values()) for each in found.values())
    print(f"{total:,} mutations, seed {command.seed}, {time.monotonic() - begun:.0f} s")
    sys.exit(any(each.failures for each in found.values()))


if __name__ == "__main__":
    main()
