"""Input cache: results that layers share because they read one input, computed once, never served stale."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bellbox.ops.dispatch import Circumstances, is_direct, is_unwatched
from bellbox.ops.encode import result_dtype
from bellbox.ops.packed_linear import Bound, bind_group


def version_of(tensor: Tensor | None) -> int:
    """Counts changes in place; -1 where nobody counts them (tensors made in inference mode)."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` does to a tensor, but for a change of dtype: moves between devices are followed."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


class InputCache:
    """What the layers of a group make of their common input, computed once.

    Recognises the input by identity and version, and the quantizer's own numbers by their versions, so that nothing
    changed or different is ever served from memory. Each reader is served once: one that asks again (a second step on
    the same tensor) gets a fresh result, and the last one empties the memory. The input is referred to weakly: when it
    goes, so does what was made of it. Where identity cannot be told (inside `torch.compile` or a transform, in
    inference mode), it computes each time; a compiler merges the repetition by itself.
    """

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        self._memory: tuple[Any, ...] | None = None

    def remembers(self, x: Tensor) -> bool:
        """Whether `get_or_compute` can recognise `x` when the next reader comes with it."""
        return self.readers > 1 and is_unwatched(x) and not x.is_inference()

    def get_or_compute(
        self,
        reader: object,
        x: Tensor,
        purpose: tuple[Any, ...],
        state: Sequence[Tensor | None],
        compute: Callable[[Tensor], Any],
    ) -> Any:
        """`compute(x)`, or what it gave to another reader just before.

        Args:
            reader: who asks.
            x: the input.
            purpose: what is computed, beyond `x`.
            state: further tensors that the result depends on, or that computing it changes.
            compute: the work.
        """
        if not self.remembers(x):
            return compute(x)
        key = (purpose, x.requires_grad, torch.is_grad_enabled(), result_dtype(x))
        versions = [version_of(tensor) for tensor in (x, *state)]
        memory = self._memory  # read once: another thread may replace it
        same = memory is not None and memory[0]() is x and memory[1:3] == (key, versions)
        # Identity too: functional_call puts other tensors, of the same version, in a parameter's place.
        if memory is not None and same and all(a is b for a, b in zip(memory[5], state, strict=True)):
            reference, _, _, result, served, known = memory
            if id(reader) not in served:
                served = served | {id(reader)}
                full = len(served) == self.readers
                self._memory = None if full else (reference, key, versions, result, served, known)
                return result
        result = compute(x)
        versions = [version_of(tensor) for tensor in (x, *state)]  # computing may have set a scale
        reference = weakref.ref(x, self._forget)
        self._memory = (reference, key, versions, result, frozenset({id(reader)}), tuple(state))
        return result

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        memory = self._memory
        if memory is not None and memory[0] is reference:
            self._memory = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without memory (it may hold tensors of a running graph)."""
        return {**self.__dict__, "_memory": None}


_PATIENCE = 3
"""After so many results that nobody came for, a group is none: an interrupted forward is no proof."""


class PackedGroup:
    """Packed layers that are expected to read one input: one call then serves all of them.

    Who belongs together is a hint (names, a file); whether a layer comes with the very tensor of another is looked
    at in every call. A group whose layers do not all come for their results was no group, and dissolves.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        """Packed layers (`nn.packed.PackedLayer`) whose inputs are coded alike."""
        self._call: Callable[[Tensor, torch.dtype], list[Tensor] | None] | None = None
        self._bound: list[Bound] = []
        self._circumstances = Circumstances()
        self._waiting: tuple[Any, ...] | None = None
        self._missed = 0
        """How often somebody did not come for a result."""

    @property
    def active(self) -> bool:
        """Whether one call serves several layers."""
        return len(self.layers) > 1 and self._missed < _PATIENCE

    def output(self, layer: object, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The result for a layer, made together with the others'; None where the layer is to go on alone."""
        if not is_direct(x) or x.is_inference():
            return None
        waiting = self._waiting  # read once: another thread may replace it
        if waiting is not None:
            reference, version, wanted, results = waiting
            if reference() is x and version == x._version and wanted == dtype:
                made = results.pop(id(layer), None)
                if made is not None:
                    bound, state, out = made
                    if not results:
                        self._waiting = None
                    return out if state == _state(bound) else None
            elif results:  # somebody never came
                self._waiting, self._missed = None, self._missed + 1
        bound = [each.bound for each in self.layers]
        if self._bound != bound or not self._circumstances.hold():
            self._circumstances = Circumstances()
            self._call, self._bound = bind_group(bound), bound
        if self._call is None:
            return None
        outs = self._call(x, dtype)
        if outs is None:
            self._call = bind_group(bound)
            outs = None if self._call is None else self._call(x, dtype)
            if outs is None:
                return None
        results = {
            id(each): (one, _state(one), out) for each, one, out in zip(self.layers, bound, outs, strict=True)
        }
        _, _, mine = results.pop(id(layer))
        self._waiting = (weakref.ref(x, self._forget), x._version, dtype, results)
        return mine

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        waiting = self._waiting
        if waiting is not None and waiting[0] is reference:
            self._waiting = None
            self._missed += bool(waiting[3])

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own calls."""
        return {**self.__dict__, "_waiting": None, "_call": None, "_bound": []}


def _state(bound: Bound) -> list[tuple[int, int]]:
    """Identities and versions of a layer's buffers: one that was written to between two layers shows."""
    return [(id(each), version_of(each)) for each in bound.tensors()]
