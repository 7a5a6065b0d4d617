"""Sizes of tiles and pieces for a call, by shape and width. No number of this file changes a bit of any result.

Products ask the table of their GPU (`tiles.json`, which benchmarks/gpu/tune.py rewrites on one) and, for what it does
not know, a rule: of the tiles that compile without spills, that of the least foreseen cycles (`foreseen`).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from bellbox.ops.backends.triton.limits import LEAST_OUTPUTS

WHOLE_ROW = 4096
"""Longest row that a program of the backward holds in registers; longer ones are read twice, then from the cache."""
WHOLE_CODED_ROW = 8192
"""As `WHOLE_ROW`, for the coding of rows, which keeps less beside them."""
_PIECE = 4096
DECODE_ROWS = 16
"""Rows up to which a product is bound by reading the weights."""


def power_of_two(number: int) -> int:
    """The least one that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


# --- rows ---


def warps(size: int) -> int:
    """Of a program that holds `size` numbers: 16 to 32 a thread."""
    return min(16, max(1, size // 512))


def row_warps(size: int) -> int:
    """Of a program of a whole row, which also holds its statistic: 8 numbers a thread, or registers spill."""
    return min(16, max(1, size // 256))


def coding_warps(size: int, whole: bool = True, double: bool = True, few: bool = False) -> int:
    """Of a program that codes rows: 32 numbers a thread, over which what does not grow with them is shared out.

    Sixteen where there are `few` rows, no more than multiprocessors: most of the GPU is idle then. Two at least:
    one alone holds too much of the table of buckets, and spills. So does a piece of a row (not `whole`) whose squares
    are not summed in fp64 (`double`), at 32 numbers.
    """
    return min(16, max(2, size // (512 if few or not (whole or double) else 1024)))


def whole_row(columns: int, least: int, longest: int | None = None) -> tuple[int, bool]:
    """Numbers that a program of a row holds, and whether they are the row; at least `least` of them."""
    size = max(power_of_two(columns), least)
    return (size, True) if size <= max(longest or WHOLE_ROW, least) else (max(_PIECE, least), False)


def piece(columns: int, block: int) -> int:
    """Columns of a program where a row is shared out: at least a block of the rotation."""
    return max(min(power_of_two(columns), 2048), block)


def rows_each(rows: int, warps: int, processors: int) -> int:
    """Rows that a program codes one after the other, its table made once: at most 8, and no wave of programs half full.

    Args:
        rows: of the input.
        warps: of a program; a multiprocessor has registers for 16 of those that code rows.
        processors: multiprocessors.
    """
    resident = max(1, 16 // warps) * processors
    return -(-rows // (resident * -(-rows // (8 * resident))))


# --- GPUs ---


@dataclass(frozen=True)
class Gpu:
    """What sizes depend on."""

    capability: tuple[int, int]
    processors: int
    """Multiprocessors."""

    @property
    def fast_double(self) -> bool:
        """Whether there are units for fp64 in number: A100, H100, B200."""
        return self.capability in ((8, 0), (9, 0), (10, 0))

    @property
    def wide_products(self) -> bool:
        """Whether a group of warps multiplies together, reading one operand from shared memory: Hopper, so far."""
        return self.capability[0] == 9

    @property
    def products(self) -> int:
        """int8 multiply-adds of a multiprocessor in a cycle, dense; of sm_100 on the older path that Triton takes."""
        return {(8, 0): 2048, (9, 0): 4096, (10, 0): 2048, (10, 3): 2048}.get(self.capability, 1024)

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a program may have."""
        return {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}.get(
            self.capability, 99
        ) * 1024

    @property
    def takes_fp4(self) -> bool:
        """Whether tensor cores take e2m1: Blackwell."""
        return self.capability[0] in (10, 12)


INTERPRETED = Gpu((8, 0), 1)
"""What stands for a GPU where kernels are interpreted."""


@functools.cache
def _gpu(index: int | None) -> Gpu:
    return Gpu(
        torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count
    )


def gpu(x: Tensor) -> Gpu:
    """That a tensor is on."""
    return _gpu(x.device.index) if x.is_cuda else INTERPRETED


# --- products ---


def group(bits: int) -> int:
    """Blocks of 64 columns whose bytes are unpacked together: tensor cores take 32 columns or more of a field."""
    return 4 if bits == 1 else 2


@dataclass(frozen=True)
class Tiles:
    """Of a product: rows and outputs of a program, pieces of the columns, and how programs are launched."""

    rows: int
    outputs: int
    splits: int
    warps: int
    stages: int


LARGE = {
    False: (Tiles(128, 128, 1, 8, 3), Tiles(128, 64, 1, 4, 4), Tiles(64, 64, 1, 4, 4), Tiles(32, 64, 1, 4, 4)),
    True: (
        Tiles(256, 128, 1, 8, 3), Tiles(256, 64, 1, 4, 3), Tiles(128, 128, 1, 8, 4), Tiles(128, 64, 1, 4, 4),
        Tiles(64, 64, 1, 4, 4), Tiles(32, 64, 1, 4, 4),
    ),
}  # fmt: skip
"""Tiles of many rows that compile without spills, by `Gpu.wide_products`."""
ISSUED = {
    False: {(128, 128): 48.5, (128, 64): 68.4, (64, 64): 80.0, (32, 64): 130.0},
    True: {(256, 128): 13.9, (256, 64): 14.7, (128, 128): 24.3, (128, 64): 23.8, (64, 64): 45.0, (32, 64): 90.0},
}  # fmt: skip
"""Instructions of a thread for 1000 multiply-adds of its own in the loop of the machine code, 4 bits."""
CACHE_BYTES = 32
"""That a multiprocessor gets from the second cache in a cycle; reported for A100 and H100 between 24 and 47."""
_DRAM_PROGRAMS = 4
"""Programs of a multiprocessor that read at once, so that its share of the memory is busy."""


def foreseen(tiles: Tiles, rows: int, outputs: int, columns: int, bits: int, on: Gpu) -> float:
    """Cycles of a product of many rows: waves of programs, each as long as the slowest of its parts.

    These are products, instructions, and what is read from the cache that all share. Reasoned, not measured: as if
    parts overlapped wholly, and waves not at all.
    """
    programs = math.ceil(rows / tiles.rows) * math.ceil(outputs / tiles.outputs)
    pairs = tiles.rows * tiles.outputs
    issued = ISSUED[on.wide_products].get((tiles.rows, tiles.outputs), 100.0)
    read = tiles.rows + tiles.outputs * bits / 8
    cycles = columns * max(pairs / on.products, pairs * issued / 1000 / 128, read / CACHE_BYTES)
    return math.ceil(programs / on.processors) * cycles


def by_rule(rows: int, outputs: int, columns: int, bits: int, on: Gpu) -> Tiles:
    """For what no table has.

    Args:
        rows: of the input.
        outputs: of the layer.
        columns: of the layer.
        bits: of a weight.
        on: the GPU.
    """
    if rows <= DECODE_ROWS:  # bound by reading the weights: enough programs to keep all of the memory busy
        size = 64
        steps = -(-columns // (64 * group(bits)))
        wanted = _DRAM_PROGRAMS * on.processors // -(-outputs // size) if on is not INTERPRETED else 1
        return Tiles(DECODE_ROWS, size, max(1, min(16, steps, wanted)), 4, 4)
    return min(suitable(rows, bits, on), key=lambda each: foreseen(each, rows, outputs, columns, bits, on))


def suitable(rows: int, bits: int, on: Gpu) -> list[Tiles]:
    """Tiles of many rows that registers and shared memory have room for, with as many stages as there is."""
    found = []
    for each in LARGE[on.wide_products]:
        # Fewer rows than there are: weights would be read several times. On the older units three bits, which are two
        # tiles of words, leave no registers for the largest tile.
        large = each.rows * each.outputs >= 128 * 128
        if not min(64, power_of_two(rows)) <= each.rows <= max(32, power_of_two(rows)):
            continue
        if bits == 3 and large and not on.wide_products:
            continue
        stages = min(each.stages, on.shared // stage_bytes(each, bits))
        if stages >= 2:
            found.append(replace(each, stages=stages))
    return found


def stage_bytes(tiles: Tiles, bits: int) -> int:
    """Of shared memory that a step along the columns takes: coded rows, and packed weights."""
    return 64 * group(bits) * tiles.rows + 8 * bits * group(bits) * tiles.outputs


@dataclass(frozen=True)
class Table:
    """What is shipped for an architecture."""

    measured: bool
    plane_rows: int
    """Rows up to which products of 1- and 2-bit codes run on bit planes."""
    library_rows: int | None
    """Rows from which `torch._int_mm` multiplies unpacked weights; None: never."""
    tiles: Mapping[tuple[int, int, int, int], Tiles]
    """By bits, rows, outputs and columns."""
    packed_rows: int | None = None
    """Rows from which inputs are coded to 1, 2 or 4 bits instead of int8; None: never."""
    fp4: bool = False
    """Whether few levels multiply as e2m1: said by benchmarks/gpu/tune.py, which has seen it run and give the bits."""

    @staticmethod
    def of(given: Mapping[str, Any]) -> Table:
        """From what stands in the file."""
        tiles = {tuple(key): Tiles(*value) for key, value in given["tiles"]}
        return Table(
            given["measured"],
            given["plane_rows"],
            given["library_rows"],
            tiles,
            given["packed_rows"],
            given["fp4"],
        )  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        tiles = [
            [list(key), [each.rows, each.outputs, each.splits, each.warps, each.stages]]
            for key, each in sorted(self.tiles.items())
        ]
        return {
            "measured": self.measured,
            "plane_rows": self.plane_rows,
            "library_rows": self.library_rows,
            "packed_rows": self.packed_rows,
            "fp4": self.fp4,
            "tiles": tiles,
        }


PLANE_ROWS = 4
"""`Table.plane_rows` where there is no table. A guess."""
ROWS = (1, 16, 64, 256, 2048)
"""Numbers of rows that tables have tiles for; a call takes the next number that is not below its own, or the last."""
_FAR = 2.0
"""Distance of a shape from the nearest one of the table, in powers of two, from which the rule serves it better."""


@functools.cache
def tables() -> dict[str, Table]:
    """By architecture, such as sm_90."""
    given = json.loads(
        resources.files("bellbox.ops.backends.triton").joinpath("tiles.json").read_text(encoding="utf-8")
    )
    return {name: Table.of(each) for name, each in given.items()}


def table(on: Gpu) -> Table | None:
    """Of a GPU; None where none is shipped, and where kernels are interpreted."""
    return None if on is INTERPRETED else tables().get("sm_{}{}".format(*on.capability))


def plane_rows(on: Gpu) -> int:
    """Rows up to which products of 1- and 2-bit codes run on bit planes."""
    known = table(on)
    return PLANE_ROWS if known is None else known.plane_rows


def library_rows(on: Gpu) -> int | None:
    """Rows from which torch's own int8 product multiplies unpacked weights; None: never."""
    known = table(on)
    return None if known is None else known.library_rows


def packs_rows(rows: int, on: Gpu) -> bool:
    """Whether so many rows are coded to the bits of their codes, which the product unpacks as it does the weights."""
    known = table(on)
    return known is not None and known.packed_rows is not None and rows >= known.packed_rows


def fp4(on: Gpu) -> bool:
    """Whether few levels multiply as e2m1: on a GPU that takes it, where somebody has seen it run."""
    known = table(on)
    return on.takes_fp4 and known is not None and known.fp4


def fp4_tiles(rows: int) -> Tiles:
    """Tiles of a product of e2m1."""
    return Tiles(128 if rows > 64 else 64, 128, 1, 8 if rows > 64 else 4, 3)


def _far(shapes: Iterable[tuple[int, int]]) -> float:
    return sum(abs(math.log2(a / b)) for a, b in shapes)


@functools.lru_cache(maxsize=1024)
def tiles(rows: int, outputs: int, columns: int, bits: int, on: Gpu) -> Tiles:
    """Tiles of a product on tensor cores: those of the nearest shape in the table, else by the rule."""
    known, least = table(on), next((each for each in ROWS if rows <= each), ROWS[-1])
    near = [
        (_far(((key[2], outputs), (key[3], columns))), each)
        for key, each in (known.tiles.items() if known else ())
        if key[:2] == (bits, least)
    ]
    far, nearest = min(near, key=lambda pair: pair[0], default=(math.inf, None))
    if nearest is None or far >= _FAR or nearest.rows > max(64, power_of_two(rows)):
        return by_rule(rows, outputs, columns, bits, on)
    return nearest


def plane_tile(words: int) -> tuple[int, int]:
    """Outputs and words of a program on bit planes."""
    return LEAST_OUTPUTS, min(power_of_two(words), 64)
