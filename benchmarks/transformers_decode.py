"""Decode speed of a packed model under transformers' `generate`, beside `bellbox generate`.

python benchmarks/transformers_decode.py                          # the demo's LLaMA, 2 bits, one thread
python benchmarks/transformers_decode.py --presets tiny 95M gpt-tiny --tokens 64 --seconds 60
python benchmarks/transformers_decode.py --model OUT              # a folder of `bellbox export hf`
python benchmarks/transformers_decode.py --json decode.json

Packed models of random weights, exported and loaded. Contenders take turns: Bellbox's own loop; `generate` with a
static and a dynamic cache; the same with a hook, which makes it take transformers' own loop and modules around packed
layers; and the model in fp32 in transformers alone. Each run makes greedy tokens after the same prompt, and counts the
time of the whole call, prompt included. With one thread, time is what the processor spends on this process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import bellbox as bb
import bellbox.interop.transformers
from bellbox.benchmark import measure_machine
from bellbox.benchmark.timing import take_turns
from bellbox.inference.generation import generate
from bellbox.interop.transformers.export import export_packed
from bellbox.models import build, preset, save_hf

BAR = 0.8
"""Of Bellbox's own speed, on the demo's model with a static cache."""


def packed(name: str, bits: int) -> Any:
    """A packed model of random weights, and the plain one that it was made of."""
    torch.manual_seed(0)
    model = build(preset(name))
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, folder)
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    bb.prepare(model, bb.Recipe.bbq(bits))
    with torch.no_grad():
        model(torch.arange(64)[None])
    return bb.convert(model), plain


def contenders(
    ours: Any, theirs: Any, plain: Any, prompt: torch.Tensor, tokens: int
) -> dict[str, Callable[[int], object]]:
    """What takes turns, by name."""

    def of_transformers(model: Any, cache: str | None) -> Callable[[int], object]:
        def run(_: int) -> torch.Tensor:
            return model.generate(
                prompt,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                cache_implementation=cache,
            )[0, prompt.shape[1] :]

        return run

    def ordinary(_: int) -> object:
        handle = theirs.get_input_embeddings().register_forward_hook(lambda *_: None)
        try:
            return of_transformers(theirs, "static")(0)
        finally:
            handle.remove()

    def bellbox(_: int) -> torch.Tensor:
        return torch.cat(list(generate(ours, prompt, tokens, temperature=0)))

    found: dict[str, Callable[[int], object]] = {
        "bellbox generate": bellbox,
        "transformers, static cache": of_transformers(theirs, "static"),
        "transformers, dynamic cache": of_transformers(theirs, None),
        "transformers, its own loop": ordinary,
    }
    if plain is not None:
        found["transformers, fp32"] = of_transformers(plain, "static")
    return found


def measure(name: str, ours: Any, theirs: Any, plain: Any, options: argparse.Namespace) -> dict[str, Any]:
    """A table of one model."""
    prompt = torch.arange(2, 18)[None]
    runs = contenders(ours, theirs, plain, prompt, options.tokens)
    first = runs["bellbox generate"](0)
    same = {key: torch.equal(first, run(0)) for key, run in runs.items() if "fp32" not in key}  # type: ignore[arg-type]
    times = take_turns(runs, options.seconds)
    own = times["bellbox generate"].median
    print(f"\n{name}: {options.tokens} tokens after {prompt.shape[1]}\n")
    print("| | ms a token | quartiles | of bellbox's speed | the same tokens |\n|---|---|---|---|---|")
    rows: dict[str, Any] = {}
    for key, spread in times.items():
        ms = [1e3 * each / options.tokens for each in (spread.median, spread.low, spread.high)]
        rows[key] = {"ms": ms, "ratio": own / spread.median, "same": same.get(key)}
        told = {True: "yes", False: "no", None: "-"}[same.get(key)]
        print(f"| {key} | {ms[0]:.3f} | {ms[1]:.3f} to {ms[2]:.3f} | {own / spread.median:.2f} | {told} |")
    report = bb.backend_report(theirs).splitlines()
    print(f"\n{len(report)} packed layers: {sorted({line.split(maxsplit=1)[1] for line in report})}")
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["tiny"])
    parser.add_argument("--model", type=Path, help="a folder of `bellbox export hf` in place of presets")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of each model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    print(measure_machine())
    found: dict[str, Any] = {}
    for name in [str(options.model)] if options.model else options.presets:
        with tempfile.TemporaryDirectory() as folder:
            place, plain = options.model, None
            if place is None:
                ours, plain = packed(name, options.bits)
                place = Path(folder) / "m"
                export_packed(ours, place)
            else:
                ours = bb.load(place)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(place)
            found[name] = measure(name, ours, theirs, plain, options)
    ratio = next(iter(found.values()))["transformers, static cache"]["ratio"]
    print(f"\nbar: at least {BAR} of bellbox's speed with a static cache: {ratio:.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
