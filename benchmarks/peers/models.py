"""A whole LLaMA of random weights: Bellbox, the same model in fp32 and bf16, and llama.cpp, taking turns.

    benchmarks/peers/run.sh models.py --preset 95M --threads 1

llama.cpp's types are its usual mixtures: the head of Q2_K is Q6_K, and rows that are no multiple of 256 get a type of
more bits. Sizes of the files are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from bellbox.benchmark import measure_machine
from bellbox.benchmark.model import bench_model
from bellbox.models import preset


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="95M")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--types", nargs="*", default=["Q4_0", "Q2_K", "TQ2_0"])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for prompts, and for single tokens")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = measure_machine()
    print(machine, flush=True)
    config = preset(args.preset, vocab_size=32_000)
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        peers = llama_cpp_models(Path(folder), config, args.types, args.prompt, absent)
        found = bench_model(
            config,
            args.bits,
            prompt=args.prompt,
            seconds=args.seconds,
            more=peers,
            progress=lambda line: print(f"  ... {line}", file=sys.stderr),
        )
    own = "bf16" if any(each.name == "bf16" for each in found) else "fp32"
    base = next(each for each in found if each.name == own)
    print(f"\n{args.preset}, prompt of {args.prompt} tokens; tokens/s by the median (quartiles)")
    for each in sorted(found, key=lambda each: each.decode.median):
        p, d = each.prefill, each.decode
        print(
            f"  {each.name:28} decode {1 / d.median:7.1f} ({1 / d.high:.1f} to {1 / d.low:.1f}) "
            f"{base.decode.median / d.median:5.2f} x {own}   prefill {args.prompt / p.median:8.0f} "
            f"({args.prompt / p.high:.0f} to {args.prompt / p.low:.0f}) {base.prefill.median / p.median:5.2f} x {own}"
        )
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    if args.json:
        figures = {
            "machine": machine.to_dict(),
            "preset": args.preset,
            "absent": absent,
            "results": [each.to_dict() for each in found],
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


def llama_cpp_models(
    folder: Path, config: object, types: list[str], prompt: int, absent: dict[str, str]
) -> dict[str, object]:
    found: dict[str, object] = {}
    try:
        import llama_model

        llama_model.write(folder / "fp16.gguf", config)
    except Exception as error:  # a peer that is not there is named, and the others are measured
        absent["llama.cpp"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return found
    for kind in types:
        try:
            target = folder / f"{kind}.gguf"
            llama_model.quantize(folder / "fp16.gguf", target, kind)
            found[f"llama.cpp {kind}"] = llama_model.Decoding(target, config.vocab_size, prompt)
            print(f"llama.cpp {kind}: {target.stat().st_size:,} bytes", flush=True)
        except Exception as error:
            absent[f"llama.cpp {kind}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


if __name__ == "__main__":
    main()
