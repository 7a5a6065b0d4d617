"""`bellbox-run` and Python in turns on one packed model: loading, first token, prefill, decode, peak memory.

    python benchmarks/device_speed.py demo/packed --turns 7 --new-tokens 200
    python benchmarks/device_speed.py --preset 95M --bits 2 --turns 7          # random weights, int8 embeddings

Each turn is a process of its own, one after the other, on as many threads as asked. Medians and quartiles. With
--preset a folder with random weights is packed first, which takes some minutes for the large ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FIELDS = (
    "load_seconds",
    "first_token_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "peak_mb",
)


def python_turn(folder: Path, prompt: str, new_tokens: int) -> dict[str, Any]:
    """What `bellbox generate` does, with its times."""
    import torch

    import bellbox as bb
    from bellbox.data.tokenizer import Tokenizer
    from bellbox.inference.generation import generate_text

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    begun = time.perf_counter()
    model, words = bb.load(folder), Tokenizer.load(folder)
    loaded = time.perf_counter() - begun
    stream = generate_text(model, words.backend, prompt, new_tokens, temperature=0.0)
    for _ in stream:
        pass
    return {
        "load_seconds": loaded,
        "first_token_seconds": loaded + stream.prefill_seconds,
        "prefill_tokens_per_second": stream.prefill_tokens_per_second,
        "decode_tokens_per_second": stream.decode_tokens_per_second,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def packed(folder: Path, preset_name: str, bits: int) -> None:
    """A folder of a preset with random weights, embeddings of int8, and a tokenizer of the bundled books."""
    import torch

    import bellbox as bb
    from bellbox.data.tokenizer import Tokenizer
    from bellbox.models import build, preset

    words = Tokenizer.train([Path(__file__).parents[1].joinpath("LICENSE").read_text()], 600)
    words.save(folder.parent / "tokenizer.json")
    model = bb.prepare(build(preset(preset_name), seed=0), bb.Recipe.bbq(bits, embedding_bits=8)).eval()
    with torch.no_grad():
        model(torch.arange(64)[None])
    bb.save(bb.convert(model), folder, tokenizer=str(folder.parent / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--preset")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--program", type=Path, default=Path("build/runtime/bellbox-run"))
    parser.add_argument("--prompt-words", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--python-turn", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    prompt = " ".join(["the work shall mean this licence and"] * (1 + asked.prompt_words // 7))
    if asked.python_turn:
        print(json.dumps(python_turn(asked.folder, prompt, asked.new_tokens)))
        return
    if (asked.folder is None) == (asked.preset is None):
        parser.error("give a packed folder or --preset")
    with tempfile.TemporaryDirectory() as made:
        folder = asked.folder
        if folder is None:
            folder = Path(made) / "packed"
            packed(folder, asked.preset, asked.bits)
        size = sum(each.stat().st_size for each in folder.iterdir()) / 1e6
        flags = [
            "--max-new-tokens",
            str(asked.new_tokens),
            "--temperature",
            "0",
            "--threads",
            str(asked.threads),
        ]
        again = [
            sys.executable,
            __file__,
            str(folder),
            "--python-turn",
            "--new-tokens",
            str(asked.new_tokens),
        ]
        commands = {
            "bellbox-run": [str(asked.program), str(folder), "--prompt", prompt, *flags, "--bench"],
            "python": [*again, "--prompt-words", str(asked.prompt_words)],
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads)}
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for _ in range(asked.turns):
            for name, command in commands.items():
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(
                        f"{name}: {done.stderr.strip()} (--prompt-words and --new-tokens say how much is asked)"
                    )
                turns[name].append(json.loads(done.stdout))
    print(f"{folder}: {size:.2f} MB, {asked.threads} threads, {asked.turns} turns; median (quartiles)")
    for field in FIELDS:
        parts = []
        for name, found in turns.items():
            low, middle, high = statistics.quantiles([each[field] for each in found], n=4, method="inclusive")
            parts.append(f"{name} {middle:.4g} ({low:.4g} to {high:.4g})")
        print(f"{field:28}", "   ".join(parts))


if __name__ == "__main__":
    main()
