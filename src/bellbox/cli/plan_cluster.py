"""Foresee a run on many GPUs: memory, communication, time, failures; and write what launches it.

bellbox plan cluster --preset 95M 1B 7B --gpus 8 64 1024
bellbox plan cluster --preset 7B --gpus 256 --gpu h100 --tokens 20e9 --scheme hybrid
bellbox plan cluster --preset 1B --gpus 64 --config runs/1b.yaml --slurm 1b.sbatch
bellbox plan cluster --preset 1B --gpus 64 --config 1b.yaml --kubernetes 1b.yaml --image ghcr.io/me/bellbox:1
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bellbox.cli.output import parse_flags, write_file
from bellbox.errors import BellboxError
from bellbox.scaling import failures
from bellbox.scaling.cost import EFFICIENCY, Network, Scheme, shape_of, step_of
from bellbox.scaling.hardware import GPUS, GPUS_A_NODE, Cluster
from bellbox.scaling.launch import Launch, kubernetes, slurm

_SAVED = 12
"""Bytes a parameter that a checkpoint holds: weight and two moments."""


@dataclass(frozen=True)
class PlanCluster:
    """Memory, communication, time and failures of runs on many GPUs, by a model: nothing is measured."""

    preset: tuple[str, ...] = ("95M", "300M", "1B", "3B", "7B")
    """Sizes: presets of LLaMA's shape, and 1B, 3B, 7B."""
    gpus: tuple[int, ...] = (8, 64, 256, 1024)
    """Numbers of GPUs."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """Which, with the numbers of its data sheet."""
    gpus_a_node: int = GPUS_A_NODE
    """GPUs of one node."""
    scheme: Literal["ddp", "fsdp", "hybrid"] = "fsdp"
    """Whole copies (ddp), shares over all GPUs (fsdp), or over those of a node (hybrid)."""
    tokens: float = 20e9
    """Tokens of the training."""
    batch_tokens: int | None = None
    """Tokens of a step; where not given 2,097,152, or one sequence a GPU where that is more."""
    context: int = 2048
    """Tokens of a sequence."""
    efficiency: float = EFFICIENCY
    """Share of the data sheet's rate that products reach."""
    gpu_hours_between_failures: float = failures.HOURS_A_GPU
    """Mean hours between failures of one GPU with its share of all else."""
    checkpoint_seconds: float | None = None
    """Seconds that a checkpoint holds up the training; where not given, 12 bytes a parameter at 2 GB/s a node."""
    restart_seconds: float = 300.0
    """Seconds from a failure to training again."""
    slurm: Path | None = None
    """Write a batch script for Slurm here; of one size and one number of GPUs."""
    kubernetes: Path | None = None
    """Write a Job and its Service for Kubernetes here; likewise."""
    config: str = "run.yaml"
    """Configuration that the launched run takes."""
    name: str = "bellbox"
    """Name of the job."""
    hours: int = 24
    """Hours that a job may take."""
    image: str | None = None
    """Container image, for Kubernetes."""
    volume: str = "bellbox"
    """Claim of the volume with data, configuration and runs, for Kubernetes."""
    json: Path | None = None
    """Write the numbers to this file too."""


def main(argv: list[str]) -> None:
    """Run `bellbox plan cluster` with the arguments after that.

    Raises:
        BellboxError: a size or number that cannot be.
    """
    plan = parse_flags(PlanCluster, argv, "bellbox plan cluster", __doc__)
    for name, value in (
        ("tokens", plan.tokens),
        ("efficiency", plan.efficiency),
        ("gpu-hours-between-failures", plan.gpu_hours_between_failures),
        ("restart-seconds", plan.restart_seconds),
    ):
        if not 0 < value < math.inf:
            raise BellboxError(f"--{name} is {value:g}, must be above 0 and finite")
    if plan.efficiency > 1:
        raise BellboxError(f"--efficiency is {plan.efficiency:g}, must be at most 1")
    if not plan.preset or not plan.gpus:
        raise BellboxError("name at least one size with --preset and one number with --gpus")
    rows = [_row(plan, name, count) for name in plan.preset for count in plan.gpus]
    files = _files(plan)
    print("\n".join(_table(plan, rows)))
    if plan.json is not None:
        files.append((plan.json, json.dumps(rows, indent=1) + "\n"))
    for path, text in files:
        write_file(path, text)
        print(f"written to {path}")


def _files(plan: PlanCluster) -> list[tuple[Path, str]]:
    if plan.slurm is None and plan.kubernetes is None:
        return []
    if len(plan.gpus) != 1:
        raise BellboxError("a job has one number of GPUs; name it: --gpus 64")
    cluster = Cluster(GPUS[plan.gpu], plan.gpus[0], plan.gpus_a_node)
    launch = Launch(cluster, plan.config, plan.name, plan.hours, plan.image, plan.volume)
    files: list[tuple[Path, str]] = []
    if plan.slurm is not None:
        files.append((plan.slurm, slurm(launch)))
    if plan.kubernetes is not None:
        files.append((plan.kubernetes, kubernetes(launch)))
    return files


def _row(plan: PlanCluster, name: str, count: int) -> dict[str, Any]:
    network, cluster = Network(shape_of(name)), Cluster(GPUS[plan.gpu], count, plan.gpus_a_node)
    least = plan.context * count
    batch = plan.batch_tokens or max(least, (1 << 21) // least * least)
    scheme: Scheme = plan.scheme
    step = step_of(
        network, cluster, batch_tokens=batch, context=plan.context, scheme=scheme, efficiency=plan.efficiency
    )
    row: dict[str, Any] = {
        "preset": name,
        "parameters": network.parameters,
        "gpus": count,
        "batch_tokens": batch,
        "fits": step is not None,
    }
    if step is None:
        return row
    seconds = plan.tokens / batch * step.seconds
    cost = plan.checkpoint_seconds or max(1.0, _SAVED * network.parameters / (2e9 * cluster.nodes))
    between = plan.gpu_hours_between_failures * 3600 / count
    interval = failures.daly(cost, between)
    lost = failures.expected(seconds, interval, cost, plan.restart_seconds, between) / seconds - 1
    return row | {
        "micro_sequences": step.micro_sequences,
        "passes": step.passes,
        "checkpointed": step.checkpointed,
        "memory_bytes": step.memory,
        "step_seconds": step.seconds,
        "shares": {
            "products": step.products / step.seconds,
            "quantizers": step.quantizers / step.seconds,
            "optimizer": step.optimizer / step.seconds,
            "communication": step.exposed / step.seconds,
        },
        "communication_seconds": step.communication,
        "tokens_a_second": batch / step.seconds,
        "training_seconds": seconds,
        "seconds_between_failures": between,
        "checkpoint_seconds": cost,
        "checkpoint_interval_seconds": interval,
        "lost_share": lost,
    }


def _table(plan: PlanCluster, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{plan.gpu}, {plan.scheme}, {plan.tokens:.3g} tokens, context {plan.context:,}: by a model with the "
        "data sheet's rates, not measured (docs/scaling.md)",
        f"{'size':>5} {'GPUs':>5} {'a pass':>6} {'GiB a GPU':>9} {'step':>9} {'quant.':>6} {'comm.':>6} "
        f"{'tokens/s':>11} {'training':>10} {'fails':>9} {'save each':>9} {'lost':>6}",
    ]
    for row in rows:
        head = f"{row['preset']:>5} {row['gpus']:>5}"
        if not row["fits"]:
            lines.append(f"{head} does not fit with one sequence a pass")
            continue
        passes = f"{row['micro_sequences']}{'*' if row['checkpointed'] else ''}"
        lines.append(
            f"{head} {passes:>6} {row['memory_bytes'] / 2**30:>9.1f} {row['step_seconds']:>8.2f}s "
            f"{row['shares']['quantizers']:>6.0%} {row['shares']['communication']:>6.0%} "
            f"{row['tokens_a_second']:>11,.0f} {_duration(row['training_seconds']):>10} "
            f"{_duration(row['seconds_between_failures']):>9} {_duration(row['checkpoint_interval_seconds']):>9} "
            f"{row['lost_share']:>6.1%}"
        )
    if any(row.get("checkpointed") for row in rows):
        lines.append("* sequences a pass; with a star, activations are computed again to make room")
    return lines


def _duration(seconds: float) -> str:
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.1f} {unit}"
    return f"{seconds:.0f} s"
