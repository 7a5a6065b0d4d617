"""Record of a fake-quantized layer in its state: method, levels, rotation, granularity, in 128 bytes.

A tensor, so that every serializer keeps it.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.quantizers.base import Quantizer

_SIDE = struct.Struct("<BB16sHhIB16sIB16x")
SIZE = 2 * _SIDE.size
_SCHEMA = 1


@dataclass(frozen=True)
class Side:
    """One quantizer, as a record has it."""

    method: str
    levels: int
    twice_zero_point: int
    block: int
    signs: bool
    granularity: str
    options: int
    """CRC-32 of the options that the function depends on."""

    @classmethod
    def of(cls, quantizer: Quantizer) -> Side:
        """That of a quantizer."""
        options = {
            name: value
            for name, value in dataclasses.asdict(quantizer.options).items()
            if name not in quantizer.training_options
            and name != "signs"  # signs are a field of their own
            and not (name in quantizer.later_options and not value)
        }
        text = json.dumps(options, sort_keys=True)
        levels = quantizer.widest_levels
        return cls(
            quantizer.method[:16], levels.n, round(2 * levels.zero_point), quantizer.block,
            quantizer.signs is not None, quantizer.granularity, zlib.crc32(text.encode()),
        )  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What a layer's state belongs to."""

    weight: Side | None
    input: Side | None
    rotated: bool

    @classmethod
    def of(cls, weight: Quantizer | None, inputs: Quantizer | None, rotated: bool) -> Record:
        """That of a layer with these quantizers."""
        one, other = (None if each is None else Side.of(each) for each in (weight, inputs))
        return cls(one, other, rotated)

    def pack(self) -> Tensor:
        """uint8 `[128]`."""
        parts: list[bytes] = []
        for side in (self.weight, self.input):
            one = side or Side("", 0, 0, 0, False, "", 0)
            numbers = one.levels, one.twice_zero_point, one.block, one.signs
            texts = one.method.encode(), one.granularity.encode()
            parts.append(
                _SIDE.pack(_SCHEMA, side is not None, texts[0], *numbers, texts[1], one.options, self.rotated)
            )
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).clone()

    @classmethod
    def unpack(cls, value: object, name: str) -> Record:
        """The inverse of `pack`.

        Raises:
            BellboxError: a tensor that is no record, or one of a newer version.
        """
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.shape != (SIZE,):
            raise BellboxError(f"{name}: its record is none: uint8 [{SIZE}] is needed")
        data = value.cpu().numpy().tobytes()
        sides: list[Side | None] = []
        rotated = False
        for start in (0, _SIDE.size):
            schema, there, method, levels, twice, block, signs, granularity, options, rotated = (
                _SIDE.unpack_from(data, start)
            )
            if schema != _SCHEMA:
                raise BellboxError(f"{name}: its record has version {schema}; this Bellbox reads {_SCHEMA}")
            texts = [text.rstrip(b"\0").decode("ascii", "replace") for text in (method, granularity)]
            side = Side(texts[0], levels, twice, block, bool(signs), texts[1], options)
            sides.append(side if there else None)
        return cls(sides[0], sides[1], bool(rotated))
