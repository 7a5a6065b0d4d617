"""`hf:NAME[:CONFIG][:SPLIT]`: a dataset of the Hugging Face hub or a local folder, streamed by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bellbox.errors import BellboxError, require


def hub_parts(name: str) -> tuple[str, str | None, str]:
    """Dataset, configuration and split that a name asks for.

    Raises:
        BellboxError: another form.
    """
    dataset, *rest = name.removeprefix("hf:").split(":")
    if not dataset or len(rest) > 2:
        raise BellboxError(f"{name}: a hub dataset is written hf:NAME[:CONFIG][:SPLIT]")
    config, split = [*rest, "", ""][:2]
    return dataset, config or None, split or "train"


def open_hub(name: str) -> Any:
    """A stream of `datasets`: nothing but names of files is fetched here."""
    datasets = require("datasets", "text")
    dataset, config, split = hub_parts(name)
    try:
        return datasets.load_dataset(dataset, config, split=split, streaming=True)
    except Exception as error:
        raise BellboxError(f"{name}: cannot be opened: {_one_line(error)}") from error


def hub_rows(name: str, shard: tuple[int, int] | None) -> Iterator[tuple[object, str]]:
    """Rows of a dataset, or of one of its files, each with its place.

    Raises:
        BellboxError: the dataset cannot be opened, or breaks off.
    """
    stream = open_hub(name)
    if shard is not None:
        number, count = shard
        stream = stream.shard(num_shards=count, index=number)
        name = f"{name} file {number} of {count}"
    rows = iter(stream)
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise BellboxError(f"{name}: stopped at row {number}: {_one_line(error)}") from error
        yield row, f"{name} row {number}"
        number += 1


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
