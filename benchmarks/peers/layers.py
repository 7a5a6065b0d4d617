"""One layer: Bellbox, torch and every peer that is installed, taking turns in one process.

    benchmarks/peers/run.sh layers.py --shapes 4096x4096 --rows 1 --threads 1

Peers get fp32 or bf16 inputs, whichever they take; "product alone" gets integers that somebody else has quantized. Ours
is the whole operation from bf16 to bf16, input quantized to as many bits as the weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bellbox.benchmark import bench_kernels, measure_machine

PEERS = (
    ("torch_peers", "contenders"),
    ("onnx_peers", "contenders"),
    ("ggml_peers", "contenders"),
    ("other_peers", "bitsandbytes_nf4"),
    ("other_peers", "openvino_int4"),
)


def peers(absent: dict[str, str], outputs: int, chosen: list[str]) -> Callable[[Tensor, Any], dict[str, Any]]:
    def more(x: Tensor, copies: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for module, function in PEERS:
            if chosen and not any(word in f"{module}.{function}" for word in chosen):
                continue
            try:
                made = getattr(import_module(module), function)(x, outputs, copies)
                for name, (run, nbytes) in made.items():
                    run(0)
                    found[name] = run, nbytes
            except Exception as error:  # whatever a peer does, the others are measured
                absent[f"{module}.{function}"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return found

    return more


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["640x640", "2048x2048", "4096x4096", "11008x4096"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 2048])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each shape and number of rows")
    parser.add_argument(
        "--hot", action="store_true", help="one weight in the caches instead of copies in rotation"
    )
    parser.add_argument("--only", nargs="+", default=[], help="words of the peers' modules")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = measure_machine()
    print(machine, flush=True)
    results, absent = [], {}
    for shape in args.shapes:
        outputs, inputs = map(int, shape.split("x"))
        for rows in args.rows:
            more = peers(absent, outputs, args.only)
            found = bench_kernels(
                machine, outputs, inputs, rows, args.bits, hot=args.hot, seconds=args.seconds, more=more
            )
            own = "bf16" if any(each.name == "torch bf16" for each in found) else "fp32"
            base = next(each for each in found if each.name == f"torch {own}").seconds.median
            print(f"\n{outputs} x {inputs}, {rows} rows, {'hot' if args.hot else 'in rotation'}")
            for each in sorted(found, key=lambda each: each.seconds.median):
                s = each.seconds
                print(
                    f"  {each.name:42}{s.median * 1e6:11,.1f} us ({s.low * 1e6:,.1f} to {s.high * 1e6:,.1f})"
                    f"{base / s.median:7.2f} x {own}, reads at {each.read_fraction:4.0%}, "
                    f"integers at {each.integer_fraction or 0:4.0%}",
                    flush=True,
                )
            results += [each.to_dict() for each in found]
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    if args.json:
        figures = {"machine": machine.to_dict(), "absent": absent, "results": results}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
