"""The processes of a run: how they find each other, and what they tell each other besides gradients.

`torchrun` starts them and says in the environment who each is. What one of them decides for all (the folder, its
checkpoint, a signal) is told to the others as JSON, so that all go the same way; an error of the first is an error of
all. Only the first process writes and prints.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.runs.build import pick_device
from bellbox.runs.config import DistributedSection
from bellbox.utils.files import one_line

Mode = Literal["none", "ddp", "fsdp"]
T = TypeVar("T")
_LOST = (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError) if dist.is_available() else ()
_SIGNS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
"""In the text of errors that torch gives no class of their own."""
_GRACE = 5.0
"""Seconds in which an error of all processes reaches all of them."""
_LAUNCH = "torchrun --nproc-per-node 2 -m bellbox train ..."


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """How many there are."""
    mode: Mode = "none"
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    """Of this process."""
    owns_group: bool = False
    """Whether the process group was made here, and is to be taken down here."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them; it is called there alone.

        Args:
            make: gives a value of JSON, and may do what only one process shall do.

        Raises:
            BellboxError: `make` raised one, or an `OSError`; in the first process its own error goes on.
        """
        if self.size == 1:
            return make()
        value: Any = None
        error: Exception | None = None
        if self.first:
            try:
                value = make()
            except Exception as caught:
                error = caught
        told = self._broadcast({"error": None if error is None else str(error), "value": value})
        if error is not None:
            raise error
        if told["error"] is not None:
            same = BellboxError(told["error"])
            same.speaks = False  # the first one does
            raise same
        return told["value"]

    def from_each(self, value: T) -> list[T]:
        """A value of JSON of each process, by rank, in all of them."""
        if self.size == 1:
            return [value]
        mine = _bytes_of(value).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(mine)] = mine
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [_value_of(each[: int(size)]) for each, size in zip(found, sizes, strict=True)]

    def gather_rows(self, rows: Tensor | None) -> Tensor | None:
        """`[n, d]` of each process, below one another in the order of ranks, in all of them; n may differ.

        Args:
            rows: those of this process; None where it has none.
        """
        if self.size == 1:
            return rows
        shapes = self.from_each([0, 0] if rows is None else [*rows.shape])
        most, width = (max(shape[i] for shape in shapes) for i in (0, 1))
        padded = torch.zeros(most, width, device=self.device)
        if rows is not None:
            padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        whole = torch.cat([each[: shape[0]] for each, shape in zip(found, shapes, strict=True)])
        return whole if len(whole) else None

    def add_up(self, numbers: Tensor) -> Tensor:
        """The sum over all processes, in all of them."""
        if self.size == 1:
            return numbers
        total = numbers.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(numbers.device)

    def lost(self, error: RuntimeError) -> str | None:
        """What an error of an exchange says of the other processes; None where it is an error of another kind."""
        text = one_line(error)
        if self.size == 1 or not (isinstance(error, _LOST) or any(each in text for each in _SIGNS)):
            return None
        hangs = any(each in text.lower() for each in ("timed out", "timeout"))
        what = "does not answer within distributed.timeout" if hangs else "is gone"
        told = (
            text.rpartition("] ")[2] if text.startswith("[") else text
        )  # without the place in gloo's source
        return f"another of the {self.size} processes {what}, as rank {self.rank} sees it ({told[:60]})"

    def close(self) -> None:
        """Take down the process group, where it was made here."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def _broadcast(self, value: Any) -> Any:
        content = _bytes_of(value).to(self.device) if self.first else None
        size = torch.tensor([0 if content is None else len(content)], device=self.device)
        dist.broadcast(size, 0)
        if content is None:
            content = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, 0)
        return _value_of(content)


def start(section: DistributedSection, device: str) -> World:
    """Find the other processes.

    A process group that is there already is taken as it is, and left.

    Args:
        section: of the run's configuration.
        device: `device` of it.

    Raises:
        BellboxError: a mode that needs a launcher without one, or the other way round; no backend for the device; more
            processes on a machine than GPUs; processes that did not come.
    """
    there = dist.is_available() and dist.is_initialized()
    launched = there or launched_rank() is not None
    usual: Mode = "ddp" if launched else "none"
    mode = usual if section.mode == "auto" else section.mode
    if mode == "none":
        count = _environment("WORLD_SIZE") if not there else dist.get_world_size()
        if launched and (count or 1) > 1:
            raise BellboxError(
                f"distributed.mode is none, but {count} processes were started; start one, or take ddp or fsdp"
            )
        return World(device=pick_device(device))
    if not launched:
        raise BellboxError(
            f"distributed.mode is {mode}, but no launcher has started this process; start it with {_LAUNCH}, or leave "
            "distributed.mode out"
        )
    if there:
        return World(dist.get_rank(), dist.get_world_size(), mode, _own_device(pick_device(device)))
    own = _own_device(pick_device(device))
    backend = _backend(own)
    rank, size = launched_rank() or 0, _environment("WORLD_SIZE") or 1
    wait = timedelta(seconds=section.timeout)
    store = _meet(rank, size, wait)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise BellboxError(f"the {size} processes could not be joined by {backend}: {error}") from None
    return World(rank, size, mode, own, owns_group=True)


def launched_rank() -> int | None:
    """The number that a launcher gave this process; None where no launcher started it."""
    named = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return _environment("RANK") if named else None


def leave(message: str, speaks: bool | None) -> bool:
    """End this process' part in an error: whether it is to print it.

    Args:
        message: of the error.
        speaks: `BellboxError.speaks`; None: as `speaks_for_all` says.
    """
    try:
        return speaks_for_all(message) if speaks is None else speaks
    finally:
        if dist.is_available() and dist.is_initialized():
            with suppress(Exception):  # others may be gone
                dist.destroy_process_group()


def speaks_for_all(message: str, lost: bool = False) -> bool:
    """Whether this process is to print its error: the first one; another one where the first has no error itself.

    Args:
        message: of the error.
        lost: whether it says that another process is gone, which may be the first.
    """
    rank = launched_rank() or 0
    if not (dist.is_available() and dist.is_initialized()):
        # What is refused before the processes meet is refused in all of them.
        return rank == 0
    store = dist.distributed_c10d._get_default_store()
    # The store may live in a process that is stopped, and then no call of it returns.
    answer: list[bool] = []
    asking = threading.Thread(target=lambda: answer.append(_may_speak(store, message, lost)), daemon=True)
    asking.start()
    asking.join(2 * _GRACE)
    return answer[0] if answer else True


def _may_speak(store: Any, message: str, lost: bool) -> bool:
    key = "bellbox/error"
    try:
        if dist.get_rank() == 0:
            store.set(key, message)
            return True
        store.wait([key], timedelta(seconds=_GRACE))
    except dist.DistNetworkError:
        return lost  # the store was that of the first process, which has ended: else by an error of its own
    except RuntimeError:
        # The first is gone, or has no error: one of the others speaks.
        try:
            return store.add(f"{key}/spoken", 1) == 1
        except RuntimeError:
            return True
    return False


def _environment(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdigit():
        raise BellboxError(
            f"{name} is {value!r} in the environment, must be a number; start it with {_LAUNCH}"
        )
    return int(value)


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    place, count = _environment("LOCAL_RANK") or 0, torch.cuda.device_count()
    if place >= count:
        raise BellboxError(
            f"process {place} of this machine has no GPU of its own, there are {count}; start at most {count} of them "
            "here (--nproc-per-node)"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _backend(device: torch.device) -> str:
    backend = "nccl" if device.type == "cuda" else "gloo"
    found = dist.is_available() and (
        dist.is_nccl_available() if backend == "nccl" else dist.is_gloo_available()
    )
    if not found:
        way_out = "device: cpu, which needs gloo" if backend == "nccl" else "a build of torch that has it"
        raise BellboxError(
            f"torch here has no {backend}, which processes on {device.type} talk by; take {way_out}"
        )
    return backend


def _meet(rank: int, size: int, wait: timedelta) -> Any:
    """The store of all processes, when all have come.

    Raises:
        BellboxError: some have not, by their numbers.
    """
    address, port = os.environ["MASTER_ADDR"], _environment("MASTER_PORT") or 0
    if not rank < size:
        raise BellboxError(f"RANK is {rank} of {size} processes: ranks are 0 to {size - 1}")
    seconds = f"{wait.total_seconds():g} s"
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + wait.total_seconds()
    try:
        if rank or agent:
            _reach(address, port, deadline)
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, size, rank == 0 and not agent, wait, wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError, OSError):
        lost = BellboxError(
            f"rank {rank} of {size} found nobody at {address}:{port} within {seconds}: rank 0 is missing; start all "
            f"ranks, or fewer of them ({_LAUNCH})"
        )
        lost.speaks = True
        raise lost from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"bellbox/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
    store.set(f"here/{rank}", "")
    missing = list(range(size))
    while missing and time.monotonic() < deadline:
        missing = [each for each in missing if not store.check([f"here/{each}"])]
        if missing:
            time.sleep(0.05)
    if missing:
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        plural = "s" if len(missing) > 1 else ""
        raise BellboxError(
            f"rank{plural} {names} of {size} did not come within {seconds}; start all of them, or fewer ({_LAUNCH}); "
            "distributed.timeout is how long to wait"
        )
    return store


def _reach(address: str, port: int, deadline: float) -> None:
    """Wait until somebody listens; torch's own waiting fills the screen.

    Raises:
        OSError: nobody does.
    """
    while True:
        try:
            with socket.create_connection((address, port), timeout=1):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _bytes_of(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value_of(content: Tensor) -> Any:
    return json.loads(content.cpu().numpy().tobytes())
