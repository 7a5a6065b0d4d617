"""Mutations that know the structure of a file: values of JSON and YAML, headers, lines, archives, and bytes anywhere.

Each takes a file's content and a source of random numbers, and gives another content; `mutation_of` chooses by name.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import yaml

Random = random.Random
Mutation = Callable[[bytes, Random], bytes]


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
        return (claimed % 2**64).to_bytes(8, "little") + data[8:]  # of a file mutated before: -1
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


def mutate_table(text: str, draw: Random) -> str:
    """CSV or TSV: cells of another kind, rows longer or shorter, quotes left open, NULs, or other bytes."""
    delimiter = "\t" if "\t" in text else ","
    if draw.randrange(4) == 0:
        return mutate_bytes(text.encode(), draw).decode("utf-8", "surrogateescape")
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    row = draw.choice(rows)
    kind = draw.randrange(6)
    odd = ("", '"', '"' * 7, "\0", "\r", "x" * 200_000, "\ud800", "text", "=1+1", "é" * 9, "<|endoftext|>")
    if kind == 0 and row:
        del row[draw.randrange(len(row)) :]
    elif kind == 1:
        row += [draw.choice(odd)] * draw.choice((1, 2, 50))
    elif kind == 2:
        rows[rows.index(row) : rows.index(row)] = [draw.choice(rows)]
    else:
        row[draw.randrange(len(row)) if row else 0 :] = [draw.choice(odd)]
    if draw.randrange(3) == 0:
        return "\n".join(delimiter.join(cells) for cells in rows)  # as they are: without quotes
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, escapechar="\\").writerows(rows)
    return out.getvalue()


def mutate_packed_text(unpack: Callable[[bytes], bytes], pack: Callable[[bytes], bytes]) -> Mutation:
    """Of a compressed file: other bytes of it, or of what is in it."""

    def mutate(data: bytes, draw: Random) -> bytes:
        kind = draw.randrange(3)
        if kind == 0:
            return mutate_bytes(data, draw)
        if kind == 1:  # members one behind another, and what unpacks into far more than it takes
            return data + pack(bytes(draw.choice((0, 1, 1 << 20))))
        return pack(mutate_bytes(unpack(data), draw))

    return mutate


def mutate_png(data: bytes, draw: Random) -> bytes:
    """Chunks with other content, of other kinds, twice or gone, their checksums made to match; or other bytes."""
    if draw.randrange(3) == 0:
        return mutate_bytes(data, draw)
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
        at += 12 + size
    number = draw.randrange(len(chunks))
    kind = draw.randrange(5)
    if kind == 0:
        del chunks[number]
    elif kind == 1:
        chunks[number:number] = [chunks[draw.randrange(len(chunks))]]
    elif kind == 2:
        head, sides = bytearray(chunks[0][1]), (0, 1, 3, 255, 65_536, 2**24, 2**31 - 1, 2**32 - 1)
        place = draw.choice((0, 4))
        head[place : place + 4] = draw.choice(sides).to_bytes(4, "big")
        chunks[0][1] = bytes(head)
    elif kind == 3:
        chunks[number][0] = draw.choice(
            (b"tEXt", b"zTXt", b"iCCP", b"PLTE", b"tRNS", b"acTL", b"eXIf", b"IDAT")
        )
    else:
        chunks[number][1] = mutate_bytes(chunks[number][1], draw)
    out = data[:8]
    for name, content in chunks:
        out += (
            len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
        )
    return out


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 128:
            break
    return value, at


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """Fields of a protocol buffer's message: (key, content), the content of strings and messages without its length."""
    found, at = [], 0
    while at < len(data):
        key, at = _varint(data, at)
        begin = at
        if key & 7 == 2:
            size, at = _varint(data, at)
            begin, at = at, at + size
        else:
            at = {0: _varint(data, at)[1], 1: at + 8, 5: at + 4}.get(key & 7, len(data))
        found.append((key, data[begin:at]))
    return found


def mutate_protobuf(data: bytes, draw: Random) -> bytes:
    """A message with fields of other content, twice, gone or of another kind, at any level; or other bytes."""
    if draw.randrange(4) == 0:
        return mutate_bytes(data, draw)
    fields = _fields(data)
    rare = {key: number for number, (key, _) in enumerate(fields)}  # settings are few, pieces many
    number = draw.choice(sorted(rare.values())) if draw.randrange(2) else draw.randrange(len(fields))
    key, content = fields[number]
    kind = draw.randrange(6)
    if kind == 0:
        del fields[number]
    elif kind == 1:
        fields[number:number] = [fields[draw.randrange(len(fields))]] * draw.choice((1, 1, 300))
    elif kind == 2:
        fields[number] = (draw.choice((key ^ 1, key + 8, key & ~7)), content)
    elif kind == 3 and key & 7 == 2 and len(content) > 2:
        fields[number] = (key, mutate_protobuf(content, draw))
    elif key & 7 == 0:
        fields[number] = (key, _as_varint(draw.choice((0, 1, 2, 2**31, 2**32, 2**63, 2**64 - 1))))
    else:
        fields[number] = (key, mutate_bytes(content, draw))
    out = b""
    for key, content in fields:
        out += _as_varint(key) + (_as_varint(len(content)) if key & 7 == 2 else b"") + content
    return out


def _zstandard(data: bytes, packing: bool) -> bytes:
    import zstandard

    if packing:
        return zstandard.ZstdCompressor().compress(data)
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def of_text(mutate: Callable[[str, Random], str]) -> Mutation:
    def on_bytes(data: bytes, draw: Random) -> bytes:
        text = data.decode("utf-8", "surrogateescape")
        return mutate(text, draw).encode("utf-8", "surrogatepass" if draw.randrange(2) else "replace")

    return on_bytes


def mutation_of(name: str) -> Mutation:
    """How a file of this name is mutated."""
    endings: dict[str, Mutation] = {
        ".json": of_text(mutate_json),
        ".jsonl": of_text(mutate_lines),
        ".yaml": of_text(mutate_yaml),
        ".safetensors": mutate_safetensors,
        ".npz": mutate_npz,
        "-ubyte": mutate_idx,
        "-ubyte.gz": mutate_idx,
        ".csv": of_text(mutate_table),
        ".tsv": of_text(mutate_table),
        ".png": mutate_png,
        ".model": mutate_protobuf,
        ".gz": mutate_packed_text(gzip.decompress, gzip.compress),
        ".xz": mutate_packed_text(lzma.decompress, lzma.compress),
        ".zst": mutate_packed_text(
            lambda data: _zstandard(data, packing=False), lambda data: _zstandard(data, packing=True)
        ),
    }
    return next((how for ending, how in endings.items() if name.endswith(ending)), mutate_bytes)
