"""Images in one NumPy file: JPEGs laid end to end with the places where each begins, or plain arrays."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bellbox.data.images.base import ArraySplit, ImageDataset, ImageSplit, checked_dataset
from bellbox.data.images.pictures import decode
from bellbox.errors import BellboxError
from bellbox.utils.files import sha256_file

_MOST_BYTES = 16 << 30
NOTE = "images re-encoded as JPEG"


class JpegSplit(ImageSplit):
    """Images as JPEG bytes, decoded once each and then kept.

    Args:
        where: file and split, for messages.
        labels: int64 `[count]`.
        jpeg: uint8, all bytes.
        offsets: `[count + 1]`: image i is `jpeg[offsets[i] : offsets[i + 1]]`.

    Raises:
        BellboxError: a damaged first image, or more than 16 GiB of decoded ones.
    """

    def __init__(self, where: str, labels: np.ndarray, jpeg: np.ndarray, offsets: np.ndarray) -> None:
        self._jpeg, self._offsets = jpeg, offsets
        first = self._decode(0, where)
        height, width, channels = first.shape
        if len(labels) * first.size > _MOST_BYTES:
            raise BellboxError(
                f"{where}: {len(labels)} images of {height} x {width}, more than {_MOST_BYTES} bytes decoded"
            )
        super().__init__(where, labels, (channels, height, width))
        # The system gives memory page by page as images come.
        self._kept = np.zeros((len(labels), *first.shape), dtype=np.uint8)
        self._known = np.zeros(len(labels), dtype=bool)

    def _decode(self, index: int, where: str) -> np.ndarray:
        data = self._jpeg[self._offsets[index] : self._offsets[index + 1]].tobytes()
        return decode(data, f"{where}, image {index}")

    def image(self, index: int) -> np.ndarray:
        """See `ImageSplit.image`."""
        if not self._known[index]:
            found = self._decode(index, self.where)
            if found.shape != self._kept.shape[1:]:
                raise BellboxError(
                    f"{self.where}, image {index}: has shape {found.shape}, the first one {self._kept.shape[1:]}"
                )
            self._kept[index], self._known[index] = found, True
        return self._kept[index]


def open_npz(path: Path) -> ImageDataset:
    """Open a file as `open_images` describes it. Nothing in it is unpickled.

    Raises:
        BellboxError: no such file, damaged, too large, or arrays that do not fit together.
    """
    found = _arrays(path)
    splits = [_split(path, found, name) for name in ("train", "test")]
    names = found.get(
        "class_name", np.array([str(i) for i in range(int(splits[0].labels.max(initial=0)) + 1)])
    )
    if names.ndim != 1:
        raise BellboxError(f"{path}: class_name must be a list of names")
    note = NOTE if isinstance(splits[0], JpegSplit) else ""
    return checked_dataset(str(path), splits[0], splits[1], names.tolist(), sha256_file(path), note)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Everything in a file, unpacked, if that is not too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MOST_BYTES:
            raise BellboxError(f"{path}: {size} bytes unpacked, more than the {_MOST_BYTES} that are read")
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except BellboxError:
        raise
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        MemoryError,
        RuntimeError,  # encrypted, or packed in a way that zipfile does not know
        zlib.error,
    ) as error:
        raise BellboxError(f"{path}: cannot be read as an .npz file ({error})") from None
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # NumPy gives the bytes of what is no .npy
            raise BellboxError(f"{path}: cannot be read as an .npz file ({name} in it is no .npy array)")
    return found


def _split(path: Path, found: dict[str, np.ndarray], name: str) -> ImageSplit:
    where = f"{path}: {name}"
    labels = _array(where, found, f"{name}_labels", 1, "integers").astype(np.int64)
    if f"{name}_images" in found:
        images = _array(where, found, f"{name}_images", 4, "uint8")
        if len(images) != len(labels):
            raise BellboxError(f"{where}: {len(images)} images, {len(labels)} labels")
        return ArraySplit(where, labels, images)
    jpeg = _array(where, found, f"{name}_jpeg", 1, "uint8")
    offsets = _array(where, found, f"{name}_offsets", 1, "integers").astype(np.int64)
    if len(offsets) != len(labels) + 1 or not len(labels):
        raise BellboxError(
            f"{where}: {len(labels)} labels need {len(labels) + 1} offsets, not {len(offsets)}"
        )
    if offsets[0] != 0 or offsets[-1] != len(jpeg) or (np.diff(offsets) < 0).any():
        raise BellboxError(
            f"{where}: {name}_offsets must rise from 0 to {len(jpeg)}, the bytes of {name}_jpeg"
        )
    return JpegSplit(where, labels, jpeg, offsets)


def _array(where: str, found: dict[str, np.ndarray], name: str, rank: int, kind: str) -> Any:
    if name not in found:
        raise BellboxError(
            f"{where}: there is no array {name!r}; there are: {', '.join(sorted(found)) or 'none'}"
        )
    array = found[name]
    fits = array.dtype == np.uint8 if kind == "uint8" else np.issubdtype(array.dtype, np.integer)
    if array.ndim != rank or not fits:
        raise BellboxError(f"{where}: {name} is {array.dtype} of shape {array.shape}, not {rank}-D {kind}")
    return array
