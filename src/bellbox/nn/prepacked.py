"""A packed layer's numbers as the compiled kernels want them, and their results for siblings.

A decode step calls some forty layers for one row each, a few microseconds of work every time; what is looked up here
per call is what such a step can afford.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bellbox.core.packing import unpack_slabs
from bellbox.errors import BellboxError
from bellbox.ops import native

if TYPE_CHECKING:
    from bellbox.nn.packed_linear import PackedLinear

_DTYPES = {"weight_packed": torch.uint8, "act_signs": torch.int8}
"""Of buffers; of all others fp32."""
_PAGE_OUT = 21
"""MADV_PAGEOUT of Linux."""


class Prepacked:
    """What the compiled kernels need of a packed layer, made once from its buffers.

    Args:
        layer: a packed layer.
        arena: where the weights go; memory of their own where None.

    Raises:
        BellboxError: a buffer that is not on the CPU, or of another dtype than the layer made it with.
    """

    def __init__(self, layer: PackedLinear, arena: native.Arena | None = None) -> None:
        _check(layer._buffers)
        self.holds = native.snapshot(layer._buffers)
        """Whether a layer's buffers are those that this was made from, unchanged."""
        scale = layer.weight_scale / layer.weight_levels.multiplier
        slabs = unpack_slabs(layer.weight_packed, layer.in_features, layer.weight_levels.n)
        self.weights = native.Weights(slabs, layer.in_features, layer.weight_levels, scale, layer.bias, arena)
        self.act_scale = float(layer.act_scale / layer.coding.levels.multiplier)
        """What one integer of the input is worth."""
        self.coding = native.Coding(*layer.coding_arguments())
        self.signs = layer.act_signs
        """Of the input; kept here since a module looks for a buffer as long as a small kernel runs."""
        self.alone = native.Siblings(self.coding, [self.weights], [self.act_scale])
        """The layer by itself, ready to be called."""


def _check(buffers: dict[str, Tensor | None]) -> None:
    """The kernels read memory, and take its type on trust."""
    for name, buffer in buffers.items():
        wanted = _DTYPES.get(name, torch.float32)
        if buffer is not None and not (buffer.is_cpu and buffer.dtype == wanted):
            raise BellboxError(
                f"{name} of a packed layer is {buffer.dtype} on {buffer.device}; an input on the CPU needs {wanted} "
                "there: move model and input to one device, and load numbers in the dtypes that they were saved in"
            )


def prepack_all(model: nn.Module) -> None:
    """Pack the layers of a model for this machine now, not at their first use, where the compiled kernels serve them.

    The weights of all go into one piece of memory: many small matrices then fill huge pages.

    The canonical bytes are then needed only to save the model again: if they lie in a mapped file, the operating
    system is told that their pages may go.
    """
    from bellbox.nn.packed_linear import PackedLinear

    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    layers = [layer for layer in layers if layer.weight_packed.is_cpu and layer.compiled]
    if not layers:
        return
    shapes = ((layer.weight_levels, layer.out_features, layer.in_features) for layer in layers)
    arena = native.Arena(sum(native.packed_size(*shape) for shape in shapes))
    for layer in layers:
        layer.prepack(arena)
        _page_out(layer.weight_packed)


def _page_out(tensor: Tensor) -> None:
    """Never loses data: pages of a file are read again, others stay (without swap) or are swapped."""
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGE_OUT)


class SiblingOutputs:
    """Results that one call made for all siblings and that those still have to ask for."""

    def __init__(self) -> None:
        self._memory: tuple[Tensor, int, torch.dtype, dict[int, tuple[Prepacked, Tensor]]] | None = None
        self._together: tuple[list[Prepacked], native.Siblings] | None = None

    def together(self, group: list[Prepacked]) -> native.Siblings:
        """All of these in one call, made anew only if one of them is another than before."""
        known = self._together
        if known is None or known[0] != group:
            weights, scales = [each.weights for each in group], [each.act_scale for each in group]
            known = self._together = group, native.Siblings(group[0].coding, weights, scales)
        return known[1]

    def take(self, layer: PackedLinear, ready: Prepacked, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The result of this layer for this very input, once; None where there is none or something has changed."""
        memory = self._memory  # read once: another thread may replace it
        if memory is None or memory[0] is not x or memory[1] != x._version or memory[2] != dtype:
            return None
        waiting = memory[3]
        made_by, out = waiting.pop(id(layer), (None, None))
        if not waiting:
            self._memory = None
        return out if made_by is ready else None

    def put(self, x: Tensor, dtype: torch.dtype, outputs: dict[int, tuple[Prepacked, Tensor]]) -> None:
        """Keep results, by the layer's `id`, until they are taken."""
        self._memory = (x, x._version, dtype, outputs)
