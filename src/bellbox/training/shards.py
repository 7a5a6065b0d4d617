"""Check that a run goes on with the shards that it was begun with.

Their checksums stand in the manifest, but to read a whole corpus at every start would take longer than many a run. So
a run remembers size and time of each shard, and only those that look another way at the next start are read: a corpus
that was copied elsewhere is still the same, one that was written to is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bellbox.data.shards import ShardEntry, TokenDataset
from bellbox.errors import BellboxError
from bellbox.utils.files import read_json, sha256_file, write_text

if TYPE_CHECKING:
    from bellbox.data.images import ImageDataset

DATA_FILE = "data.json"


def remember_shards(dataset: TokenDataset | ImageDataset, file: Path) -> None:
    """Write down how the shards look now; nothing for images, whose checksum is taken anew at every start."""
    if isinstance(dataset, TokenDataset):
        looks = {shard.file: _look(dataset, shard) for shard in _shards(dataset)}
        write_text(file, json.dumps({"shards": looks}, indent=1) + "\n")


def refuse_other_shards(dataset: TokenDataset | ImageDataset, file: Path) -> None:
    """Read the shards that look another way than was written down, if it was.

    Raises:
        BellboxError: one of them does not hold what the manifest says, or the file is damaged.
    """
    if not isinstance(dataset, TokenDataset) or not file.exists():
        return
    looks = read_json(file).get("shards")
    if not isinstance(looks, dict):
        raise BellboxError(f"{file}: damaged; remove it")
    for shard in _shards(dataset):
        if looks.get(shard.file) != _look(dataset, shard) and (
            sha256_file(dataset.path / shard.file) != shard.sha256
        ):
            raise BellboxError(
                f"{dataset.path / shard.file}: was changed since the run was begun, its checksum is not the "
                "manifest's; put the old one back, or prepare the data anew and begin another run"
            )


def _shards(dataset: TokenDataset) -> Iterator[ShardEntry]:
    for split in dataset.manifest.splits.values():
        yield from split.shards


def _look(dataset: TokenDataset, shard: ShardEntry) -> list[int]:
    about = (dataset.path / shard.file).stat()
    return [about.st_size, about.st_mtime_ns]
