"""Arrays of images in either layout, and headers and labels that claim more than there is."""

from __future__ import annotations

import gzip
import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bellbox.data.images import open_images
from bellbox.data.images.idx import read_idx
from bellbox.errors import BellboxError


def saved(folder: Path, images: np.ndarray, labels: np.ndarray | None = None) -> str:
    labels = np.arange(len(images)) % 3 if labels is None else labels
    path = folder / "a.npz"
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return str(path)


@pytest.mark.parametrize("shape", [(3, 8, 6), (1, 8, 8), (4, 5, 7), (3, 16, 16), (3, 1, 1), (1, 3, 3)])
def test_both_layouts_are_the_same_images(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    first = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    for images in (first, first.transpose(0, 2, 3, 1)):
        opened = open_images(saved(tmp_path, images)).train
        assert opened.shape == shape
        assert torch.equal(opened.read([4, 0]), torch.from_numpy(first[[4, 0]]))


def test_gray_images_need_no_axis_for_their_channel(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6), dtype=np.uint8)
    opened = open_images(saved(tmp_path, images)).train
    assert opened.shape == (1, 4, 6)
    assert torch.equal(opened.read([2])[0, 0], torch.from_numpy(images[2]))


@pytest.mark.parametrize(
    "shape", [(16, 16, 16), (16, 3, 16), (3, 3, 3), (3, 32, 3), (1, 8, 1), (2, 8, 8), (0, 8, 3)]
)
def test_a_layout_that_is_neither_or_both_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(BellboxError, match=r"height, width, channels are read|holds no images"):
        open_images(saved(tmp_path, np.zeros((6, *shape), dtype=np.uint8)))


@pytest.mark.parametrize("largest", [1 << 40, (1 << 64) - 1, 1 << 17])
def test_a_label_is_no_list_of_that_length(tmp_path: Path, largest: int) -> None:
    labels = np.array([0, 1, largest], dtype=np.uint64)
    tracemalloc.start()
    with pytest.raises(BellboxError, match="label"):
        open_images(saved(tmp_path, np.zeros((3, 4, 4, 1), dtype=np.uint8), labels))
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def header_of(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        header_of((1 << 40, 4, 4, 1)) + bytes(16),
        header_of((1 << 62, 1 << 62, 4, 1)) + bytes(16),
        header_of((-1, 4, 4, 1)) + bytes(16),
        header_of((3, 4, 4, 1)) + bytes(47),
        header_of((3, 4, 4, 1), "|O") + bytes(48),
        header_of((3, 4, 4, 1), "|V0") + bytes(48),
        header_of((3, 4, 4, 1)).replace(b"'shape'", b"'shape\\"),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70000,
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"no array",
        b"",
    ],
)
def test_an_array_is_what_its_header_says_or_refused(tmp_path: Path, content: bytes) -> None:
    path = saved(tmp_path, np.zeros((3, 4, 4, 1), dtype=np.uint8))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | {"train_images.npy": content}).items():
            archive.writestr(name, data)
    tracemalloc.start()
    with pytest.raises(BellboxError, match="train_images") as caught:
        open_images(path)
    assert "\n" not in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bellbox.data.images.npz._MOST_PACKED_BYTES", 1 << 22)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("train_images.npy", "w") as file,
    ):
        file.write(header_of((1 << 23,)))
        for _ in range(8):
            file.write(bytes(1 << 20))
    (tmp_path / "a.npz").write_bytes(buffer.getvalue())
    with pytest.raises(BellboxError, match="claim to unpack into"):
        open_images(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_header_is_not_believed(tmp_path: Path, packed: bool) -> None:
    content = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (4000, 1000, 1000)) + bytes(9)
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    with pytest.raises(BellboxError, match="truncated: 4000000000 bytes were announced"):
        read_idx(path, 3)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()
