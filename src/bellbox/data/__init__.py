"""Text to token shards, and batches that are a pure function of (seed, step, rank).

```python
dataset = data.open("classics")            # bundled novels; or a folder that `bellbox data prepare` wrote
batches = data.Batches(dataset.train, context=256, sequences_per_step=16, seed=0)
inputs, targets = batches.at(step)         # int64 [16, 256] each
```
"""

from __future__ import annotations

from pathlib import Path

from bellbox.data.batches import Batches
from bellbox.data.shards import TokenDataset, TokenSplit

__all__ = ["Batches", "TokenDataset", "TokenSplit", "open"]


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
