"""Everything about speed on one GPU, part by part; `benchmarks/gpu/run.sh` runs all of it.

    python benchmarks/gpu/measure.py --out gpu-results                   # all parts, then the tables
    python benchmarks/gpu/measure.py --out gpu-results kernels decode    # some
    TRITON_INTERPRET=1 BELLBOX_BACKEND=triton python benchmarks/gpu/measure.py --dry --out x     # tries the script

Each part appends lines to results.jsonl in the folder as it goes, so what was measured stays when a later part fails.
The last lines of a part count. tables.md is made of them at the end. Called again without parts, it goes on with those
that are not finished yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from bench import FULL, TINY, Bench
from of_kernels import ceilings, codes, environment, kernels, sweep
from of_models import decode, prefill, training
from tables import pictures, tables

PARTS: dict[str, Callable[[Bench], None]] = {
    each.__name__: each for each in (environment, codes, ceilings, kernels, sweep, decode, training, prefill)
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="on the CPU, at sizes that try the script alone")
    arguments = parser.parse_args()
    unknown = [each for each in arguments.parts if each not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: they are {', '.join(PARTS)}")
    if not arguments.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry tries the script on the CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench("cpu" if arguments.dry else "cuda", TINY if arguments.dry else FULL, arguments.out)
    wanted = arguments.parts or [each for each in PARTS if each not in finished(arguments.out)]
    failed = run(bench, wanted)
    (arguments.out / "tables.md").write_text(tables(arguments.out), encoding="utf-8")
    pictures(arguments.out)
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


def finished(out: Path) -> set[str]:
    """Parts that an earlier run went to the end of."""
    file = out / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["name"] for row in rows if row["part"] == "finished"}


def run(bench: Bench, parts: list[str]) -> list[str]:
    """Measure; the parts that failed, or that an interrupt (the limit of run.sh) left."""
    failed: list[str] = []
    for number, name in enumerate(parts):
        begun = time.perf_counter()
        print(name, flush=True)
        try:
            PARTS[name](bench)
            bench.note("finished", name=name, seconds=time.perf_counter() - begun)
        except KeyboardInterrupt:
            return failed + parts[number:]
        except Exception:
            failed.append(name)
            traceback.print_exc()
        gc.collect()
        if bench.cuda:
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    main()
