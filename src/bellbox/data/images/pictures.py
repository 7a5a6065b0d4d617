"""Decoding picture files with Pillow, which is distrusted as far as it goes: known formats and bounded sizes only."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np

from bellbox.errors import BellboxError, require
from bellbox.utils.files import parsing, read_bytes

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
_MOST_PIXELS = 1 << 26
_MOST_BYTES = 64 << 20
# It tells a log of a damaged picture besides raising: for who listens, not for standard error.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def decode(data: bytes | Path, where: str, size: int | None = None) -> np.ndarray:
    """A picture as uint8 `[height, width, 3]`.

    Args:
        data: the file's bytes, or the file.
        where: its name, for messages.
        size: cut the largest square out of the middle and scale it to this; as it is where None.

    Raises:
        BellboxError: no picture, a damaged one, or one of more than 64 MiB or 67 million pixels.
    """
    require("PIL", "vision")
    from PIL import Image

    with parsing(where, "a picture"), Image.open(io.BytesIO(_bytes(data, where)), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > _MOST_PIXELS:
            raise BellboxError(f"{where}: {width} x {height} pixels, more than {_MOST_PIXELS}")
        picture = picture.convert("RGB")
        if size is not None:
            # The middle is cut out of the source: a scaled strip of 1 x 65000 would have gigabytes.
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            middle = (left, top, left + side, top + side)
            picture = picture.resize((size, size), Image.Resampling.BILINEAR, box=middle)
        return np.asarray(picture)


def _bytes(data: bytes | Path, where: str) -> bytes:
    if not isinstance(data, Path):
        return data
    try:
        return read_bytes(data, _MOST_BYTES)
    except BellboxError as error:
        raise BellboxError(str(error) if where == str(data) else f"{where}: {error}") from None
