"""Images from every kind of source, batches as a function of (seed, step), augmentation, and what is refused."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bellbox.data.images import Augmentation, ImageBatches, open_images
from bellbox.data.images.augment import beta, crop, flip
from bellbox.data.images.base import ArraySplit
from bellbox.data.images.idx import read_idx
from bellbox.data.images.npz import JpegSplit
from bellbox.data.images.pictures import decode
from bellbox.errors import BellboxError

PIL = pytest.importorskip("PIL.Image")


def picture(color: tuple[int, int, int], size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PIL.new("RGB", size, color).save(buffer, form)
    return buffer.getvalue()


def jpeg_arrays(count: int = 6) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {"class_name": np.array(["red", "blue"])}
    for split in ("train", "test"):
        pictures = [picture((255 * (i % 2), 0, 255 - 255 * (i % 2)), form="JPEG") for i in range(count)]
        found[f"{split}_jpeg"] = np.frombuffer(b"".join(pictures), np.uint8)
        found[f"{split}_offsets"] = np.cumsum([0, *map(len, pictures)])
        found[f"{split}_labels"] = (1 - np.arange(count) % 2).astype(np.uint8)
    return found


def write_idx(folder: Path, packed: bool) -> None:
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for name, count in (("train", 5), ("t10k", 3)):
        images = draw.integers(0, 256, (count, 4, 6), dtype=np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
            data = bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()
            path = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)


def test_a_file_of_jpegs_gives_its_images_and_classes(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "two.npz", **jpeg_arrays())
    dataset = open_images(str(tmp_path / "two.npz"))
    assert dataset.classes == ("red", "blue")
    assert dataset.train.shape == (3, 8, 8)
    images = dataset.train.read([0, 1, 0])
    assert images.shape == (3, 3, 8, 8)
    assert images[:, 2, 3, 3].tolist() == [254, 0, 254]  # JPEG is not exact
    assert torch.equal(dataset.train.read([0]), images[:1])
    assert "re-encoded as JPEG" in dataset.note
    mean, deviation = dataset.statistics()
    assert mean == pytest.approx([0.5, 0.0, 0.5], abs=0.01)
    assert deviation[0] == pytest.approx(0.5, abs=0.01)


def test_a_file_of_arrays_is_read_as_it_is(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 1), dtype=np.uint8)
    labels = np.array([0, 1, 2, 1])
    np.savez(
        tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
    )
    dataset = open_images(str(tmp_path / "a.npz"))
    assert dataset.classes == ("0", "1", "2")
    assert torch.equal(dataset.valid.read([2])[0, 0], torch.from_numpy(images[2, :, :, 0]))


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_plain_or_packed(tmp_path: Path, packed: bool) -> None:
    write_idx(tmp_path, packed)
    dataset = open_images(str(tmp_path))
    assert dataset.train.shape == (1, 4, 6)
    assert (len(dataset.train), len(dataset.valid), len(dataset.classes)) == (5, 3, 5)
    write_idx(tmp_path / "other", not packed)
    assert open_images(str(tmp_path / "other")).checksum == dataset.checksum


def test_folders_are_classes_and_pictures_are_scaled(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            (folder / "1.png").write_bytes(picture((100 * number, 50, 0), (20, 10)))
    dataset = open_images(str(tmp_path), size=8)
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.read([1])[0, :, 0, 0].tolist() == [100, 50, 0]
    assert open_images(str(tmp_path), usual=4).train.shape == (3, 4, 4)
    assert open_images(str(tmp_path), 8, usual=4).train.shape == (3, 8, 8)
    with pytest.raises(BellboxError, match=r"say what to scale them to \(vision.image_size, --image-size\)"):
        open_images(str(tmp_path))
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(BellboxError, match="class 'cow' is not in train/"):
        open_images(str(tmp_path), size=8)


def test_a_data_set_of_the_hub_gives_its_images() -> None:
    library = pytest.importorskip("datasets")
    from bellbox.data.images.hub import from_splits

    features = library.Features({"image": library.Image(), "label": library.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": picture((0, 9, 0)), "path": None}] * 3, "label": [0, 1, 1]}
    split = library.Dataset.from_dict(rows, features)
    dataset = from_splits("hf:mine", {"train": split, "test": split}, size=4)
    assert dataset.classes == ("a", "b")
    assert dataset.train.labels.tolist() == [0, 1, 1]
    assert dataset.train.read([2])[0, :, 0, 0].tolist() == [0, 9, 0]
    with pytest.raises(BellboxError, match="needs the splits train and one of validation, valid, test"):
        from_splits("hf:mine", {"train": split}, size=4)


def test_rows_with_paths_are_read_and_rows_without_pictures_refused(tmp_path: Path) -> None:
    from bellbox.data.images.hub import HubSplit

    (tmp_path / "1.png").write_bytes(picture((0, 7, 0)))
    rows = [
        {"image": {"bytes": None, "path": str(tmp_path / "1.png")}},
        {"image": {"bytes": None, "path": str(tmp_path / "gone.png")}},
        {"image": {"bytes": None, "path": None}},
        {"image": None},
    ]
    split = HubSplit("hf:mine: train", rows, "image", np.zeros(4, np.int64), 4)
    assert split.read([0])[0, :, 0, 0].tolist() == [0, 7, 0]
    for index, message in (
        (1, r"image 1: .*gone\.png: cannot be read"),
        (2, "image 2: there is no"),
        (3, "image 3: there is no"),
    ):
        with pytest.raises(BellboxError, match=message):
            split.image(index)


def test_a_strip_is_cut_before_it_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,001 rows times 64 would be a gigabyte of pixels."""
    pixels = np.zeros((65_001, 1, 3), np.uint8)
    pixels[32_500] = 200  # the middle one
    buffer = io.BytesIO()
    PIL.fromarray(pixels).save(buffer, "PNG")
    asked, resize = [], PIL.Image.resize

    def watched(image: object, size: tuple[int, int], *rest: object, **named: object) -> object:
        asked.append(size)
        assert size == (64, 64)
        return resize(image, size, *rest, **named)

    monkeypatch.setattr(PIL.Image, "resize", watched)
    found = decode(buffer.getvalue(), "strip", 64)
    assert asked == [(64, 64)]
    assert found.shape == (64, 64, 3)
    assert found.max() > 190


def test_a_picture_that_pillow_complains_of_says_nothing_on_standard_error(tmp_path: Path) -> None:
    tiff = bytearray(picture((1, 2, 3), form="TIFF"))
    samples = struct.pack(
        "<HHIH", 277, 3, 1, 3
    )  # SamplesPerPixel, of which Pillow's log tells when it is absurd
    at = tiff.index(samples)
    tiff[at : at + len(samples)] = struct.pack("<HHIH", 277, 3, 1, 1027)
    (tmp_path / "one.tif").write_bytes(tiff)
    code = (
        "import sys; from pathlib import Path; from bellbox.data.images.pictures import decode\n"
        "try: decode(Path(sys.argv[1]), 'one.tif')\n"
        "except Exception as error: print(type(error).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "one.tif")], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("BellboxError\n", "")


def test_more_decoded_images_than_fit_are_refused() -> None:
    data = np.frombuffer(picture((1, 2, 3)), np.uint8)
    labels = np.zeros(1 << 27, np.uint8)
    with pytest.raises(BellboxError, match=r"134217728 images of 8 x 8, more than \d+ bytes decoded"):
        JpegSplit("many", labels, data, np.array([0, len(data)]))


def test_an_image_size_must_be_both_sides(tmp_path: Path) -> None:
    write_idx(tmp_path, packed=False)
    for size in (4, 6):
        with pytest.raises(
            BellboxError, match=r"has images of 4 x 6; leave the size out \(vision\.image_size"
        ):
            open_images(str(tmp_path), size=size)


def spoilt(path: Path, how: str) -> None:
    """An .npz file with one bad member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_labels.npy" if how != "no array" else "class_name", b"no array" * 50)
    content = bytearray(path.read_bytes())
    if how == "deflate":
        begin = 30 + len("train_labels.npy")
        content[begin] = 0xFF  # a kind of block that deflate does not have
    if how == "encrypted":
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("deflate", r"cannot be read as an \.npz file \(Error -3"),
        ("encrypted", r"cannot be read as an \.npz file \(.*encrypted"),
        ("no array", r"class_name\S* cannot be read as an \.npz file \(the magic string"),
    ],
)
def test_a_bad_member_is_refused_in_one_line(tmp_path: Path, how: str, message: str) -> None:
    spoilt(tmp_path / "s.npz", how)
    with pytest.raises(BellboxError, match=message) as caught:
        open_images(str(tmp_path / "s.npz"))
    assert "\n" not in str(caught.value)


def broken(tmp_path: Path, **changes: np.ndarray | None) -> str:
    arrays = {**jpeg_arrays(), **changes}
    np.savez(tmp_path / "b.npz", **{name: value for name, value in arrays.items() if value is not None})
    return str(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "test: there is no array 'test_labels'; there are: class_name"),
        ({"train_offsets": np.array([0, 1])}, "6 labels need 7 offsets, not 2"),
        ({"train_offsets": np.arange(7)}, "train_offsets must rise from 0 to"),
        ({"train_labels": np.full(6, 2)}, "labels from 2 to 2, but 2 classes"),
        ({"train_labels": np.zeros(6)}, r"train_labels is float64 of shape \(6,\), not 1-D integers"),
        ({"train_jpeg": np.zeros(4, np.uint8), "train_offsets": np.array([0, *[4] * 6])}, "image 0: cannot be read"),
        ({"class_name": np.array([{"a": 1}], dtype=object)}, "class_name.npy holds pickled objects"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(BellboxError, match=message) as caught:
        open_images(broken(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_damaged_containers_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = Path(broken(tmp_path))
    whole.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(BellboxError, match=r"cannot be read as an \.npz file"):
        open_images(str(whole))
    with pytest.raises(BellboxError, match=r"no images here; name an \.npz file"):
        open_images(str(tmp_path))
    write_idx(tmp_path, packed=False)
    path = tmp_path / "train-images-idx3-ubyte"
    data = path.read_bytes()
    for spoilt, message in (
        (data[:-1], "truncated"),
        (data + b"x", "longer than its header says"),
        (b"\0\0\x09\x03" + data[4:], "not an IDX file of uint8 with 3 dimension"),
        (data[:4] + b"\xff" * 12, "claims .* bytes, more than"),
    ):
        path.write_bytes(spoilt)
        with pytest.raises(BellboxError, match=message):
            read_idx(path, 3)


def split_of(count: int = 20, size: int = 6) -> ArraySplit:
    images = np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ArraySplit("here", np.arange(count) % 4, images)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    def batches(seed: int) -> ImageBatches:
        return ImageBatches(split_of(), 8, seed, Augmentation(crop=1, mixup=0.3, cutmix=1.0), classes=4)

    one, other = batches(0), batches(0)
    ahead = [other.at(step) for step in (5, 2)]
    for step, (images, targets) in zip((5, 2), ahead, strict=True):
        again = one.at(step)
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], targets)
        assert targets.shape == (8, 4)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert not torch.equal(batches(1).at(5)[0], ahead[0][0])


def test_an_epoch_visits_every_image_once_and_a_part_is_the_same_for_every_seed() -> None:
    batches = ImageBatches(split_of(), 5, 0, Augmentation(), classes=4)
    seen = np.concatenate([batches.indices(step) for step in range(8)])
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert list(seen[:20]) != list(seen[20:])
    parts = [ImageBatches(split_of(), 7, seed, Augmentation(), 4, images=7).indices(0) for seed in (0, 1)]
    assert sorted(parts[0]) == sorted(parts[1])
    for batch, images, message in (
        (8, 7, "a batch of 8 images cannot be made of 7"),
        (1, 21, "21 images are asked for"),
    ):
        with pytest.raises(BellboxError, match=message):
            ImageBatches(split_of(), batch, 0, Augmentation(), 4, images=images)


def numbered(batch: int, size: int) -> Tensor:
    return torch.arange(1, batch * size * size + 1).float().view(batch, 1, size, size)


def test_crop_moves_and_flip_mirrors() -> None:
    images, draw = numbered(64, 6), torch.Generator().manual_seed(0)
    moved = crop(images, 2, draw)
    found = set()
    for old, new in zip(images[:, 0], moved[:, 0], strict=True):
        places = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(new, torch.nn.functional.pad(old, (2, 2, 2, 2))[2 + dy : 8 + dy, 2 + dx : 8 + dx])
        ]
        assert len(places) == 1
        found.update(places)
    assert len(found) > 15
    mirrored = flip(images, draw)
    turned = [torch.equal(new, old.flip(-1)) for old, new in zip(images, mirrored, strict=True)]
    kept = [torch.equal(new, old) for old, new in zip(images, mirrored, strict=True)]
    assert sum(turned) + sum(kept) == 64
    assert 16 < sum(turned) < 48


def test_mixed_targets_say_what_the_images_hold() -> None:
    labels = torch.arange(8)
    images = labels.float().view(8, 1, 1, 1).expand(8, 1, 16, 16).contiguous()
    for seed in range(6):
        for augmentation in (Augmentation(0, False, mixup=0.4), Augmentation(0, False, cutmix=1.0)):
            mixed, targets = augmentation(images, labels, 8, torch.Generator().manual_seed(seed))
            expected = (targets * torch.arange(8)).sum(1)  # an image's mean is its label
            torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, rtol=1e-5, atol=1e-5)


def test_beta_draws_have_the_mean_and_spread_of_their_distribution() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.tensor([beta(0.4, draw) for _ in range(2000)])
    assert float(values.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(values.var()) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)
