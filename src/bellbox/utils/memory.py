"""Memory that this process has taken from the machine."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import TracebackType

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def peak_memory() -> int | None:
    """Most bytes of memory that the process has held at once, pages of mapped files included; None where unknown."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_in_words(before: str) -> str:
    """`before` and the peak, for people; nothing where it is unknown."""
    peak = peak_memory()
    return "" if peak is None else f"{before}peak memory {peak / 2**20:,.0f} MiB, Python and torch included"


class Saved:
    """A context: counts what the forwards inside keep for their backward, on any device, the meta device too.

    Args:
        own: tensors that are there anyway: parameters, buffers, the input.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {_storage(tensor) for tensor in own}
        self._bytes: dict[int, int] = {}
        self._held: list[Tensor] = []  # so that no address is given out twice
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._own:
            self._bytes[_storage(tensor)] = tensor.untyped_storage().nbytes()
            self._held.append(tensor)
        return tensor

    @property
    def nbytes(self) -> int:
        """So far, each piece of memory once."""
        return sum(self._bytes.values())

    def __enter__(self) -> Saved:
        """Count from now on."""
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count no longer, and let go of the tensors."""
        self._hooks.__exit__(kind, error, trace)  # pyright: ignore[reportArgumentType]
        self._held.clear()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
