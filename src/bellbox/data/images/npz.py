"""Images in one NumPy file: JPEGs laid end to end with the places where each begins, or plain arrays."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bellbox.data.images.base import ArraySplit, ImageDataset, ImageSplit, checked_dataset, numbered_classes
from bellbox.data.images.pictures import decode
from bellbox.errors import BellboxError
from bellbox.utils.files import open_regular, parsing, sha256_file

_MOST_BYTES = 16 << 30
# A file of zeros shrinks a thousandfold, images hardly at all: what unpacks into far more memory than it takes on the
# disk is no set of images, beyond a size at which that does not matter.
_MOST_PACKED, _MOST_PACKED_BYTES = 100, 1 << 28
_CHANNELS = (1, 3, 4)
_NAMES = {
    f"{split}_{what}" for split in ("train", "test") for what in ("images", "labels", "jpeg", "offsets")
} | {"class_name"}
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
    names = found.get("class_name")
    if names is not None and names.ndim != 1:
        raise BellboxError(f"{path}: class_name must be a list of names")
    classes = numbered_classes(splits[0]) if names is None else names.tolist()
    note = NOTE if isinstance(splits[0], JpegSplit) else ""
    return checked_dataset(
        str(path), splits[0], splits[1], classes, sha256_file(path), note, {path.name: path}
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that are looked at, unpacked, if that is not too much; of the others, nothing."""
    try:
        with open_regular(path) as raw:
            size = os.fstat(raw.fileno()).st_size
            with parsing(path, "an .npz file"):
                archive = zipfile.ZipFile(raw)
                entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            wanted = {name: entry for name, entry in entries.items() if name in _NAMES}
            unpacked = sum(entry.file_size for entry in wanted.values())
            if unpacked > _MOST_BYTES:
                raise BellboxError(
                    f"{path}: {unpacked} bytes unpacked, more than the {_MOST_BYTES} that are read"
                )
            if unpacked > max(_MOST_PACKED_BYTES, _MOST_PACKED * size):
                raise BellboxError(
                    f"{path}: {size} bytes that claim to unpack into {unpacked}, which no images do"
                )
            found = {name: _array_in(path, archive, entry) for name, entry in wanted.items()}
    except OSError as error:
        raise BellboxError(f"{path}: cannot be read ({error.strerror})") from None
    return found | {name: np.empty(0) for name in entries if name not in found}


def _array_in(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """One array, once its header is found to announce what is there."""
    with parsing(f"{path}: {entry.filename}", "an .npz file"), archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        header = (
            np.lib.format.read_array_header_1_0(file)
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0(file)
        )
        shape, _, dtype = header
        size = dtype.itemsize * math.prod(shape)
        if dtype.hasobject:
            raise BellboxError(f"{path}: {entry.filename} holds pickled objects, which are never read")
        if entry.file_size - file.tell() != size:
            raise BellboxError(
                f"{path}: {entry.filename} announces {dtype} of shape {shape}, but holds {entry.file_size} bytes in all"
            )
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def _split(path: Path, found: dict[str, np.ndarray], name: str) -> ImageSplit:
    where = f"{path}: {name}"
    labels = _array(where, found, f"{name}_labels", 1, "integers").astype(np.int64)
    if f"{name}_images" in found:
        rank = (
            3 if found[f"{name}_images"].ndim == 3 else 4
        )  # gray images without an axis for their one channel
        images = _array(where, found, f"{name}_images", rank, "uint8")
        if len(images) != len(labels):
            raise BellboxError(f"{where}: {len(images)} images, {len(labels)} labels")
        return ArraySplit(where, labels, images[..., None] if rank == 3 else _channels_last(where, images))
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


def _channels_last(where: str, images: np.ndarray) -> np.ndarray:
    """Images `[count, height, width, channels]`, whether they lie so or with the channels first.

    Raises:
        BellboxError: the shape fits neither layout, or both.
    """
    _, first, middle, last = images.shape
    as_last, as_first = last in _CHANNELS, first in _CHANNELS
    if as_last and as_first and not first == middle == last == 1:
        # Images as narrow as that: only square ones tell. Equal on all sides, they do not.
        as_last, as_first = first == middle != last, first != middle == last
    if as_last:
        return images
    if as_first:
        return images.transpose(0, 2, 3, 1)
    raise BellboxError(
        f"{where}: images of shape {images.shape[1:]}: height, width, channels are read (or channels first), and there "
        f"must be {', '.join(map(str, _CHANNELS[:-1]))} or {_CHANNELS[-1]} channels, along one of the two axes only"
    )


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
