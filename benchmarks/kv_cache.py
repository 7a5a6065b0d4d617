"""A KV cache in int8 and 4 bits against fp32: speed of a decode step in long contexts, and perplexity.

python benchmarks/kv_cache.py speed                              # 95M, 2 bits, one thread; 512, 4,096, 16,384 tokens
python benchmarks/kv_cache.py speed --preset 300M --contexts 4096 --json kv.json
python benchmarks/kv_cache.py perplexity MODEL --data DATA --context 4096    # of a run, packed or Hugging Face folder
python benchmarks/kv_cache.py perplexity MODEL --data DATA --precisions int4 --no-rotate

Speed: a packed model of random weights, its cache filled with random rows; the precisions take turns at every context.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bellbox.models.cache
from bellbox.benchmark import measure_machine
from bellbox.benchmark.model import random_model
from bellbox.benchmark.timing import take_turns
from bellbox.evaluation import perplexity
from bellbox.formats.auto import open_data_for, open_model
from bellbox.inference.decoding import Steps, steps_for
from bellbox.models import KVCache, Llama, preset
from bellbox.ops.cache_codes import CachePrecision

PRECISIONS: tuple[CachePrecision, ...] = ("fp32", "int8", "int4")


def fill(cache: KVCache, tokens: int, heads: int, head_dim: int) -> None:
    """Random rows of so many tokens, a layer at a time and a few tokens at a time."""
    cache.reset()
    while cache.length < tokens:
        some = min(4096, tokens - cache.length)
        for layer in range(len(cache.keys)):
            cache.append(layer, *torch.randn(2, cache.batch, heads, some, head_dim))
        cache.advance(some)


def decoding(model: Llama, cache: KVCache, tokens: int) -> Callable[[int], None]:
    """One token after so many, always from the same place."""
    steps = steps_for(model, cache)
    assert isinstance(steps, Steps)
    token = torch.zeros(1, 1, dtype=torch.int64)

    def step(_: int) -> None:
        cache.length = tokens
        steps.step(token)

    return step


@torch.no_grad()
def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode steps at each context, a table a context."""
    torch.set_num_threads(options.threads)
    print(measure_machine())
    longest = max(options.contexts) + 1
    config = preset(options.preset, vocab_size=32_000, max_position_embeddings=longest)
    model = random_model(config, options.bits, "int4")
    assert isinstance(model, Llama)
    print(
        f"\n{options.preset}, {options.bits} bits, heads of {config.head_size}, {options.threads} thread(s)"
    )
    print("context  cache    MiB    tokens/s (quartiles)          x fp32")
    results = []
    for context in options.contexts:
        runs, sizes = {}, {}
        for precision in options.precisions:
            cache = model.new_cache(1, context + 1, precision)
            fill(cache, context, config.key_value_heads, config.head_size)
            runs[precision], sizes[precision] = decoding(model, cache, context), cache.nbytes / 2**20
        found = take_turns(runs, options.seconds, least=10)
        base = found[options.precisions[0]].median
        for name, each in found.items():
            quartiles = f"({1 / each.high:,.1f} to {1 / each.low:,.1f})"
            print(
                f"{context:7,}  {name:5} {sizes[name]:7,.1f}  {1 / each.median:9,.1f} {quartiles:21} "
                f"{base / each.median:6.2f}"
            )
            results.append(
                {
                    "context": context,
                    "cache": name,
                    "mib": sizes[name],
                    "seconds": each.median,
                    "low": each.low,
                    "high": each.high,
                    "times_fp32": base / each.median,
                }
            )
    return results


def quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Perplexity of one model over each cache."""
    opened = open_model(options.model)
    split = open_data_for(opened, options.data)[0].split(options.split)
    if not options.rotate:
        bellbox.models.cache.head_block = lambda head_dim: 1  # noqa: ARG005  (what the rotation is for)
    results = []
    for precision in options.precisions:
        found = perplexity(
            opened.model,
            split,
            options.context or opened.context,
            max_tokens=options.max_tokens,
            batch_size=options.batch,
            kv_cache=precision,
        )
        print(
            f"{precision:5} perplexity {found.perplexity:9.4f}, loss {found.loss:.5f}   {found.protocol}",
            flush=True,
        )
        results.append({"cache": precision, "loss": found.loss, "protocol": found.protocol})
    return results


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    timed, scored = parts.add_parser("speed"), parts.add_parser("perplexity")
    for part in (timed, scored):
        part.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
        part.add_argument("--json", type=Path)
    timed.add_argument("--preset", default="95M")
    timed.add_argument("--bits", type=int, default=2)
    timed.add_argument("--threads", type=int, default=1)
    timed.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 16384])
    timed.add_argument("--seconds", type=float, default=10.0, help="a context, all precisions together")
    scored.add_argument("model")
    scored.add_argument("--data")
    scored.add_argument("--split", default="valid")
    scored.add_argument("--context", type=int)
    scored.add_argument("--max-tokens", type=int)
    scored.add_argument("--batch", type=int, default=1)
    scored.add_argument("--rotate", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    results = speed(options) if options.part == "speed" else quality(options)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
