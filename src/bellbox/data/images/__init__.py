"""Images and their labels: files on disk to batches that are a pure function of (seed, step).

```python
dataset = open_images("cifar10.npz")        # or fashion-mnist, a folder of IDX files or of image folders, hf:NAME
images = dataset.train.read([0, 5])         # uint8 [2, 3, 32, 32]
batches = ImageBatches(dataset.train, batch=128, seed=0, augmentation=Augmentation())
images, targets = batches.at(step)          # float [128, 3, 32, 32] in [0, 1], and class numbers or probabilities
```
"""

from __future__ import annotations

from pathlib import Path

from bellbox.data.images.augment import Augmentation
from bellbox.data.images.base import ImageDataset, ImageSplit
from bellbox.data.images.batches import ImageBatches
from bellbox.errors import BellboxError

__all__ = ["Augmentation", "ImageBatches", "ImageDataset", "ImageSplit", "open_images", "required_size"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""
_SIZE = "vision.image_size, --image-size"


def open_images(source: str, size: int | None = None, usual: int | None = None) -> ImageDataset:
    """Open a set of labelled images.

    Args:
        source: an `.npz` file with arrays `train_jpeg`, `train_offsets`, `train_labels` and the same of `test` (or
            `train_images`, `test_images` in place of the JPEGs); a folder with the IDX files of MNIST's kind;
            `fashion-mnist`, for Debian's; a folder `train/CLASS/*` with `valid/`, `val/` or `test/` beside `train/`;
            or `hf:NAME`, a data set of the Hugging Face hub (extra `vision`).
        size: height and width that images are scaled and cropped to; folders and `hf:` need it, the others have one.
        usual: in place of `size`, for those that need it.

    Raises:
        BellboxError: nothing of the kind there, or a damaged file.
    """
    from bellbox.data.images import folder, hub, idx, npz

    wanted = usual if size is None else size
    if source.startswith("hf:"):
        return hub.open_hub(source.removeprefix("hf:"), required_size(source, wanted))
    path = FASHION_MNIST if source == "fashion-mnist" else Path(source)
    if path.suffix == ".npz":
        opened = npz.open_npz(path)
    elif idx.is_idx_folder(path):
        opened = idx.open_idx(path)
    elif (path / "train").is_dir():
        return folder.open_folder(path, required_size(source, wanted))
    elif source == "fashion-mnist":
        raise BellboxError(f"{path}: no such folder; install Debian's package dataset-fashion-mnist")
    else:
        raise BellboxError(
            f"'{source}': no images here; name an .npz file, a folder with IDX files, a folder with train/CLASS/*, "
            "fashion-mnist, or hf:NAME"
        )
    height, width = opened.train.shape[1:]
    if size is not None and (height, width) != (size, size):
        raise BellboxError(f"'{source}' has images of {height} x {width}; leave the size out ({_SIZE})")
    return opened


def required_size(source: str, size: int | None) -> int:
    """The size that the images of a folder or of the hub are scaled to.

    Raises:
        BellboxError: none is given.
    """
    if size is None:
        raise BellboxError(f"'{source}' holds images of any size; say what to scale them to ({_SIZE})")
    return size
