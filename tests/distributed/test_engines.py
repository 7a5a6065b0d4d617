"""Prepared models in other people's engines: torchtitan, accelerate, Lightning Fabric."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Ranks

ROOT = Path(__file__).parents[2]


def absent(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) is None for module in modules)


def run_two(*command: str) -> str:
    """Standard output of two processes under torchrun."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        capture_output=True, text=True, timeout=550, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(line.split("loss")[1]) for line in output.splitlines() if line.startswith("step ")]


@pytest.mark.slow
@pytest.mark.skipif(absent("accelerate", "transformers"), reason="accelerate and transformers are needed")
def test_accelerate_shards_a_prepared_model() -> None:
    """Its launcher takes FSDP on GPUs alone, so here its state is told; what is then run is its own FSDP2."""
    found = losses(output := run_two(str(Path(__file__).parent / "accelerate_on_cpu.py"), "--steps", "4"))
    assert len(found) == 4
    assert found[-1] < found[0] - 0.3
    assert "packed: 14 layers" in output
    assert "sharded: True" in output


@pytest.mark.skipif(absent("lightning_fabric"), reason="lightning-fabric is needed")
def test_fabric_trains_a_prepared_model() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "fabric.py"), "--devices", "2", "--steps", "20"],
        capture_output=True, text=True, timeout=550, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("loss "))
    first, last = float(line.split()[1]), float(line.split()[5])
    assert last < 0.9 * first


@pytest.mark.skipif(
    absent("torchtitan", "spmd_types", "triton"), reason="torchtitan and what it imports are needed"
)
@pytest.mark.parametrize(("method", "options"), [("cewt", {}), ("bbq", {"zeta": 1.694})])
def test_torchtitan_builds_and_shards_a_prepared_model(
    ranks: Ranks, method: str, options: dict[str, float]
) -> None:
    """Its debug model, in two processes. Its attention trains on GPUs alone: torch's stands in for that one part."""
    for found in ranks.do(2, "titan", method=method, options=options):
        assert found["quantized"] == 30
        assert found["synchronised"] == 0.0
        assert found["losses"][-1] < found["losses"][0] - 1
        assert found["alike"]


@pytest.mark.skipif(
    absent("torchtitan", "spmd_types", "triton"), reason="torchtitan and what it imports are needed"
)
def test_torchtitan_is_refused_what_it_has_no_place_for(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="BellboxError bbq sets scales of inputs from a first batch"):
        ranks.do(1, "titan", method="bbq", options={})
    with pytest.raises(RuntimeError, match=r"BellboxError parallelism\.tensor_parallel_degree is 2"):
        ranks.do(1, "titan", method="cewt", options={}, tensor_parallel=2)
