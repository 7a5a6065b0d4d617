"""One model in several processes: DDP or FSDP2 of torch around it, and what each must be told.

Everything that is quantized needs whole weights. Within the forward and backward of a block FSDP2 holds them whole, so
layers and quantizers see what one process would see. Outside of it (`whole_weights`, `bellbox.core.sharded`) they are
asked for.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bellbox.core.sharded import local, whole
from bellbox.errors import BellboxError
from bellbox.runs.config import DistributedSection
from bellbox.training.distributed.world import World


class Parallel:
    """A model as all processes train it.

    Args:
        model: prepared, the same in all processes, on the process' device. With fsdp its parameters become shards.
        world: the processes.
        section: how they share it.

    Attributes:
        model: the model itself: for its names, its state and evaluation.
        forward: what a training step calls.

    Raises:
        BellboxError: groups of processes that do not divide all of them.
    """

    def __init__(self, model: nn.Module, world: World, section: DistributedSection) -> None:
        self.model, self.world = model, world
        self.forward = model
        if section.checkpoint_activations:
            for block in blocks_of(model):
                _run_again_in_backward(block)
        if world.mode == "ddp":
            self.forward = _ddp(model, world)
        elif world.mode == "fsdp":
            shard_model(model, world, section)

    @property
    def sharded(self) -> bool:
        """Whether a process holds parts of the weights only."""
        return self.world.mode == "fsdp"

    @contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        """Around the forward and backward of one of several micro-batches.

        Args:
            more: whether others follow: gradients are then added up here, and sent with the last one.
        """
        if self.world.mode == "ddp" and more:
            with self.forward.no_sync():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                yield
            return
        if self.sharded:
            root: Any = self.model
            root.set_requires_gradient_sync(not more)
        yield

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within it, every process has all weights whole, to read: to evaluate, to save, to look at codes."""
        modules = fsdp_modules(self.model) if self.sharded else []
        for module in modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module._bellbox_reshard, recurse=False)

    def clip_gradients(self, limit: float) -> float:
        """Scale the gradients to a global norm of at most `limit`; gives the norm that they had."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return float(whole(norm))

    @torch.no_grad()
    def agree_on_statistics(self) -> None:
        """Give all processes the mean of the running statistics of batch norms, which each takes of its own share."""
        if self.world.size == 1:
            return
        buffers = [
            buffer
            for module in self.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        if not buffers:
            return
        mean = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.all_reduce(mean)
        mean /= self.world.size
        for buffer, values in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))


def shard_model(model: nn.Module, world: World, section: DistributedSection) -> nn.Module:
    """FSDP2 (`fully_shard`): a group of parameters for each block, and one for what is left.

    Raises:
        BellboxError: groups of processes that do not divide all of them.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    reduce = torch.bfloat16 if section.reduce == "bf16" else torch.float32
    # Weights travel in fp32: a code follows from the fp32 weight. Autocast decides what products are computed in.
    shared: dict[str, Any] = {
        "mesh": _mesh(world, section.shard),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce),
    }
    for block in blocks_of(model):
        fully_shard(block, reshard_after_forward=section.reshard, **shared)
        block._bellbox_reshard = section.reshard  # pyright: ignore[reportArgumentType]
    # The weights outside of blocks are used last in the forward and first in the backward.
    fully_shard(model, reshard_after_forward=False, **shared)
    model._bellbox_reshard = False  # pyright: ignore[reportArgumentType]
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: members of its outermost lists of modules."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential):
                found.extend(each for each in child if any(True for _ in each.parameters()))
            else:
                look(child)

    look(model)
    return found


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Modules whose parameters are a group of FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def bytes_held(tensors: Iterator[Tensor]) -> int:
    """Bytes of tensors in the memory of this process: of sharded ones its own parts."""
    total = 0
    for tensor in tensors:
        total += local(tensor).numel() * tensor.element_size()
    return total


def _ddp(model: nn.Module, world: World) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    on_gpu = world.device.type == "cuda"
    # Buffers are equal by construction, or agreed upon after the step (`agree_on_statistics`).
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    off: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if on_gpu else None,
        gradient_as_bucket_view=True,
        **off,
    )


def _mesh(world: World, shard: str | int) -> Any:
    """All processes in a line, or groups that each hold one copy of the weights: `[groups, processes of a group]`."""
    from torch.distributed.device_mesh import init_device_mesh

    members = world.size
    if shard == "node":
        members = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    elif isinstance(shard, int):
        members = shard
    if members > world.size or world.size % members:
        raise BellboxError(
            f"distributed.shard is {shard}: groups of {members} processes do not divide {world.size}; choose a "
            "divisor, or all"
        )
    kind = world.device.type
    if members == world.size:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(kind, (world.size // members, members), mesh_dim_names=names)


def _run_again_in_backward(block: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
