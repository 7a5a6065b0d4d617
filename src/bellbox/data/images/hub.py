"""Labelled images of the Hugging Face hub, through its own library `datasets`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from bellbox.data.images.base import ImageDataset, ImageSplit, checked_dataset, numbered_classes
from bellbox.data.images.pictures import decode
from bellbox.errors import BellboxError, require

VALID = ("validation", "valid", "test")
_LABELS = ("label", "labels", "fine_label")


class HubSplit(ImageSplit):
    """Rows of a split whose pictures come as bytes, or as the paths of files."""

    def __init__(self, where: str, rows: Any, picture: str, labels: np.ndarray, size: int) -> None:
        super().__init__(where, labels, (3, size, size))
        self._rows, self._picture = rows, picture

    def image(self, index: int) -> np.ndarray:
        """See `ImageSplit.image`."""
        where = f"{self.where}, image {index}"
        entry = self._rows[index][self._picture] or {}
        data = entry.get("bytes")
        if data is None and entry.get("path") is not None:
            data = Path(entry["path"])
        if data is None:
            raise BellboxError(f"{where}: there is no picture in this row")
        return decode(data, where, self.shape[1])


def open_hub(name: str, size: int) -> ImageDataset:
    """Load a data set by name, or from a folder that `datasets` can read.

    Raises:
        BellboxError: the library is missing, there is no such set, or it has no pictures with labels.
    """
    library = require("datasets", "vision")
    require("PIL", "vision")
    try:
        loaded = library.load_dataset(name)
    except Exception as error:  # whatever it raises: no network, no such name, a broken file
        raise BellboxError(f"hf:{name}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return from_splits(f"hf:{name}", loaded, size)


def from_splits(source: str, loaded: Any, size: int) -> ImageDataset:
    """A data set from the splits that `datasets` gives: `train` and one of `validation`, `valid`, `test`.

    Raises:
        BellboxError: no such splits, or no column of pictures or of labels.
    """
    library = require("datasets", "vision")
    other = next((name for name in VALID if name in loaded), None)
    if "train" not in loaded or other is None:
        raise BellboxError(
            f"{source}: needs the splits train and one of {', '.join(VALID)}; has {list(loaded)}"
        )
    features = loaded["train"].features
    picture = next((key for key, kind in features.items() if isinstance(kind, library.Image)), None)
    label = next((key for key in _LABELS if key in features), None)
    if picture is None or label is None:
        raise BellboxError(f"{source}: needs a column of pictures and one called label; has {list(features)}")
    names = getattr(features[label], "names", None)
    splits, prints = [], []
    for name in ("train", other):
        rows = loaded[name].cast_column(picture, library.Image(decode=False))
        labels = np.asarray(rows.with_format("numpy")[label][:], dtype=np.int64)
        splits.append(HubSplit(f"{source}: {name}", rows, picture, labels, size))
        prints.append(str(rows._fingerprint))
    classes = names or numbered_classes(splits[0])
    checksum = hashlib.sha256(f"{size} {prints}".encode()).hexdigest()
    return checked_dataset(source, splits[0], splits[1], classes, checksum)
