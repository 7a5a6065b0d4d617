"""Text to token shards, and batches that are a pure function of (seed, step, rank).

```python
dataset = data.open("classics")            # bundled novels; or a folder that `bellbox data prepare` wrote
batches = data.Batches(dataset.train, context=256, sequences_per_step=16, seed=0)
inputs, targets = batches.at(step)         # int64 [16, 256] each
```
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bellbox.data.batches import Batches, Steps
from bellbox.data.mixture import MixedBatches, MixedDataset, check_weights
from bellbox.data.shards import TokenDataset, TokenSplit

__all__ = [
    "Batches",
    "MixedBatches",
    "MixedDataset",
    "Steps",
    "TokenDataset",
    "TokenSplit",
    "batches_of",
    "open",
    "open_mixture",
]


def open(path: str | Path, *, verify: bool = False) -> TokenDataset:
    """Open a token dataset, or the bundled novels by the name `classics`.

    Args:
        path: a folder that `prepare` wrote, or the string `classics`.
        verify: compare the checksums of the shards too (of the bundled ones always).

    Raises:
        BellboxError: for a folder that is no whole dataset.
    """
    if path == "classics":
        from bellbox.data.bundled import open_classics

        return open_classics()
    return TokenDataset.open(path, verify=verify)


def open_mixture(weights: Mapping[str, float], *, verify: bool = False) -> MixedDataset:
    """Open several token datasets as one.

    Args:
        weights: of each, by what `open` takes.
        verify: as of `open`.

    Raises:
        BellboxError: for a weight that is none, a folder that is no whole dataset, or different tokenizers.
    """
    check_weights(weights)
    return MixedDataset([(open(path, verify=verify), weight) for path, weight in weights.items()])


def batches_of(
    dataset: TokenDataset,
    *,
    context: int,
    sequences_per_step: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> Steps:
    """The training batches of a dataset or a mixture; arguments and errors as of `Batches`."""
    if isinstance(dataset, MixedDataset):
        splits = [part.train for part in dataset.parts]
        return MixedBatches(splits, dataset.shares, context, sequences_per_step, seed, rank, world_size)
    return Batches(dataset.train, context, sequences_per_step, seed, rank, world_size)
