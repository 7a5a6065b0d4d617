"""Text that comes with the package, so that everything runs on a machine without a network.

Six public-domain novels to train on and one to validate with, and a tokenizer trained on the six
(`classics/README.md`). The shards are made once, in the user's cache folder, under a name that is a hash of
the contents; a second process doing the same at the same time is harmless.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from bellbox.data.prepare import prepare
from bellbox.data.shards import VERSION, TokenDataset
from bellbox.errors import BellboxError

FOLDER = Path(__file__).parent / "classics"
TRAIN = FOLDER / "train.txt.xz"
VALID = FOLDER / "valid.txt.xz"
TOKENIZER = FOLDER / "tokenizer.json"


def default_cache() -> Path:
    """`$BELLBOX_CACHE`, else `$XDG_CACHE_HOME/bellbox`, else `~/.cache/bellbox`."""
    if own := os.environ.get("BELLBOX_CACHE"):
        return Path(own)
    if common := os.environ.get("XDG_CACHE_HOME"):
        return Path(common) / "bellbox"
    return Path.home() / ".cache" / "bellbox"


def open_classics(cache_dir: str | Path | None = None) -> TokenDataset:
    """The bundled novels as a token dataset (about a second the first time).

    Args:
        cache_dir: where the shards are kept; `default_cache()` where None.

    Raises:
        BellboxError: where the cache folder cannot be written.
    """
    digest = hashlib.sha256(b"%d" % VERSION)
    for file in (TRAIN, VALID, TOKENIZER):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    folder = Path(default_cache() if cache_dir is None else cache_dir)
    target = folder / f"classics-{digest.hexdigest()[:16]}"
    damaged = False
    if target.exists():
        try:
            return TokenDataset.open(target, verify=True)
        except BellboxError:
            # A cache may be rebuilt: the text is in the package.
            damaged = True
    try:
        return prepare(
            [TRAIN], target, tokenizer=TOKENIZER, valid=[VALID], overwrite=damaged, resumable=False
        )
    except BellboxError as error:
        try:
            return TokenDataset.open(target, verify=True)  # another process was faster
        except BellboxError:
            raise BellboxError(f"{error}; BELLBOX_CACHE names another cache folder") from error
