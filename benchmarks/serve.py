"""Sequences that are decoded together, and the server under many requests.

python benchmarks/serve.py speed          # 95M, 2 bits, one thread: tokens/s of 1, 2, 4, 8 and 16 sequences
python benchmarks/serve.py speed --embeddings int8 --temperature 0 --json serve.json
python benchmarks/serve.py parts          # of a step of 1 and of 16 sequences: blocks, head, sampling, in ms
python benchmarks/serve.py requests       # 10,000 requests to `bellbox serve`: memory, lost or mixed answers
python benchmarks/serve.py requests --preset 95M --count 200 --tokens 32 --clients 16

Speed: a packed model of random weights; each number of sequences goes on from a prompt, sampling included, in turns.
Both clocks are shown. Where the machine has other work, processor time says more; it has no meaning for two threads.

Requests: the texts of some seeds are made by `generate` first, and every answer is compared with them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import lzma
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bellbox as bb
from bellbox.benchmark import measure_machine
from bellbox.benchmark.model import random_model
from bellbox.data.bundled import VALID
from bellbox.data.tokenizer import Tokenizer
from bellbox.inference.batching import Batcher, Continuation, generate_batch
from bellbox.inference.decoding import steps_for
from bellbox.inference.sampling import Sampling, sample_each
from bellbox.inference.slots import SlotDecoder
from bellbox.models import preset
from bellbox.utils.files import write_text

_VOCABULARY = 32_000


class Sequences:
    """So many sequences of one model, which go on and on."""

    def __init__(self, model: Any, count: int, options: argparse.Namespace) -> None:
        self.count = count
        self._batcher = Batcher(SlotDecoder(model, count, options.prompt + options.room, options.kv_cache))
        for each in range(count):
            prompt = torch.randint(0, model.config.vocab_size, (options.prompt,)).tolist()
            settings = options.room, options.temperature, options.top_k, options.top_p
            self._batcher.add(Continuation(prompt, Sampling(*settings, seed=each)))
        while len(self._batcher.advance()) < count:
            pass

    def measure(self, rounds: int) -> tuple[float, float]:
        """Seconds of processor time and of the clock a token."""
        used, begun = time.process_time(), time.perf_counter()
        for _ in range(rounds):
            made = len(self._batcher.advance())
            assert made == self.count
        tokens = rounds * self.count
        return (time.process_time() - used) / tokens, (time.perf_counter() - begun) / tokens


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second of each number of sequences, a table an embedding."""
    torch.set_num_threads(options.threads)
    config = preset(options.preset, vocab_size=_VOCABULARY)
    found: list[dict[str, Any]] = []
    options.room = options.rounds * (options.turns + 1) + max(options.rows) + 2
    for embeddings in options.embeddings:
        model = random_model(config, options.bits, embeddings)
        contenders = [Sequences(model, rows, options) for rows in options.rows]
        taken: list[list[tuple[float, float]]] = [[] for _ in contenders]
        for turn in range(options.turns + 1):
            for each, times in zip(contenders, taken, strict=True):
                measured = each.measure(options.rounds)
                if turn:  # the first one warms up
                    times.append(measured)
        print(f"\n{options.preset}, {options.bits} bits, {embeddings} embeddings, {options.kv_cache} cache")
        base: list[float] = []
        for each, times in zip(contenders, taken, strict=True):
            clocks = [sorted(clock) for clock in zip(*times, strict=True)]
            medians = [statistics.median(clock) for clock in clocks]
            base = base or medians
            spreads = [f"{1 / clock[-1]:,.0f} to {1 / clock[0]:,.0f}" for clock in clocks]
            print(
                f"  {each.count:3} sequences: by processor time {1 / medians[0]:8,.0f} tokens/s ({spreads[0]}), "
                f"{base[0] / medians[0]:5.2f} x one; by the clock {1 / medians[1]:8,.0f} ({spreads[1]}), "
                f"{base[1] / medians[1]:5.2f} x"
            )
            names = "embeddings", "sequences", "processor_seconds", "clock_seconds"
            found.append(dict(zip(names, (embeddings, each.count, *medians), strict=True)))
    return found


def parts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of a step's parts by processor time, each part of each number of sequences in turns."""
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    for embeddings in options.embeddings:
        model = random_model(preset(options.preset, vocab_size=_VOCABULARY), options.bits, embeddings)
        calls: dict[tuple[int, str], Callable[[], object]] = {}
        for rows in options.rows:
            ids, slots = torch.zeros(rows, 1, dtype=torch.int64), list(range(rows))
            steps = steps_for(model, model.new_cache(rows, options.prompt + 1, options.kv_cache))
            assert steps is not None
            places = torch.tensor([[slot, options.prompt] for slot in slots])
            hidden = torch.randn(rows, 1, model.config.hidden_size)
            logits = 2 * torch.randn(rows, _VOCABULARY)
            asked = [Sampling(1, options.temperature, options.top_k, options.top_p)] * rows
            draws = [torch.Generator() for _ in slots]
            calls[rows, "step"] = partial(steps._logits, ids, places, options.threads)
            calls[rows, "head"] = partial(steps._logits_of, hidden)
            calls[rows, "sampling"] = partial(sample_each, logits, asked, draws)
        taken: dict[tuple[int, str], list[float]] = {each: [] for each in calls}
        with torch.no_grad():
            for turn in range(options.turns + 1):
                for each, call in calls.items():
                    begun = time.process_time()
                    for _ in range(options.rounds):
                        call()
                    if turn:
                        taken[each].append(1e3 * (time.process_time() - begun) / options.rounds)
        print(
            f"\n{options.preset}, {options.bits} bits, {embeddings} embeddings, {options.prompt} tokens of context, ms"
        )
        for (rows, name), times in taken.items():
            low, median, high = statistics.quantiles(times, n=4)
            print(f"  {rows:3} sequences: {name:8} {median:7.3f} ({low:.3f} to {high:.3f})")
            found.append({"embeddings": embeddings, "sequences": rows, "part": name, "ms": median})
    return found


def folder_of(options: argparse.Namespace, target: Path) -> Path:
    """A packed model of random weights with a tokenizer."""
    tokenizer = Tokenizer.train([lzma.decompress(VALID.read_bytes()).decode()], 512)
    model = random_model(preset(options.preset, vocab_size=tokenizer.vocab_size), 2)
    bb.save(model, target)
    tokenizer.save(target / "tokenizer.json")
    return target


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def requests(options: argparse.Namespace) -> dict[str, Any]:
    """Requests by many clients at once; some of them leave early."""
    with tempfile.TemporaryDirectory() as place:
        target = folder_of(options, Path(place) / "model")
        texts = expected(target, options)
        start = "from bellbox.cli.main import main; main()"
        flags = ["--port", "0", "--slots", str(options.slots), "--threads", str(options.threads)]
        command = [sys.executable, "-c", start, "serve", str(target), *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            url = next(line.split()[-1] for line in server.stdout if line.startswith("serving "))
            host, _, port = url.removeprefix("http://").rpartition(":")
            try:
                return _requests(options, server.pid, (host, int(port)), texts)
            finally:
                server.terminate()


_PROMPTS = ("It was a dark night", "Buck", "The dogs of the north ran all day. " * 5, "x")


def expected(target: Path, options: argparse.Namespace) -> list[str]:
    """The text of each seed."""
    model, tokenizer = bb.load(target), Tokenizer.load(target)
    seeds = range(options.seeds)
    ids = [tokenizer.encode(_PROMPTS[seed % len(_PROMPTS)]) for seed in seeds]
    stop = tokenizer.end_of_text
    made = generate_batch(model, ids, options.tokens, seeds=seeds, stop_token=stop)
    return [tokenizer.decode(one[:-1] if one[-1] == stop else one) for one in made]


def _requests(
    options: argparse.Namespace, pid: int, address: tuple[str, int], texts: list[str]
) -> dict[str, Any]:
    left, made = [0], [0]

    def one(number: int) -> bool:
        """Whether the answer is right; every tenth client leaves before it comes."""
        seed = number % len(texts)
        body = {"prompt": _PROMPTS[seed % len(_PROMPTS)], "max_tokens": options.tokens, "seed": seed}
        leaves = number % 10 == 9
        connection = http.client.HTTPConnection(*address, timeout=600)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": leaves}), headers)
        answer = connection.getresponse()
        if leaves:
            left[0] += 1
            answer.read(10)
            connection.close()
            return answer.status == 200
        status, said = answer.status, answer.read()
        connection.close()
        if status != 200:
            return False
        answered = json.loads(said)
        made[0] += answered["usage"]["completion_tokens"]
        return answered["choices"][0]["text"] == texts[seed]

    memory: list[int] = []
    wrong, begun = 0, time.perf_counter()
    order = list(range(options.count))
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(options.clients) as pool:
        for part in range(10):
            some = order[part * options.count // 10 : (part + 1) * options.count // 10]
            wrong += sum(not right for right in pool.map(one, some))
            memory.append(resident(pid))
            done = (part + 1) * options.count // 10
            print(f"  {done:7,} requests, {wrong} wrong, {memory[-1] / 2**20:,.1f} MiB", flush=True)
    seconds = time.perf_counter() - begun
    growth = memory[-1] - memory[1]
    print(
        f"{options.count:,} requests ({left[0]:,} left early) in {seconds:,.0f} s, {made[0] / seconds:,.0f} tokens/s; "
        f"{wrong} lost or mixed; memory grew by {growth / 2**20:.1f} MiB from the second tenth to the last"
    )
    return {
        "requests": options.count,
        "wrong": wrong,
        "seconds": seconds,
        "tokens": made[0],
        "memory": memory,
        "growth": growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_speed, of_requests = kinds.add_parser("speed"), kinds.add_parser("requests")
    of_speed.add_argument("--preset", default="95M")
    of_speed.add_argument("--bits", type=int, default=2)
    of_speed.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    of_speed.add_argument("--embeddings", nargs="+", default=["fp32", "int8", "int4"])
    of_speed.add_argument("--kv-cache", default="fp32")
    of_speed.add_argument("--prompt", type=int, default=64)
    of_speed.add_argument("--temperature", type=float, default=1.0)
    of_speed.add_argument("--top-k", type=int)
    of_speed.add_argument("--top-p", type=float)
    of_speed.add_argument("--turns", type=int, default=9)
    of_speed.add_argument("--rounds", type=int, default=10)
    of_parts = kinds.add_parser("parts", parents=[of_speed], add_help=False, conflict_handler="resolve")
    of_parts.set_defaults(rows=[1, 16])
    of_requests.add_argument("--preset", default="tiny")
    of_requests.add_argument("--count", type=int, default=10_000)
    of_requests.add_argument("--clients", type=int, default=32)
    of_requests.add_argument("--slots", type=int, default=16)
    of_requests.add_argument("--tokens", type=int, default=16)
    of_requests.add_argument("--seeds", type=int, default=40)
    for each in (of_speed, of_parts, of_requests):
        each.add_argument("--threads", type=int, default=1)
        each.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(measure_machine())
    results = {"speed": speed, "parts": parts, "requests": requests}[options.kind](options)
    if options.json is not None:
        write_text(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
