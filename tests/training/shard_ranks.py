"""Four processes that save and load one checkpoint in groups of three, one, two and four.

python shard_ranks.py FOLDER      prints, as JSON, what came of it
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bellbox.runs.checkpoint import Checkpoints, State
from bellbox.runs.distributed_checkpoint import Staging, load_pieces, save_pieces

PROCESSES = 4
ROWS = {"ten": 10, "five": 5, "one": 1}


def whole(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sharded = {name: torch.randn(rows, 7, generator=draw) for name, rows in ROWS.items()}
    plain = {name: torch.randn(50, 40, generator=draw) for name in ("alike", "also", "third")}
    return {**sharded, **plain, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def as_held(tensors: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    return {
        name: distribute_tensor(value.clone(), mesh, [Shard(0)]) if name in ROWS else value.clone()
        for name, value in tensors.items()
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / ".store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    groups: dict[int, Any] = {size: dist.new_group(list(range(size))) for size in (1, 2, 3, 4)}
    checkpoints, told = Checkpoints(folder / "checkpoints"), {}

    def save(step: int, size: int) -> None:
        mesh = DeviceMesh.from_group(groups[size], "cpu", mesh=list(range(size)))
        save_pieces(
            checkpoints.saving(step),
            Staging().copy(as_held(whole(step), mesh)),
            {"random": json.dumps({"rank": rank})},
            begin=lambda: checkpoints.begin(step),
            commit=lambda files, layout: checkpoints.commit_shards(State(step, 0, 0.0), files, layout, {}),
            group=groups[size],
        )

    if rank < 3:
        save(7, 3)
    dist.barrier()
    found = checkpoints.at(7)
    assert found.layout is not None
    for size in (1, 2, 4):
        if rank < size:
            mesh = DeviceMesh.from_group(groups[size], "cpu", mesh=list(range(size)))
            targets = as_held({n: torch.zeros_like(t) for n, t in whole(7).items()}, mesh)
            load_pieces(found.path, found.layout, targets, groups[size])
            for name, wanted in whole(7).items():
                got = targets[name]
                assert torch.equal(got.full_tensor() if isinstance(got, DTensor) else got, wanted), name
            told.setdefault("read by", []).append(size)
        dist.barrier()
    told["tensor bytes"] = sum(tensor.nbytes for tensor in whole(7).values())
    told["bytes"] = sum(path.stat().st_size for path in found.path.glob("shard-*"))
    told["overhead"] = 3 * 2048  # headers
    failed: list[str | None] = [None] * 3
    if rank < 3:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save(8, 3)
        except OSError as error:
            if rank == 0:
                checkpoints.forget(8)
            dist.all_gather_object(failed, error.strerror, group=groups[3])
    dist.barrier()
    told["failed"], told["left"] = failed, sorted(path.name for path in checkpoints.folder.iterdir())
    if rank == 0:
        print(json.dumps(told), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    children = []
    for number in range(PROCESSES):
        child = os.fork()
        if not child:
            try:
                main(number, Path(sys.argv[1]))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))
