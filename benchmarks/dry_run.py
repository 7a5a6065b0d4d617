"""What `bellbox train --dry-run` foresees, against one real forward and backward.

    python benchmarks/dry_run.py --preset 95M --method bbq_paper --sequences 4

Memory is what the process took above its weights; time is the processor's of one thread, so that others on the machine
matter little. Text is random tokens.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from torch.nn import functional as F

from bellbox.benchmark.machine import cpu_name, product_rate
from bellbox.runs.build import make_model
from bellbox.runs.config import BatchSection, DataSection, ModelSection, QuantizationSection, TrainConfig
from bellbox.training.dry_run import DryRun, dry_run
from bellbox.utils.memory import peak_memory

GIB = 1 << 30


def foreseen(preset: str, method: str, sequences: int, context: int) -> DryRun:
    """Of one step of one pass."""
    return dry_run(
        TrainConfig(
            model=ModelSection(preset, {"vocab_size": 50304, "fused_qkv": True}),
            data=DataSection("hf:none", context=context),
            quantization=QuantizationSection(method),
            batch=BatchSection(sequences * context, sequences),
            steps=1,
            precision="fp32",
            device="cpu",
        )
    )


def real(run: DryRun) -> tuple[int, float]:
    """Bytes above the weights, and processor seconds, of a step without its update."""
    warnings.simplefilter("ignore")
    model = make_model(run.config)
    tokens = torch.randint(50304, run.first_batch)
    model(tokens[:1, :8])  # sets the scales
    before, begun = peak_memory() or 0, time.process_time()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    return (peak_memory() or 0) - before, time.process_time() - begun


def main() -> None:
    """Print both, side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="95M")
    parser.add_argument("--method", default="bbq_paper")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    run = foreseen(asked.preset, asked.method, asked.sequences, asked.context)
    rate = product_rate(torch.device("cpu"), torch.float32, clock=time.process_time)
    memory, seconds = real(run)
    ahead = run.memory.activations + run.memory.gradients
    print(
        f"{asked.preset}, {asked.method}, {run.first_batch} tokens; {cpu_name()}, one thread, {rate / 1e9:.0f} G/s"
    )
    print(f"memory above the weights  {ahead / GIB:.2f} GiB foreseen, {memory / GIB:.2f} GiB taken")
    print(f"products                  {run.operations / rate:.1f} s foreseen, the step takes {seconds:.1f} s")


if __name__ == "__main__":
    main()
