"""Pictures in folders named by their class: `train/cat/1.jpg`, and `valid/`, `val/` or `test/` beside `train/`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bellbox.data.images.base import ImageDataset, ImageSplit, checked_dataset
from bellbox.data.images.pictures import decode
from bellbox.errors import BellboxError, require

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
VALID = ("valid", "val", "test")


class FolderSplit(ImageSplit):
    """Picture files, each decoded and scaled when it is asked for."""

    def __init__(self, where: str, labels: np.ndarray, files: list[Path], size: int) -> None:
        super().__init__(where, labels, (3, size, size))
        self.files = files

    def image(self, index: int) -> np.ndarray:
        """See `ImageSplit.image`."""
        return decode(self.files[index], str(self.files[index]), self.shape[1])


def open_folder(root: Path, size: int) -> ImageDataset:
    """Open a folder of class folders. Its checksum covers names and sizes of the files; a run looks at their
    content too (`bellbox.training.data_files`).

    Raises:
        BellboxError: no validation folder, or other classes there than in `train/`.
    """
    require("PIL", "vision")
    valid = next((root / name for name in VALID if (root / name).is_dir()), None)
    if valid is None:
        raise BellboxError(f"{root}: beside train/ there must be one of: {', '.join(VALID)}")
    classes = sorted(entry.name for entry in (root / "train").iterdir() if entry.is_dir())
    if not classes:
        raise BellboxError(f"{root / 'train'}: holds no class folders")
    unknown = sorted({entry.name for entry in valid.iterdir() if entry.is_dir()} - set(classes))
    if unknown:
        raise BellboxError(f"{valid}: class {unknown[0]!r} is not in train/")
    digest = hashlib.sha256(str(size).encode())
    splits, everything = [], {}
    for folder in (root / "train", valid):
        files, labels = [], []
        for label, name in enumerate(classes):
            found = sorted(
                p for p in (folder / name).glob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
            )
            files += found
            labels += [label] * len(found)
            for path in found:
                everything[path.relative_to(root).as_posix()] = path
                digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        splits.append(FolderSplit(str(folder), np.array(labels, dtype=np.int64), files, size))
    return checked_dataset(str(root), splits[0], splits[1], classes, digest.hexdigest(), files=everything)
