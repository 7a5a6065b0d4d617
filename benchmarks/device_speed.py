"""`bellbox-run`, Python and llama.cpp in turns: loading, first token, prefill, decode, peak memory.

    python benchmarks/device_speed.py demo/packed --turns 7 --new-tokens 200
    python benchmarks/device_speed.py --preset 95M --bits 2 --turns 7          # random weights, int8 embeddings
    python benchmarks/device_speed.py --preset 95M --vocabulary 32000 --bits 4 2 1 --no-python --peers Q4_0 Q2_K

Each turn is a process of its own, one after the other, on as many threads as asked. Medians and quartiles. With
--preset folders with random weights are packed first, which takes some minutes for the large ones; --keep says where.
llama.cpp gets the same shape, and as many tokens of prompt and text. It needs the package gguf, and libraries that
benchmarks/peers/llama_library.py finds.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native_run

PEERS = Path(__file__).parent / "peers"
FIELDS = (
    "load_seconds",
    "first_token_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "peak_mb",
)
Turn = Callable[[], dict[str, Any]]


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


def shape_of(asked: argparse.Namespace) -> Any:
    """The preset, with the vocabulary that was asked for."""
    from bellbox.models import preset

    return preset(asked.preset, **({} if asked.vocabulary is None else {"vocab_size": asked.vocabulary}))


def packed(folder: Path, shape: Any, bits: int, embedding_bits: int) -> None:
    """A folder of a shape with random weights, rounded embeddings, and a tokenizer of the licence's words."""
    import torch

    import bellbox as bb
    from bellbox.data.tokenizer import Tokenizer
    from bellbox.models import build

    words = Tokenizer.train([Path(__file__).parents[1].joinpath("LICENSE").read_text()], 600)
    words.save(folder.parent / "tokenizer.json")
    recipe = bb.Recipe.bbq(bits, embedding_bits=embedding_bits)
    model = bb.prepare(build(shape, seed=0), recipe).eval()
    with torch.no_grad():
        model(torch.arange(64)[None])
    bb.save(bb.convert(model), folder, tokenizer=str(folder.parent / "tokenizer.json"))


def peer_files(place: Path, name: str, shape: Any, types: list[str]) -> dict[str, Path]:
    """The same shape as GGUF files, quantized by llama.cpp."""
    sys.path.insert(0, str(PEERS))
    import llama_model

    found = {kind: place / f"{name}-{kind}.gguf" for kind in types}
    plain = place / f"{name}-fp16.gguf"
    for kind, path in found.items():
        if not path.exists():
            if not plain.exists():
                llama_model.write(plain, shape)
            llama_model.quantize(plain, path, kind)
    return found


def process(command: list[str], threads: int) -> dict[str, Any]:
    """Another process's line of JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def contenders(asked: argparse.Namespace, place: Path, prompt: str) -> dict[str, Turn]:
    """By name and size of the file."""
    folders: dict[str, Path] = {"": asked.folder}
    if asked.preset is not None:
        shape = shape_of(asked)
        name = f"{asked.preset}-{shape.vocab_size}"
        folders = {}
        for bits in asked.bits:
            for rounded in asked.embedding_bits:
                folder = place / f"{name}-{bits}-{rounded}"
                if not folder.exists():
                    packed(folder, shape, bits, rounded)
                folders[f" {bits} bit{'s' if bits > 1 else ''}, embeddings of {rounded}"] = folder
    found: dict[str, Turn] = {}
    again = [sys.executable, __file__, "--python-turn", "--new-tokens", str(asked.new_tokens)]
    again += ["--prompt-words", str(asked.prompt_words)]
    for kind, folder in folders.items():
        size = sum(each.stat().st_size for each in folder.iterdir()) / 1e6
        found[f"bellbox-run{kind}, {size:.1f} MB"] = functools.partial(
            native_run.bench,
            folder,
            prompt,
            asked.new_tokens,
            temperature=0,
            threads=asked.threads,
            program=asked.program,
        )
        if not asked.no_python:
            found[f"Python{kind}"] = functools.partial(process, [*again, str(folder)], asked.threads)
    if asked.peers:
        from bellbox.data.tokenizer import Tokenizer

        length = len(Tokenizer.load(next(iter(folders.values()))).backend.encode(prompt).ids)
        for kind, path in peer_files(place, name, shape, asked.peers).items():
            command = [sys.executable, str(PEERS / "llama_model.py"), str(path), "--prompt", str(length)]
            command += ["--vocabulary", str(shape.vocab_size)]
            command += ["--new-tokens", str(asked.new_tokens), "--threads", str(asked.threads)]
            peer = f"llama.cpp {kind}, {path.stat().st_size / 1e6:.1f} MB"
            found[peer] = functools.partial(process, command, asked.threads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--preset")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--embedding-bits", type=int, nargs="+", default=[8], choices=(4, 8))
    parser.add_argument("--vocabulary", type=int, help="of a preset; its own where not given")
    parser.add_argument("--peers", nargs="*", default=[], help="llama.cpp's types, beside a preset")
    parser.add_argument("--program", type=Path, default=native_run.PROGRAM)
    parser.add_argument("--prompt-words", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-python", action="store_true", help="bellbox-run and the peers alone")
    parser.add_argument("--keep", type=Path, help="a folder for what --preset makes, taken again if there")
    parser.add_argument("--python-turn", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    prompt = " ".join(["the work shall mean this licence and"] * (1 + asked.prompt_words // 7))
    if asked.python_turn:
        print(json.dumps(python_turn(asked.folder, prompt, asked.new_tokens)))
        return
    if (asked.folder is None) == (asked.preset is None):
        parser.error("give a packed folder or --preset")
    if asked.peers and asked.preset is None:
        parser.error("--peers goes with --preset: they are made in its shape")
    with tempfile.TemporaryDirectory() as made:
        place = asked.keep or Path(made)
        place.mkdir(parents=True, exist_ok=True)
        running = contenders(asked, place, prompt)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for _ in range(asked.turns):
            for name, run in running.items():
                turns[name].append(run())
    print(f"{asked.folder or asked.preset}: {asked.threads} threads, {asked.turns} turns; median (quartiles)")
    for field in FIELDS:
        print(field)
        for name, found in turns.items():
            if field in found[0]:
                low, middle, high = statistics.quantiles(
                    [each[field] for each in found], n=4, method="inclusive"
                )
                print(f"  {name:42} {middle:9.4g} ({low:.4g} to {high:.4g})")


if __name__ == "__main__":
    main()
