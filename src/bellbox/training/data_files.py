"""Check that a run goes on with the files of data that it was begun with.

To read a whole corpus at every start would take longer than many a run. So a run remembers size and time of each
file, and only those that look another way at the next start are read: data that were copied elsewhere are still the
same, a file that was written to is not. The checksums of shards stand in their manifest; those of pictures are taken at
the first start, which reads each of them once.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bellbox.data.shards import TokenDataset
from bellbox.errors import BellboxError
from bellbox.utils.files import open_regular, read_json, sha256_file, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bellbox.data.images import ImageDataset

DATA_FILE = "data.json"
_PIECE = 1 << 20


def remember_files(dataset: TokenDataset | ImageDataset, file: Path) -> None:
    """Write down how the files look now: shards `[bytes, nanoseconds]`, those of images with their CRC-32 behind."""
    if isinstance(dataset, TokenDataset):
        looks: dict[str, Any] = {name: _look(dataset.file_of(name)) for name in _shards(dataset)}
        write_text(file, json.dumps({"shards": looks}, indent=1) + "\n")
    elif dataset.files:
        before = _remembered(file, "images") if file.exists() else {}
        looks = {name: _with_checksum(path, before.get(name)) for name, path in dataset.files.items()}
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(look)}" for name, look in looks.items())
        write_text(file, f'{{"images": {{\n{lines}\n}}}}\n')


def refuse_other_files(dataset: TokenDataset | ImageDataset, file: Path) -> None:
    """Read the files that look another way than was written down, if it was.

    Raises:
        BellboxError: one of them holds something else, is new or gone, or `file` is damaged.
    """
    if not file.exists():
        return
    if isinstance(dataset, TokenDataset):
        looks = _remembered(file, "shards")
        for name, sha256 in _shards(dataset).items():
            path = dataset.file_of(name)
            if looks.get(name) != _look(path) and sha256_file(path) != sha256:
                raise BellboxError(
                    f"{path}: was changed since the run was begun, its checksum is not the manifest's; put the old one "
                    "back, or prepare the data anew and begin another run"
                )
    elif dataset.files:
        _refuse_other_images(dataset.files, _remembered(file, "images"))


def _refuse_other_images(files: Mapping[str, Path], looks: Mapping[str, Any]) -> None:
    for name in sorted(files.keys() ^ looks.keys()):
        what = "was added" if name in files else "is gone"
        raise BellboxError(f"{files.get(name, name)}: {what} since the run was begun; {_WAY_OUT}")
    for name, path in files.items():
        if looks[name][:2] != _look(path) and looks[name][2:] != [_crc32(path)]:
            raise BellboxError(f"{path}: was changed since the run was begun; {_WAY_OUT}")


_WAY_OUT = "put the data back as they were, or begin another run"


def _remembered(file: Path, kind: str) -> dict[str, Any]:
    looks = read_json(file).get(kind)
    if not isinstance(looks, dict) or not all(isinstance(look, list) for look in looks.values()):
        raise BellboxError(f"{file}: damaged; remove it")
    return looks


def _shards(dataset: TokenDataset) -> dict[str, str]:
    """Name -> checksum of each shard."""
    return {shard.file: shard.sha256 for split in dataset.manifest.splits.values() for shard in split.shards}


def _look(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]


def _with_checksum(path: Path, before: list[int] | None) -> list[int]:
    """Bytes, nanoseconds and CRC-32; the file is not read where it looks as before."""
    look = _look(path)
    return before if before is not None and before[:2] == look and len(before) == 3 else [*look, _crc32(path)]


def _crc32(path: Path) -> int:
    value = 0
    with open_regular(path) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value
