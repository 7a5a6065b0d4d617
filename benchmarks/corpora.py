"""Preparing a large corpus: memory of all processes, tokens a second, and the tokenizer library's own rate beside them.

    python benchmarks/corpora.py wiki.txt.xz --megabytes 400 --processes 2

The text is repeated until there are as many megabytes, in files of 16 MB (every other one `.jsonl.gz`, as C4 comes).
Memory is the sum of what the processes hold (PSS: pages that they share count once), looked at ten times a second. The
library's rate is that of `encode_batch_fast` on the same text in one process with as many threads, in memory: no
reading, no hashing, no shards. Both are measured in turns, and so is processor time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bellbox.benchmark.machine import cpu_name
from bellbox.data.shards import TokenDataset
from bellbox.data.tokenizer import Tokenizer

FILE_BYTES = 16 << 20
SAMPLE_BYTES = 4 << 20


def write_corpus(text: str, folder: Path, megabytes: int) -> int:
    """Files of documents; returns their bytes of text."""
    documents = [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    total, number, place = 0, 0, 0
    while total < megabytes << 20:
        rows, size = [], 0
        while size < FILE_BYTES and total + size < megabytes << 20:
            # Each copy says which it is, so that no two documents are equal.
            rows.append(f"{place // len(documents)}: {documents[place % len(documents)]}")
            size += len(rows[-1].encode())
            place += 1
        total += size
        lines = "\n".join(json.dumps({"text": row}) for row in rows)
        if number % 2:
            with gzip.open(folder / f"{number:04d}.json.gz", "wt", compresslevel=1) as file:
                file.write(lines)
        else:
            (folder / f"{number:04d}.jsonl").write_text(lines)
        number += 1
    return total


def family(pid: int) -> list[int]:
    """A process and those that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in family(int(child)))]


def held(pid: int, what: str = "Pss:") -> int:
    """Bytes that a process holds."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def prepare(folder: Path, out: Path, tokenizer: Path, processes: int) -> tuple[float, float, int]:
    """Seconds, processor seconds and peak bytes of `bellbox data prepare`."""
    before = os.times()
    begun, peak = time.perf_counter(), 0
    command = [
        sys.executable,
        "-m",
        "bellbox",
        "data",
        "prepare",
        folder,
        "--out",
        out,
        "--tokenizer",
        tokenizer,
    ]
    process = subprocess.Popen([*map(str, command), "--processes", str(processes)], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, sum(map(held, family(process.pid))))
        time.sleep(0.1)
    assert process.returncode == 0
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begun, used, peak


def library(text: str, tokenizer: Path) -> tuple[float, float]:
    """Tokens a second and tokens a processor second of the library alone."""
    backend = Tokenizer.load(tokenizer).backend
    texts = [text[at : at + 4096] for at in range(0, SAMPLE_BYTES, 4096)]
    tokens, wall, used = 0, time.perf_counter(), time.process_time()
    for at in range(0, len(texts), 256):
        batch = backend.encode_batch_fast(texts[at : at + 256], add_special_tokens=False)
        tokens += sum(len(one) for one in batch)
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - used)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="text, plain or .xz")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=8192)
    given = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(given.processes)
    content = given.text.read_bytes()
    text = (lzma.decompress(content) if given.text.suffix == ".xz" else content).decode()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        tokenizer = folder / "tokenizer.json"
        Tokenizer.train([text[: 4 << 20]], given.vocab_size).save(tokenizer)
        size = write_corpus(text, folder / "text", given.megabytes)
        first = library(text, tokenizer)
        seconds, used, peak = prepare(folder / "text", folder / "out", tokenizer, given.processes)
        second = library(text, tokenizer)
        made = TokenDataset.open(folder / "out")
        tokens = len(made.train) + len(made.valid)
    print(f"{cpu_name()}, {given.processes} processes, {size / 1e6:,.0f} MB of text, {tokens:,} tokens")
    print(f"peak memory of all processes {peak / 1e6:,.0f} MB")
    for what, wall, processor in (
        ("encode alone", *first),
        ("prepare", tokens / seconds, tokens / used),
        ("encode alone", *second),
    ):
        print(f"{what:<14} {wall:>12,.0f} tokens/s, {processor:>12,.0f} a processor second")


if __name__ == "__main__":
    main()
