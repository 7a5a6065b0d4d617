"""The IDX files of MNIST and its kin, as they are or compressed with gzip.

A file is four bytes (0, 0, type, number of dimensions), one big-endian uint32 a dimension, and the numbers; type 8 is
uint8, the only one that images and labels use.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np

from bellbox.data.images.base import ArraySplit, ImageDataset, checked_dataset, numbered_classes
from bellbox.errors import BellboxError
from bellbox.utils.files import open_regular

_SPLITS = {"train": "train", "valid": "t10k"}
_MOST_BYTES = 4 << 30


def is_idx_folder(path: Path) -> bool:
    """Whether a folder holds the training images of such a set."""
    return _file(path, "train-images-idx3-ubyte").is_file()


def _file(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() else folder / name


def open_idx(folder: Path) -> ImageDataset:
    """Open `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]` and the same of `t10k`.

    Raises:
        BellboxError: a file is missing, truncated, too long, or not of that format.
    """
    digest, splits, files = hashlib.sha256(), [], {}
    for name in _SPLITS.values():
        places = [_file(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
        files |= {path.name: path for path in places}
        images, labels = read_idx(places[0], 3), read_idx(places[1], 1)
        if len(images) != len(labels):
            raise BellboxError(f"{folder}: {name} has {len(images)} images and {len(labels)} labels")
        digest.update(images.tobytes())
        digest.update(labels.tobytes())
        splits.append(ArraySplit(f"{folder}: {name}", labels.astype(np.int64), images[..., None]))
    classes = numbered_classes(splits[0])
    return checked_dataset(str(folder), splits[0], splits[1], classes, digest.hexdigest(), files=files)


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The numbers of a file, uint8 with `rank` dimensions; no more is read than its header announces.

    Raises:
        BellboxError: see `open_idx`.
    """
    try:
        with open_regular(path) as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw as file:
            # Deflated, nothing shrinks more than 1,032 times.
            most = os.fstat(raw.fileno()).st_size * (1032 if path.suffix == ".gz" else 1)
            header = file.read(4 + 4 * rank)
            if len(header) < 4 + 4 * rank or header[:4] != bytes((0, 0, 8, rank)):
                raise BellboxError(f"{path}: not an IDX file of uint8 with {rank} dimension(s)")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", rank, 4))
            count = math.prod(shape)
            if count > _MOST_BYTES:
                raise BellboxError(f"{path}: claims {count} bytes, more than the {_MOST_BYTES} that are read")
            if count > most:
                raise BellboxError(f"{path}: truncated: {count} bytes were announced; copy it again")
            data = file.read(count + 1)
    except BellboxError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise BellboxError(f"{path}: cannot be read ({error})") from None
    if len(data) != count:
        what = "truncated" if len(data) < count else "longer than its header says"
        raise BellboxError(f"{path}: {what}: {count} bytes were announced; copy it again")
    return np.frombuffer(data, np.uint8).reshape(shape)
