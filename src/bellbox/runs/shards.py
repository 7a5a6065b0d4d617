"""The files of a sharded checkpoint: safetensors with pieces of tensors, and the layout that says where each belongs.

```
shard-00000-of-00002.safetensors    what rank 0 has written: `model/blocks.0.weight@0,0`, the place of its first number
shard-00001-of-00002.safetensors    `model/blocks.0.weight@5,0`, and the random state of its rank in the header
manifest.json                       under `tensors`, of each: dtype, shape, and its pieces [file, offsets, sizes]
```

Every file is plain safetensors, so that any reader of the format can look into it. They are written and read here in
slabs all the same: a file is hashed while it is written, no other thread has to wait while the disk does, and reading
takes no more memory than the tensor that is read into.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.utils.files import HEADER_LIMIT, open_regular

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of safetensors, as far as anything here computes with them."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SLAB = 8 << 20  # bytes
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the file that holds it."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """What is known of a tensor without reading it; its chunks cover it once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


Layout = Mapping[str, StoredTensor]


def shard_name(rank: int, ranks: int) -> str:
    """The file that a rank writes."""
    return f"shard-{rank:05d}-of-{ranks:05d}.safetensors"


def key_of(name: str, offsets: Sequence[int]) -> str:
    """Under what name a chunk stands in its file."""
    return f"{name}@{','.join(map(str, offsets))}"


def dtype_name(dtype: torch.dtype) -> str:
    """As safetensors call it.

    Raises:
        BellboxError: they have no such type, or nothing here computes with it.
    """
    if dtype not in _NAMES:
        raise BellboxError(f"a tensor of type {dtype} cannot be stored; keep it in another type")
    return _NAMES[dtype]


def write_shard(path: Path, pieces: Sequence[tuple[str, Tensor]], about: Mapping[str, str]) -> dict[str, Any]:
    """Write a safetensors file, and have it on the disk.

    Args:
        path: of a file that is not there yet.
        pieces: keys and tensors, on the CPU and contiguous.
        about: texts for the header.

    Returns:
        Its `bytes` and `sha256`.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)}
    ends = list(accumulate(tensor.nbytes for _, tensor in pieces))
    for (key, tensor), end in zip(pieces, ends, strict=True):
        header[key] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [end - tensor.nbytes, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8, as the format asks
    digest, size = hashlib.sha256(), 0
    # Unbuffered: a full disk is met by the write that meets it, and no other thread waits for a write or a digest.
    with open(path, "xb", buffering=0) as file:
        for part in (len(text).to_bytes(8, "little") + text, *(_bytes_of(tensor) for _, tensor in pieces)):
            view = memoryview(part)
            for begin in range(0, len(view), _SLAB):
                slab = view[begin : begin + _SLAB]
                digest.update(slab)
                while slab:
                    slab = slab[file.write(slab) :]
            size += len(view)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _bytes_of(tensor: Tensor) -> memoryview:
    content: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


class ShardFile:
    """A file of `write_shard`, opened for reading.

    Raises:
        BellboxError: it is no such file, or its header says what cannot be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise BellboxError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if length > min(HEADER_LIMIT, size - 8):
            raise BellboxError(f"{self.path}: damaged, claims a header of {length} bytes")
        try:
            header = json.loads(self._file.read(length))
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise BellboxError(f"{self.path}: damaged, its header is no JSON object")
        about = header.pop("__metadata__", {})
        self.about: dict[str, str] = about if isinstance(about, dict) else {}
        self._entries: dict[str, Any] = header
        self._begin, self._size = 8 + length, size - 8 - length

    def read_into(
        self,
        key: str,
        target: Tensor,
        dtype: torch.dtype,
        sizes: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        """Copy a box of a stored tensor.

        Args:
            key: of the tensor in this file.
            target: of the box's shape; on any device.
            dtype: that the tensor has.
            sizes: its shape.
            offsets: where the box begins in it.

        Raises:
            BellboxError: there is no such tensor here, or it has another type, shape or length.
        """
        entry = self._entries.get(key)
        width = torch.empty((), dtype=dtype).element_size()
        stated = {"dtype": dtype_name(dtype), "shape": list(sizes)}
        span = entry.get("data_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(entry, dict)
            or {k: entry.get(k) for k in stated} != stated
            or not _are_places(span)
            or len(span) != 2
            or not span[0] <= span[1] <= self._size
            or span[1] - span[0] != width * math.prod(sizes)
        ):
            raise BellboxError(f"{self.path}: damaged, holds no {key!r} as the manifest describes it")
        for part, rows, begin in _slabs(target, sizes, offsets, width):
            part.copy_(self._rows(self._begin + span[0] + begin, rows, dtype, sizes)[_box(part, offsets)])

    def _rows(self, begin: int, rows: int | None, dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
        shape = tuple(sizes) if rows is None else (rows, *sizes[1:])
        read = torch.empty(shape, dtype=dtype)
        view = _bytes_of(read)
        self._file.seek(begin)
        if self._file.readinto(view) != len(view):
            raise BellboxError(f"{self.path}: damaged, ends too early")
        return read


def _slabs(
    target: Tensor, sizes: Sequence[int], offsets: Sequence[int], width: int
) -> Iterator[tuple[Tensor, int | None, int]]:
    """Parts of a target along its first dimension, each with its count of rows and where they begin, in bytes."""
    if not sizes:
        yield target, None, 0
        return
    row = width * math.prod(sizes[1:])
    step = max(1, _SLAB // max(1, row))
    for begin in range(0, target.shape[0], step):
        part = target[begin : begin + step]
        yield part, part.shape[0], (offsets[0] + begin) * row


def _box(part: Tensor, offsets: Sequence[int]) -> tuple[slice, ...]:
    """Where a part lies in the rows that were read for it."""
    if not offsets:
        return ()
    inner = zip(offsets[1:], part.shape[1:], strict=True)
    return (slice(None), *(slice(begin, begin + size) for begin, size in inner))


def layout_to_json(layout: Layout, files: Sequence[str]) -> dict[str, Any]:
    """For a manifest; `parse_layout` reads it."""
    numbers = {name: number for number, name in enumerate(files)}
    return {
        name: {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "chunks": [
                [numbers[chunk.file], list(chunk.offsets), list(chunk.sizes)] for chunk in tensor.chunks
            ],
        }
        for name, tensor in layout.items()
    }


def parse_layout(value: object, files: Sequence[str], where: Path) -> dict[str, StoredTensor]:
    """What a manifest says of its tensors.

    Args:
        value: that stands there under `tensors`.
        files: the shards that it lists, in order.
        where: it stands, for the message.

    Raises:
        BellboxError: it is no layout, a chunk lies outside of its tensor, or the chunks do not cover it.
    """
    if not isinstance(value, dict):
        raise BellboxError(f"{where}: 'tensors' must be an object")
    return {name: _parse_tensor(name, entry, files, where) for name, entry in value.items()}


def _parse_tensor(name: str, entry: Any, files: Sequence[str], where: Path) -> StoredTensor:
    wrong = BellboxError(f"{where}: damaged, the layout of tensor {name!r} cannot be")
    if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES or not _are_places(entry.get("shape")):
        raise wrong
    shape, chunks = tuple(entry["shape"]), entry.get("chunks")
    if not isinstance(chunks, list) or not chunks:
        raise wrong
    found = []
    for chunk in chunks:
        if not isinstance(chunk, list) or len(chunk) != 3 or type(chunk[0]) is not int:
            raise wrong
        number, offsets, sizes = chunk
        if not 0 <= number < len(files) or not _are_places(offsets) or not _are_places(sizes):
            raise wrong
        if not len(offsets) == len(sizes) == len(shape):
            raise wrong
        if any(o + s > whole for o, s, whole in zip(offsets, sizes, shape, strict=True)):
            raise wrong
        found.append(Chunk(str(files[number]), tuple(offsets), tuple(sizes)))
    # As many numbers as the tensor has, at different places: what overlaps leaves a hole elsewhere.
    if len({chunk.offsets for chunk in found}) != len(found) or math.prod(shape) != sum(
        math.prod(chunk.sizes) for chunk in found
    ):
        raise wrong
    return StoredTensor(DTYPES[entry["dtype"]], shape, tuple(found))


def _are_places(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(each) is int and 0 <= each < 2**53 for each in value)
    )


def read_whole(folder: Path, layout: Layout, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors put together from their chunks, on the CPU.

    Raises:
        BellboxError: a file is missing or damaged.
    """
    found = {name: torch.empty(layout[name].shape, dtype=layout[name].dtype) for name in names}
    wanted: dict[str, list[tuple[str, Chunk]]] = {}
    for name in found:
        for chunk in layout[name].chunks:
            wanted.setdefault(chunk.file, []).append((name, chunk))
    for file, chunks in wanted.items():
        with ShardFile(folder / file) as shard:
            for name, chunk in chunks:
                at = tuple(
                    slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True)
                )
                target, nowhere = found[name][at], (0,) * len(chunk.sizes)
                shard.read_into(key_of(name, chunk.offsets), target, layout[name].dtype, chunk.sizes, nowhere)
    return found
