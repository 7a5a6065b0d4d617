"""What a checkpoint costs a training step: none, written in the background, and written while training waits.

    python benchmarks/checkpoint_time.py                                        one process
    python benchmarks/checkpoint_time.py --ranks 2 --mode fsdp                  forks so many

The three ways take turns in one run, so that other work of the machine meets all of them alike. What a checkpoint costs
is spread over the steps between two of them (`--every`). `call` is how long the loop stood still for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bellbox.runs.config import (
    BatchSection,
    CheckpointSection,
    DataSection,
    DistributedSection,
    ModelSection,
    TrainConfig,
)
from bellbox.training import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))
import tiny_run

WAYS = ("none", "background", "waiting")


def measure(config: TrainConfig, every: int, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each stretch of `every` steps, and of each call of a save, by way."""
    trainer = Trainer(config, show=False)
    found: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    order = [way for _ in range(rounds + 2) for way in WAYS]
    step = trainer._train_step
    begun, number = 0.0, -1

    def one() -> None:
        nonlocal begun, number
        if trainer.state.step % every == 0:
            assert trainer.saver is not None
            trainer.saver.wait()  # what was begun in a stretch is paid for in it
            if number >= len(WAYS):  # the first round warms up
                found[order[number]][0].append(time.perf_counter() - begun)
            number += 1
            begun, way = time.perf_counter(), order[number]
            if way != "none":
                trainer.saver.background = way == "background"
                trainer._save()
                if number >= len(WAYS):
                    found[way][1].append(time.perf_counter() - begun)
        step()

    trainer._train_step = one
    trainer.run()
    return found


def main(arguments: argparse.Namespace, folder: Path, rank: int) -> None:
    """Train in one process, and have the first say what it took."""
    torch.set_num_threads(arguments.threads)
    shape = {"num_hidden_layers": arguments.layers, "hidden_size": arguments.width}
    shape |= {"intermediate_size": 4 * arguments.width, "num_attention_heads": 8}
    shape |= {"max_position_embeddings": arguments.context}
    config = dataclasses.replace(
        tiny_run.config(folder / "tokens", folder / "run"),
        model=ModelSection("tiny", shape),  # pyright: ignore[reportArgumentType]
        data=DataSection(source=str(folder / "tokens"), context=arguments.context),
        batch=BatchSection(tokens=arguments.tokens, micro_sequences=8),
        steps=arguments.every * len(WAYS) * (arguments.rounds + 1) + 1,
        eval_every=10**6,
        checkpoint_every=10**6,
        log_every=10**6,
        checkpoint=CheckpointSection(kind="sharded", keep=1),
        distributed=DistributedSection(mode=arguments.mode),
    )
    found = measure(config, arguments.every, arguments.rounds)
    if rank:
        return
    size = sum(p.stat().st_size for p in (folder / "run" / "checkpoints").rglob("shard-*"))
    base = statistics.median(found["none"][0]) / arguments.every
    print(
        f"{size / 1e6:.0f} MB a checkpoint, {arguments.tokens} tokens a step, one in {arguments.every} steps"
    )
    print("| way | s a step | of none | call, s | call, of a step |\n|---|---|---|---|---|")
    for way, (stretches, calls) in found.items():
        a_step = statistics.median(stretches) / arguments.every
        call = statistics.median(calls) if calls else 0.0
        print(f"| {way} | {a_step:.3f} | {a_step / base:.3f} | {call:.4f} | {call / base:.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--mode", choices=("none", "ddp", "fsdp"), default="none")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="bellbox-checkpoint-"))
    tiny_run.write_tokens(place / "tokens", 20000)
    if options.ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 1000)}
        os.environ |= {"WORLD_SIZE": str(options.ranks), "RANK": "0", "LOCAL_RANK": "0"}
    for number in range(1, options.ranks):
        if os.fork() == 0:
            os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
            main(options, place, number)
            sys.exit(0)
    main(options, place, 0)
    for _ in range(1, options.ranks):
        os.wait()
    shutil.rmtree(place, ignore_errors=True)
