"""Find the fastest tiles of products on the GPU at hand, and write them into the table that the library reads.

    python benchmarks/gpu/tune.py                      # six minutes; rewrites ops/backends/triton/tiles.json
    python benchmarks/gpu/tune.py --minutes 2 --out here.json
    python benchmarks/gpu/tune.py --reasoned           # without a GPU: what the rule foresees, marked as not measured
    TRITON_INTERPRET=1 BELLBOX_BACKEND=triton python benchmarks/gpu/tune.py --dry --out x.json    # tries the script

Shapes come in the order of what they are worth: 4 bits before 2, 1 and 3, large layers before small ones. What the
minutes do not reach keeps the tiles that it had. Tiles change no bit of a result. Not run on a GPU yet (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import FULL, TINY, Bench
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.ops.backends.triton import plan
from bellbox.ops.backends.triton.launch.coding import Rows, Weights, code_rows
from bellbox.ops.backends.triton.launch.products import multiply, multiply_by_library
from bellbox.ops.backends.triton.plan import Gpu, Table, Tiles

FILE = Path(plan.__file__).parent / "tiles.json"
SHIPPED = {"sm_80": Gpu((8, 0), 108), "sm_90": Gpu((9, 0), 132)}
SHAPES = ((4096, 4096), (8192, 8192), (2048, 2048), (1024, 1024), (512, 512), (11008, 4096), (4096, 11008))
"""Outputs and columns."""
BITS = (4, 2, 1, 3)


def candidates(rows: int, bits: int, on: Gpu) -> list[Tiles]:
    """Tiles worth trying, that of the rule among them."""
    if rows <= plan.DECODE_ROWS:
        sizes = [(32, 4), (64, 4), (128, 4), (128, 8)]
        return [
            Tiles(16, n, splits, w, stages)
            for n, w in sizes
            for splits in (1, 2, 4, 8, 16)
            for stages in (3, 5)
        ]
    return [
        replace(each, stages=stages)
        for each in plan.suitable(rows, bits, on)
        for stages in (each.stages, each.stages + 1)
        if stages * plan.stage_bytes(each, bits) <= on.shared
    ]


def reasoned(on: Gpu) -> Table:
    """What the rule foresees for a GPU."""
    tiles = {
        (bits, rows, *shape): plan.by_rule(rows, *shape, bits, on)
        for bits in BITS for rows in plan.ROWS for shape in SHAPES
    }  # fmt: skip
    return Table(False, plan.PLANE_ROWS, None, tiles)


def weights_of(bench: Bench, outputs: int, columns: int, bits: int) -> Weights:
    """Packed weights of random codes."""
    layer = bench.layer(outputs, columns, bits)
    return Weights(layer.packed, layer.weight_scale, None, layer.weight_levels, columns)


def rows_of(bench: Bench, rows: int, weights: Weights, bits: int) -> Callable[[], Rows]:
    """Codes random rows for these weights; the numbers are drawn once."""
    levels = Levels.gaussian(2**bits)
    thresholds = torch.tensor(levels.thresholds, device=bench.device)
    one = torch.ones(1, device=bench.device)
    x, block = bench.randn(rows, weights.columns), min(128, weights.columns)
    return lambda: code_rows(x, weights, levels.grid, one, thresholds, None, None, block, "rms", False)


def fastest(bench: Bench, rows: Rows, weights: Weights, tried: list[Tiles]) -> tuple[float, Tiles]:
    """Seconds and tiles of the fastest; what does not compile on this GPU is passed over, with a word."""
    found: list[tuple[float, int]] = []
    for number, tiles in enumerate(tried):
        try:
            took = bench.seconds(lambda _, t=tiles: multiply(rows, weights, torch.bfloat16, t))
        except Exception as error:  # too much shared memory, too many registers: many names
            print(f"  {tiles}: {type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)
            continue
        found.append((took, number))
    if not found:
        raise SystemExit(f"no tiles run here: {tried}")
    took, number = min(found)
    return took, tried[number]


def questions(dry: bool) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Bits, rows and shape, most worth first."""
    for rows in (2048, 1, 16, 64, 256) if not dry else (1, 40):
        for bits in BITS if not dry else (4,):
            for shape in SHAPES if not dry else ((32, 64),):
                yield bits, rows, shape


def tune(bench: Bench, on: Gpu, known: Table, deadline: float, dry: bool) -> Table:
    """The table with what was measured until the deadline."""
    tiles = dict(known.tiles)
    for bits, rows, shape in questions(dry):
        if time.monotonic() > deadline:
            print("the minutes are over: the rest stays as it was", flush=True)
            break
        weights = weights_of(bench, *shape, bits)
        given = rows_of(bench, rows, weights, bits if bits > 2 else 4)()  # of four bits: never on planes
        tried = candidates(rows, bits, on) if not dry else [Tiles(32, 32, 1, 4, 1), Tiles(32, 32, 2, 4, 1)]
        took, tiles[bits, rows, *shape] = fastest(bench, given, weights, tried)
        bench.note(
            "tune", bits=bits, rows=rows, shape=str(shape), tiles=str(tiles[bits, rows, *shape]), seconds=took
        )
    return replace(known, measured=True, tiles=tiles)


@contextmanager
def decided(**answers: Any) -> Iterator[None]:
    """Functions of `plan` that say which kernels run, answering so for a while."""
    before = {name: getattr(plan, name) for name in answers}
    for name, answer in answers.items():
        setattr(plan, name, lambda *_, answer=answer: answer)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(plan, name, function)


def decide(bench: Bench, on: Gpu, known: Table, dry: bool) -> Table:
    """The table with which kernels win from how many rows on."""
    square, few, many = (64, (1, 2), (17, 20)) if dry else (4096, (1, 2, 4, 8, 16), (512, 2048, 8192, 32_768))
    with decided(table=known):
        plan.tiles.cache_clear()
        found = replace(
            known,
            plane_rows=plane_rows(bench, square, few),
            library_rows=library_rows(bench, square, many),
            packed_rows=packed_rows(bench, square, many),
            fp4=(on.takes_fp4 or dry) and fp4(bench, square, many[1]) and not dry,
        )
    plan.tiles.cache_clear()
    answers = {
        name: str(getattr(found, name)) for name in ("plane_rows", "library_rows", "packed_rows", "fp4")
    }
    bench.note("tune", what="decided", **answers)
    return found


def plane_rows(bench: Bench, square: int, few: Sequence[int]) -> int:
    """Rows up to which 2-bit codes are faster on bit planes."""
    weights, most = weights_of(bench, square, square, 2), 0
    for rows in few:
        code, times = rows_of(bench, rows, weights, 2), list[float]()
        for limit in (rows, 0):
            with decided(plane_rows=limit):
                given = code()
                times.append(bench.seconds(lambda _, given=given: multiply(given, weights, torch.bfloat16)))
        if times[0] >= times[1]:
            break
        most = rows
    return most


def library_rows(bench: Bench, square: int, many: Sequence[int]) -> int | None:
    """Rows from which torch's own product of unpacked weights is faster, at 4 bits."""
    weights = weights_of(bench, square, square, 4)
    for rows in many:
        given = rows_of(bench, rows, weights, 4)()
        with decided(library_rows=None):
            fused = bench.seconds(lambda _, given=given: multiply(given, weights, torch.bfloat16))
        library = bench.seconds(lambda _, given=given: multiply_by_library(given, weights, torch.bfloat16))
        if library < fused:
            return rows
    return None


def packed_rows(bench: Bench, square: int, many: Sequence[int]) -> int | None:
    """Rows from which coding to 4 bits, and the product that unpacks them, are faster together than by int8."""
    weights = weights_of(bench, square, square, 4)
    for rows in many:
        code, times = rows_of(bench, rows, weights, 4), list[float]()
        for packs in (True, False):
            with decided(packs_rows=packs):
                times.append(bench.seconds(lambda _, code=code: multiply(code(), weights, torch.bfloat16)))
        if times[0] < times[1]:
            return rows
    return None


def fp4(bench: Bench, square: int, rows: int) -> bool:
    """Whether products of e2m1 run here, give the bits of int8, and are faster: 2 bits by 2."""
    weights, found, times = weights_of(bench, square, square, 2), list[Tensor](), list[float]()
    code = rows_of(bench, rows, weights, 2)
    for pairs in (False, True):
        with decided(fp4=pairs):
            given = code()
            try:
                found.append(multiply(given, weights, torch.bfloat16))
            except Exception as error:  # does not compile, or not run: untested until seen
                print(f"  e2m1: {type(error).__name__}: {str(error).splitlines()[0][:80]}", flush=True)
                return False
            times.append(bench.seconds(lambda _, given=given: multiply(given, weights, torch.bfloat16)))
    same = torch.equal(*found)
    bench.note("tune", what="e2m1", same=same, over_int8=times[1] / times[0])
    return same and times[1] < times[0]


def write(out: Path, name: str, table: Table) -> None:
    """One GPU's table into the file, the others left."""
    held = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    held[name] = table.to_dict()
    lines = []
    for each, values in sorted(held.items()):
        tiles = ",\n".join(f"      {json.dumps(pair)}" for pair in values["tiles"])
        rest = ",\n".join(
            f'    "{key}": {json.dumps(value)}' for key, value in values.items() if key != "tiles"
        )
        lines.append(f'  "{each}": {{\n{rest},\n    "tiles": [\n{tiles}\n    ]\n  }}')
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="of measuring; compiling the last tiles is beyond"
    )
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--log", type=Path, default=Path("gpu-results"), help="folder of results.jsonl")
    parser.add_argument("--reasoned", action="store_true", help="no GPU: what the rule foresees")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at sizes that try the script alone")
    arguments = parser.parse_args(given)
    if arguments.reasoned:
        for name, on in SHIPPED.items():
            write(arguments.out, name, reasoned(on))
        return
    if not arguments.dry and not torch.cuda.is_available():
        parser.error(
            "torch sees no CUDA device; --reasoned writes what the rule foresees, --dry tries the script"
        )
    arguments.log.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        "cpu" if arguments.dry else "cuda",
        TINY if arguments.dry else replace(FULL, seconds=0.02),
        arguments.log,
    )
    on = plan.gpu(torch.empty(1, device=bench.device))
    known = plan.table(on) or replace(reasoned(on), tiles={})
    deadline = time.monotonic() + 60 * arguments.minutes
    found = tune(bench, on, known, deadline, arguments.dry)
    found = decide(bench, on, found, arguments.dry)
    write(arguments.out, "sm_{}{}".format(*on.capability), found)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
