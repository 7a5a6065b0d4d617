"""The tables of docs/performance.md, measured in one sitting on one machine.

python benchmarks/sitting.py measure OUT.json --folder demo/packed     # some ten minutes; leave the machine alone
python benchmarks/sitting.py measure OUT.json --folder demo/packed --only start step
python benchmarks/sitting.py fill benchmarks/sittings/NAME.json docs/performance.md

Each part is a command of its own, in a process of its own; what it printed and wrote is kept. A part that is measured
again takes the place of its former figures. `fill` writes the tables between the marks `<!-- sitting: PART -->` and
`<!-- /sitting -->`, and a test holds the page to that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BELLBOX = [sys.executable, "-m", "bellbox"]
HELD = {"BELLBOX_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ROWS = ["--rows", "1", "16", "256", "--seconds", "3"]
LAYER = ["bench", "kernels", "--shapes", "4096x4096", *ROWS]
MODEL = ["bench", "model", "--preset", "95M", "--seconds", "12"]
PARTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "layer": ([*BELLBOX, *LAYER, "--threads", "1"], {}),
    "small layer": ([*BELLBOX, "bench", "kernels", "--shapes", "640x640", *ROWS, "--threads", "1"], {}),
    "layer, two threads": ([*BELLBOX, *LAYER, "--threads", "2"], {}),
    "layer, AVX2": ([*BELLBOX, *LAYER, "--threads", "1"], HELD),
    "model": ([*BELLBOX, *MODEL, "--bits", "4", "2", "1", "--threads", "1"], {}),
    "model, two threads": ([*BELLBOX, *MODEL, "--bits", "4", "2", "1", "--threads", "2"], {}),
    "cache": ([sys.executable, str(HERE / "kv_cache.py"), "speed", "--seconds", "8"], {}),
    **{
        f"step, {bits}": (
            [sys.executable, str(HERE / "step_time.py"), "--bits", str(bits), "--rounds", "5"],
            {},
        )
        for bits in (1, 2, 4)
    },
}
"""A part's command, to which `--json FILE` is added, and what its environment has besides."""
STARTS = 5


def measure(out: Path, folder: Path | None, only: list[str]) -> None:
    """Run the parts and keep what they found; after each, so that a stop loses one part at most."""
    out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for name, (command, more) in PARTS.items():
        if only and name.partition(",")[0] not in only and name not in only:
            continue
        print(f"--- {name}", flush=True)
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "figures.json"
            subprocess.run([*command, "--json", str(file)], check=True, env={**os.environ, **more})
            figures = json.loads(file.read_text(encoding="utf-8"))
        found[name] = {"command": in_words(command, more), "figures": figures}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if folder is not None and (not only or "start" in only):
        print("--- start", flush=True)
        found["start"] = starts(folder)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def in_words(command: list[str], more: dict[str, str]) -> str:
    """A command as one would type it."""
    line = " ".join(f"benchmarks/{Path(word).name}" if word.endswith(".py") else word for word in command[1:])
    line = line.replace("-m bellbox", "bellbox") if line.startswith("-m") else f"python {line}"
    return " ".join([*(f"{name}={value}" for name, value in more.items()), line])


def starts(folder: Path) -> dict[str, Any]:
    """Seconds from the start of a process to its end: what importing torch takes, and what comes on top of it."""
    with tempfile.TemporaryDirectory() as place:
        once = [
            "--batch.tokens",
            "4096",
            "--batch.micro-sequences",
            "8",
            "--data.context",
            "256",
            "--steps",
            "1",
        ]
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "import bellbox": [sys.executable, "-c", "import bellbox"],
            "the first token of `bellbox generate`": [
                *BELLBOX, "generate", str(folder), "--prompt", "Once upon a time", "--max-new-tokens", "1",
            ],
            "`bellbox train` of one step, validated and saved": [*BELLBOX, "train", "--folder", f"{place}/run", *once],
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(STARTS):
            for name, command in commands.items():
                subprocess.run(["rm", "-rf", f"{place}/run"], check=True)
                begun = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                times[name].append(time.perf_counter() - begun)
    return {"figures": times, "command": "the commands named, in turns, each a process of its own"}


# --- tables ---


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def in_time(seconds: float) -> str:
    """In microseconds or milliseconds, three digits."""
    return f"{seconds * 1e6:,.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.3g} ms"


def layers(part: dict[str, Any], base: str) -> str:
    """Times of torch and how many times as fast each width is, by rows; the share of the bandwidth at one row."""
    found = part["figures"]["results"]
    rows = sorted({each["rows"] for each in found})
    cell = {(each["name"], each["rows"]): each for each in found}
    names = [name for name in dict.fromkeys(each["name"] for each in found) if name.startswith("Bellbox")]

    def against(name: str, count: int) -> str:
        return f"{cell[base, count]['seconds']['median'] / cell[name, count]['seconds']['median']:.1f} x"

    body = [[base, *(in_time(cell[base, count]["seconds"]["median"]) for count in rows), ""]]
    body += [[n, *(against(n, count) for count in rows), f"{cell[n, 1]['read_fraction']:.0%}"] for n in names]
    many = [f"{count} row{'s' if count > 1 else ''}" for count in rows]
    return table(["", *many, "of the bandwidth, 1 row"], body)


def bf16_or_fp32(part: dict[str, Any]) -> str:
    """What torch is quickest in here."""
    names = {each["name"] for each in part["figures"]["results"]}
    return "torch bf16" if "torch bf16" in names else "torch fp32"


def models(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Tokens a second of each contender on one thread, and how many times as many two give."""
    other = {each["name"]: each for each in two["figures"]["results"]}
    rows = []
    for each in one["figures"]["results"]:
        cells = [each["name"]]
        for kind, tokens in (("decode", 1), ("prefill", each["prompt"])):
            s = each[kind]
            cells.append(
                f"{tokens / s['median']:,.0f} ({tokens / s['high']:,.0f} to {tokens / s['low']:,.0f})"
            )
            cells.append(f"{s['median'] / other[each['name']][kind]['median']:.2f} x")
        rows.append(cells)
    return table(["", "decode", "two threads", "prefill", "two threads"], rows)


def caches(part: dict[str, Any]) -> str:
    """Tokens a second over each cache and length."""
    rows = []
    for each in part["figures"]:
        speed = f"{1 / each['seconds']:,.0f} ({1 / each['high']:,.0f} to {1 / each['low']:,.0f})"
        rows.append(
            [f"{each['context']:,}", each["cache"], f"{each['mib']:.1f}", speed, f"{each['times_fp32']:.2f}"]
        )
    return table(["tokens of context", "cache", "MiB", "tokens/s", "x fp32"], rows)


def steps(found: dict[str, Any]) -> str:
    """A step's time and what it keeps, against no quantization."""
    rows = []
    for bits in (1, 2, 4):
        by = found[f"step, {bits}"]["figures"]["rows"]
        plain = by["no quantization"]
        cells = [f"{bits} bit{'s' if bits > 1 else ''}", f"{plain['median_s'] * 1e3:.0f} ms"]
        contenders = ("Bellbox, on integers", "Bellbox, on floats", "plain formula, autograd")
        cells += [f"{by[name]['ratio']:.2f}" for name in contenders]
        kept = by["Bellbox, on integers"]["kept_bytes"]
        cells.append(f"{kept / 1e3:.1f} kB ({kept / plain['kept_bytes']:.2f})")
        rows.append(cells)
    return table(["", "no quantization", "on integers", "on floats", "the formula", "kept on integers"], rows)


def started(part: dict[str, Any]) -> str:
    """Medians and ranges of whole processes."""
    rows = []
    for name, times in part["figures"].items():
        rows.append([name, f"{statistics.median(times):.2f} s", f"{min(times):.2f} to {max(times):.2f}"])
    return table(["", "seconds", "range"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer": lambda found: layers(found["layer"], bf16_or_fp32(found["layer"])),
    "small layer": lambda found: layers(found["small layer"], bf16_or_fp32(found["small layer"])),
    "layer, two threads": lambda found: layers(
        found["layer, two threads"], bf16_or_fp32(found["layer, two threads"])
    ),
    "layer, AVX2": lambda found: layers(found["layer, AVX2"], "torch fp32"),
    "model": lambda found: models(found["model"], found["model, two threads"]),
    "cache": lambda found: caches(found["cache"]),
    "step": steps,
    "start": lambda found: started(found["start"]),
    "conditions": lambda found: conditions(found),
}


def conditions(found: dict[str, Any]) -> str:
    """Machine and date, as the part `layer` found them, and the command of each part."""
    m = found["layer"]["figures"]["machine"]
    rate = 2 * m["integer_rate"] / 1e9
    line = (
        f"{m['cpu']}, torch {m['torch']}, {m['date']}; one thread reads {m['read_bandwidth'] / 1e9:.0f} GB/s "
        f"and does {rate:,.0f} GOPS of integers. Kernels: {m['kernels']}."
    )
    return line + "\n\n" + table(["part", "command"], [[n, f"`{p['command']}`"] for n, p in found.items()])


def filled(page: str, found: dict[str, Any]) -> str:
    """The page with each table between its marks.

    Raises:
        KeyError: a mark that names no table, or one that was not measured.
    """

    def put(match: re.Match[str]) -> str:
        return f"<!-- sitting: {match[1]} -->\n\n{TABLES[match[1]](found)}\n\n<!-- /sitting -->"

    return re.sub(r"<!-- sitting: (.*?) -->.*?<!-- /sitting -->", put, page, flags=re.DOTALL)


def main() -> None:
    """Measure, or fill a page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    measured, fills = parts.add_parser("measure"), parts.add_parser("fill")
    measured.add_argument("out", type=Path)
    measured.add_argument(
        "--folder", type=Path, help="a packed language model, for the time to its first token"
    )
    measured.add_argument("--only", nargs="+", default=[], help="these parts")
    fills.add_argument("figures", type=Path)
    fills.add_argument("page", type=Path)
    options = parser.parse_args()
    if options.part == "measure":
        measure(options.out, options.folder, options.only)
        return
    found = json.loads(options.figures.read_text(encoding="utf-8"))
    options.page.write_text(filled(options.page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
