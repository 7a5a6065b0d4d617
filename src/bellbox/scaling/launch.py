"""Files that launch a run on a cluster: a batch script for Slurm, a job and its service for Kubernetes.

Both start `torchrun` once a node, which starts `bellbox train` once a GPU. They pass on the signal with which a
scheduler ends a job, so that the run saves first; begun anew, it goes on from its last checkpoint.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from bellbox.errors import BellboxError, require
from bellbox.scaling.hardware import Cluster

_PORT = 29500
_GRACE = 120
"""Seconds between the signal and the end."""
_RESTARTS = 3
"""Of all processes of the job after one of them has failed, before the scheduler is asked."""


@dataclass(frozen=True)
class Launch:
    """A run to launch.

    Raises:
        BellboxError: a name that a scheduler would refuse, or more hours than a job can have.
    """

    cluster: Cluster
    config: str
    """Of the run, where the nodes see it."""
    name: str = "bellbox"
    hours: int = 24
    image: str | None = None
    """Container image, for Kubernetes."""
    volume: str = "bellbox"
    """Claim of the volume that all pods mount at /workspace, for Kubernetes: data, configuration, run folder."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?", self.name):
            raise BellboxError(
                f"job name {self.name!r}: takes a small letter, then up to 51 small letters, digits and dashes"
            )
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,200}[a-z0-9])?", self.volume):
            raise BellboxError(f"volume {self.volume!r}: is no name of a claim in Kubernetes")
        if not 1 <= self.hours <= 8760:
            raise BellboxError(f"{self.hours} hours: must be from 1 to 8,760")
        for what, value in (("configuration", self.config), ("image", self.image or "-")):
            if not value or not value.isprintable():
                raise BellboxError(f"{what} {value!r}: must be one line of text")

    @property
    def a_node(self) -> int:
        """GPUs and processes of a node."""
        return min(self.cluster.gpus, self.cluster.a_node)

    def _torchrun(self, *rendezvous: str) -> list[str]:
        return [
            "torchrun",
            f"--nnodes={self.cluster.nodes}",
            f"--nproc-per-node={self.a_node}",
            f"--max-restarts={_RESTARTS}",
            *rendezvous,
            "--no-python",
            "bellbox",
            "train",
            "--config",
            self.config,
        ]


def slurm(launch: Launch) -> str:
    """A script for `sbatch`."""
    words = launch._torchrun("--rdzv-backend=c10d")
    at = words.index("--no-python")
    command = " \\\n  ".join(
        [
            *map(shlex.quote, words[:at]),
            f'--rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:{_PORT}"',
            " ".join(map(shlex.quote, words[at:])),
        ]
    )
    return f"""#!/bin/bash
#SBATCH --job-name={launch.name}
#SBATCH --nodes={launch.cluster.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={launch.a_node}
#SBATCH --exclusive
#SBATCH --time={launch.hours}:00:00
#SBATCH --output={launch.name}-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# {_GRACE} seconds before the time is up the processes are told, so that the run saves.
#SBATCH --signal=TERM@{_GRACE}
set -euo pipefail
# Not through `head`: what it leaves unread would end this script (pipefail).
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${{hosts%%$'\\n'*}}
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-8}}"
# A process that fails ends the others, and torchrun begins all of them anew from the last checkpoint.
srun --kill-on-bad-exit=1 {command}
"""


def kubernetes(launch: Launch) -> str:
    """A Service that gives pods names, and an Indexed Job with one pod a node; for `kubectl apply -f`.

    Raises:
        BellboxError: no image was named.
    """
    if launch.image is None:
        raise BellboxError("a Kubernetes job runs an image; name it with --image")
    yaml = require("yaml", "cli")
    first = f"{launch.name}-0.{launch.name}"
    words = launch._torchrun(
        "--rdzv-backend=c10d", f"--rdzv-id={launch.name}", f"--rdzv-endpoint={first}:{_PORT}"
    )
    labels = {"app": launch.name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": launch.name, "labels": labels},
        # No address of its own; and names before the pods are ready, since they wait for each other.
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels,
            "ports": [{"name": "rendezvous", "port": _PORT}],
        },
    }
    container = {
        "name": "train",
        "image": launch.image,
        "command": words,
        "workingDir": "/workspace",
        "ports": [{"containerPort": _PORT}],
        "resources": {"limits": {"nvidia.com/gpu": launch.a_node}},
        "volumeMounts": [
            {"name": "workspace", "mountPath": "/workspace"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "subdomain": launch.name,
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": _GRACE,
        "containers": [container],
        "volumes": [
            {"name": "workspace", "persistentVolumeClaim": {"claimName": launch.volume}},
            # NCCL speaks through shared memory within a node; a container's usual 64 MiB are too few.
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": launch.name, "labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "completions": launch.cluster.nodes,
            "parallelism": launch.cluster.nodes,
            "backoffLimit": 100,
            "activeDeadlineSeconds": launch.hours * 3600,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    return yaml.safe_dump_all([service, job], sort_keys=False)
