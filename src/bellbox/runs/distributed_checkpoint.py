"""Tensors of many ranks to the shards of a checkpoint and back, over `torch.distributed.checkpoint` (DCP).

DCP decides who writes which piece, what a replicated tensor is written by, and which pieces of which files a rank needs
under another number of ranks. Its own storage describes a checkpoint in a pickle, and `--resume` reads files that may
come from anywhere: so storage is ours (`bellbox.runs.shards`), and DCP sees tensors only, for which it pickles nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from bellbox.errors import BellboxError
from bellbox.runs.shards import (
    Chunk,
    Layout,
    ShardFile,
    StoredTensor,
    key_of,
    shard_name,
    write_shard,
)
from bellbox.utils.files import one_line


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a tensor, copied to the CPU."""

    local: Tensor
    """Contiguous; the piece itself."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    """Where the piece begins in it."""


class Staging:
    """Copies of tensors, which stay as they are while training changes the tensors. Their memory is used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        """The pieces that this rank holds.

        Args:
            tensors: plain ones, alike on all ranks, or DTensors; on any device.
        """
        self._buffers = {name: kept for name, kept in self._buffers.items() if name in tensors}
        found = {name: self._piece(name, tensor) for name, tensor in tensors.items()}
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return found

    def _piece(self, name: str, tensor: Tensor) -> Piece:
        local, offsets = tensor, (0,) * tensor.dim()
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            _, offsets = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
        kept = self._buffers.get(name)
        if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
            kept = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            self._buffers[name] = kept
        kept.copy_(local.detach(), non_blocking=True)
        return Piece(kept, tuple(tensor.shape), tuple(offsets))


class _SavePlanner(DefaultSavePlanner):
    """Plans pieces, so that no thread has to touch a DTensor while training does."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        # A rank that holds nothing of a small tensor has nothing to say of it.
        held = [(n, p) for n, p in self.state_dict.items() if p.local.numel() or 0 in p.shape]
        self.plan = SavePlan([_write_item(name, piece) for name, piece in held])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


def _write_item(name: str, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offsets), piece.local.shape)
    properties = TensorProperties(dtype=piece.local.dtype)
    data = TensorWriteData(chunk, properties, torch.Size(piece.shape))
    return WriteItem(MetadataIndex(name, piece.offsets), WriteItemType.SHARD, tensor_data=data)


class _Writer(StorageWriter):
    """One file a rank; the coordinator begins the checkpoint, and ends it when all files are on the disk."""

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, str],
        begin: Callable[[], object],
        commit: Callable[[dict[str, Any], Layout], object],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.folder, self.about, self.begin, self.commit = folder, about, begin, commit
        together = dist.is_initialized()
        self.rank = dist.get_rank(group) if together else 0
        self.ranks = dist.get_world_size(group) if together else 1

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        if is_coordinator:  # the others write when they have its plan, and so after this
            self.begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = shard_name(self.rank, self.ranks)
        items = [(item.index, planner.resolve_data(item)) for item in plan.items]
        pieces = [
            (key_of(index.fqn, index.offset or ()), tensor)
            for index, tensor in items
            if isinstance(tensor, Tensor)
        ]
        stated = write_shard(self.folder / name, pieces, self.about)
        # The file as well as each piece: a rank may have nothing to write but its random state.
        results = [WriteResult(MetadataIndex(name), stated["bytes"], stated)]
        results += [WriteResult(index, 0, name) for index, _ in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {each.index: each.storage_data for part in results for each in part}
        files = {index.fqn: stated for index, stated in written.items() if index.offset is None}
        layout = {
            name: StoredTensor(
                tensor.properties.dtype,
                tuple(tensor.size),
                tuple(
                    Chunk(
                        written[MetadataIndex(name, chunk.offsets)], tuple(chunk.offsets), tuple(chunk.sizes)
                    )
                    for chunk in tensor.chunks
                ),
            )
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        self.commit(files, layout)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        return True


class _Reader(StorageReader):
    """Reads what a plan asks for, file by file."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks],
            )
            for name, tensor in self.layout.items()
        }
        return Metadata(tensors, storage_data={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:  # noqa: ARG002
        self.chunks = {
            (name, chunk.offsets): chunk for name, tensor in self.layout.items() for chunk in tensor.chunks
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[Chunk, ReadItem]]] = {}
        for item in plan.items:
            index = item.storage_index
            chunk = self.chunks[index.fqn, tuple(index.offset or ())]
            by_file.setdefault(chunk.file, []).append((chunk, item))
        for file, wanted in by_file.items():
            with ShardFile(self.folder / file) as shard:
                for chunk, item in wanted:
                    name = item.storage_index.fqn
                    target = planner.resolve_tensor(item).detach()
                    shard.read_into(
                        key_of(name, chunk.offsets),
                        target,
                        self.layout[name].dtype,
                        chunk.sizes,
                        item.storage_offsets,
                    )
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        return True


def _alone() -> dict[str, Any]:
    """How DCP is told that there is one process; it would warn of that."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return {"no_dist": not dist.is_initialized()}


def save_pieces(
    folder: Path,
    pieces: Mapping[str, Piece],
    about: Mapping[str, str],
    begin: Callable[[], object],
    commit: Callable[[dict[str, Any], Layout], object],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Have every rank write its share of the pieces. Called by all ranks of the group, at any time of their own.

    Args:
        folder: that the shards are written into.
        pieces: of this rank, by name.
        about: texts for the header of this rank's file.
        begin: called on the first rank before any other writes; makes the folder.
        commit: called there when all files are on the disk, with `bytes` and `sha256` of each, and their layout.
        group: used by nobody else meanwhile; the default one where None.

    Raises:
        OSError: a rank could not write; in all ranks.
    """
    writer = _Writer(folder, about, begin, commit, group)
    try:
        save(dict(pieces), storage_writer=writer, planner=_SavePlanner(), process_group=group, **_alone())
    except CheckpointException as error:
        raise _cause(error) from None


def load_pieces(
    folder: Path, layout: Layout, targets: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Read tensors in place, each rank what it holds. Called by all ranks, with the same names.

    Args:
        folder: of the shards.
        layout: of what lies there.
        targets: plain tensors or DTensors, of any sharding, on any device; types and shapes those of the layout.
        group: whose ranks come together; the default one where None.

    Raises:
        BellboxError: a file is missing or damaged, or a tensor of another type or shape.
    """
    for name, target in targets.items():
        stored = layout.get(name)
        if stored is None or stored.dtype != target.dtype or stored.shape != tuple(target.shape):
            there = "missing" if stored is None else f"{stored.dtype} {stored.shape}"
            raise BellboxError(
                f"{folder}: tensor '{name}' is {there}, and {target.dtype} {tuple(target.shape)} is wanted"
            )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        load(
            dict(targets),
            storage_reader=_Reader(folder, layout),
            planner=planner,
            process_group=group,
            **_alone(),
        )
    except CheckpointException as error:
        raise _cause(error) from None


def _cause(error: CheckpointException) -> Exception:
    """What went wrong in the first of the ranks in which something did."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, BellboxError | OSError):
        return cause
    return RuntimeError(f"rank {rank}: {type(cause).__name__}: {one_line(cause)}")
