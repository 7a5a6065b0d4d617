from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from bellbox.data.prepare import prepare
from bellbox.data.shards import TokenDataset, dtype_for
from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError


def test_a_split_reads_as_one_sequence_over_its_shards(dataset: TokenDataset) -> None:
    raw = np.concatenate(
        [np.fromfile(dataset.path / shard.file, "<u2") for shard in dataset.manifest.splits["train"].shards]
    )
    train = dataset.train
    assert len(dataset.manifest.splits["train"].shards) > 3
    assert len(raw) == len(train)
    for start, stop in [
        (0, len(raw)),
        (0, 0),
        (699, 701),
        (650, 2150),
        (700, 1400),
        (len(raw) - 1, len(raw)),
    ]:
        part = train.read(start, stop)
        assert part.dtype == np.int64
        assert np.array_equal(part, raw[start:stop])
    for start, stop in [(-1, 3), (0, len(raw) + 1), (3, 2)]:
        with pytest.raises(IndexError):
            train.read(start, stop)


def test_shards_are_mapped_and_not_read(dataset: TokenDataset) -> None:
    assert all(isinstance(shard, np.memmap) for shard in dataset.train.shards)


def test_the_manifest_counts_what_is_there(dataset: TokenDataset) -> None:
    lengths = dataset.byte_lengths()
    for split in dataset.splits.values():
        tokens = split.read(0, len(split))
        assert lengths[tokens].sum() == split.bytes
        assert (tokens == dataset.end_of_text).sum() == split.documents
        assert tokens[-1] == dataset.end_of_text
    for entry in dataset.manifest.splits.values():
        for shard in entry.shards:
            assert hashlib.sha256((dataset.path / shard.file).read_bytes()).hexdigest() == shard.sha256
    assert dataset.tokenizer.sha256 == dataset.manifest.tokenizer_sha256


def test_the_stored_type_grows_with_the_vocabulary() -> None:
    assert [dtype_for(size) for size in (2, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def test_a_vocabulary_over_sixteen_bits_is_stored_in_32(
    tmp_path: Path, documents: Path, small_tokenizer: Tokenizer
) -> None:
    spec = json.loads(small_tokenizer.text)
    far = {"id": 70_000, "content": "<|far|>", "special": False, "single_word": False}
    spec["added_tokens"].append(far | {"lstrip": False, "rstrip": False, "normalized": False})
    spec["model"]["vocab"] |= {f"filler{i}": i for i in range(len(spec["model"]["vocab"]), 70_001)}
    spec["model"]["vocab"].pop("filler70000")
    spec["model"]["vocab"]["<|far|>"] = 70_000
    (documents.parent / "far.txt").write_text("a <|far|> b")
    made = prepare([documents], tmp_path / "wide", tokenizer=Tokenizer(json.dumps(spec)),
                   valid=[documents.parent / "far.txt"])  # fmt: skip
    assert made.manifest.dtype == "uint32"
    assert 70_000 in made.valid.read(0, len(made.valid))
    assert made.tokenizer.decode(made.valid.read(0, len(made.valid) - 1)) == "a <|far|> b"


def test_a_split_that_is_not_there_is_named(dataset: TokenDataset) -> None:
    with pytest.raises(BellboxError, match="no split 'test'; there are: train, valid"):
        dataset.split("test")


def test_a_shard_cut_short_or_missing_is_refused_at_opening(dataset: TokenDataset) -> None:
    shard = dataset.path / "train-00001.bin"
    data = shard.read_bytes()
    for damaged in (data[:-1], data + b"\0\0", b""):
        shard.write_bytes(damaged)
        with pytest.raises(BellboxError, match=r"train-00001\.bin: \d+ bytes where the manifest says 1400"):
            TokenDataset.open(dataset.path)
    shard.unlink()
    with pytest.raises(BellboxError, match=r"train-00001\.bin: missing"):
        TokenDataset.open(dataset.path)


def test_an_altered_shard_is_found_on_request(dataset: TokenDataset) -> None:
    TokenDataset.open(dataset.path, verify=True)
    shard = dataset.path / "train-00001.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    TokenDataset.open(dataset.path)
    with pytest.raises(BellboxError, match=r"train-00001\.bin: altered"):
        TokenDataset.open(dataset.path, verify=True)
    data[101] = 255
    shard.write_bytes(data)
    with pytest.raises(BellboxError, match=r"train-00001\.bin: holds token \d+, the vocabulary ends at 299"):
        TokenDataset.open(dataset.path, verify=True)


def test_another_tokenizer_beside_the_shards_is_refused(dataset: TokenDataset) -> None:
    file = dataset.path / "tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(BellboxError, match="not the tokenizer that the shards were made with"):
        TokenDataset.open(dataset.path)
    file.unlink()
    with pytest.raises(BellboxError, match=r"tokenizer\.json: missing"):
        TokenDataset.open(dataset.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2, this Bellbox reads 1"),
        ({"format": "other"}, "not the manifest of a token dataset"),
        ({"vocab_size": "many"}, "field 'vocab_size'"),
        ({"vocab_size": 299}, "its checksum does not match"),
        ({"extra": 1}, "field 'extra'"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(dataset: TokenDataset, change: dict, message: str) -> None:
    file = dataset.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BellboxError, match=message) as caught:
        TokenDataset.open(dataset.path)
    assert "\n" not in str(caught.value)


def test_a_shard_name_that_leads_out_of_the_folder_is_refused(dataset: TokenDataset) -> None:
    from bellbox.data.shards import Manifest, write_manifest

    fields = dataset.manifest.model_dump()
    fields["splits"]["train"]["shards"][0]["file"] = "../train-00000.bin"
    write_manifest(dataset.path, Manifest.model_validate(fields))
    with pytest.raises(BellboxError, match="is no name of a shard"):
        TokenDataset.open(dataset.path)


def test_a_manifest_mutated_at_random_never_opens_as_something_else(dataset: TokenDataset) -> None:
    file = dataset.path / "manifest.json"
    good = file.read_bytes()
    expected = dataset.manifest
    random.seed(1)
    messages = []
    for _ in range(300):
        data = bytearray(good)
        if random.random() < 0.3:
            data = data[: random.randrange(len(data))]
        else:
            data[random.randrange(len(data))] = random.randrange(256)
        file.write_bytes(data)
        try:
            assert TokenDataset.open(dataset.path).manifest == expected
        except BellboxError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert not any("\n" in message for message in messages)


def test_what_is_no_dataset_is_named(tmp_path: Path, dataset: TokenDataset) -> None:
    with pytest.raises(BellboxError, match=r"none: no such folder; make one with: bellbox data prepare"):
        TokenDataset.open(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BellboxError, match=r"no manifest\.json in it"):
        TokenDataset.open(empty)
    shutil.copy(dataset.path / "train-00000.bin", empty / "manifest.json")
    with pytest.raises(BellboxError, match="damaged, not readable as JSON"):
        TokenDataset.open(empty)
