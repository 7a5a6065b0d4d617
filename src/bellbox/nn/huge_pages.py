"""Packed weights of a model in one piece of memory on huge pages.

Reading it at a stretch is faster: no page walks, and the processor's own fetching does not stop at every 4 KB; many
small matrices fill a huge page together. Only a wish: where the system has none, the memory serves as it is.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor, nn

from bellbox.nn.packed import PackedLayer

_HUGE_PAGE = 1 << 21
_ALIGNMENT = 64
_MADV_HUGEPAGE, _MADV_PAGEOUT = 14, 21


def _advise(tensor: Tensor, advice: int, page: int) -> None:
    if sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def gather_in_huge_pages(model: nn.Module) -> None:
    """Move the packed weights of a model on the CPU into one piece of memory; their values stay."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer) and layer.packed.is_cpu]
    sizes = [-(-layer.packed.numel() // _ALIGNMENT) * _ALIGNMENT for layer in layers]
    if sum(sizes) < _HUGE_PAGE // 8:
        return
    piece = torch.empty(sum(sizes) + 2 * _HUGE_PAGE, dtype=torch.uint8)
    first = -piece.data_ptr() % _HUGE_PAGE  # the first matrix begins a huge page
    piece = piece[first : first + sum(sizes)]
    _advise(piece, _MADV_HUGEPAGE, mmap.PAGESIZE)
    at = 0
    for layer, size in zip(layers, sizes, strict=True):
        part = piece[at : at + layer.packed.numel()]
        part.copy_(layer.packed)
        layer.packed = part
        at += size


def may_leave_memory(tensor: Tensor) -> None:
    """Tell the system that the pages of a mapped file may go. Never loses data: they are read again when needed."""
    _advise(tensor, _MADV_PAGEOUT, mmap.PAGESIZE)


def own_copy(mapped: Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor in memory of its own: what is written into a mapped file afterwards does not reach it.

    Args:
        mapped: a tensor whose memory is a file's; its pages may leave memory.
        device: of the copy; the same one where None.
        dtype: likewise.
    """
    copied = mapped.to(device or mapped.device, dtype or mapped.dtype, copy=True)
    if mapped.is_cpu:
        may_leave_memory(mapped)
    return copied
