"""What sibling layers make of their common input: computed once, never served stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bellbox.nn.prepacked import SiblingOutputs
from bellbox.ops.encode import result_dtype

if TYPE_CHECKING:
    from bellbox.nn.packed_linear import PackedLinear

_functorch: Any = torch._C._functorch  # pyright: ignore


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
    """What sibling layers make of their common input, computed once.

    Recognises the input by identity and version, and the quantizer's own numbers by their versions, so that nothing
    changed or different is ever served from memory. Each reader is served once: one that asks again (a second step on
    the same tensor) gets a fresh result, and the last one empties the memory. Where identity cannot be told
    (inside `torch.compile`, in inference mode), it computes each time; a compiler merges the repetition by itself.
    """

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        self.members: list[PackedLinear] = []
        """Packed siblings: one call of the native kernels serves them all."""
        self.outputs = SiblingOutputs()
        self._memory: tuple[Any, ...] | None = None

    def remembers(self, x: Tensor) -> bool:
        """Whether `once` can recognise `x` when the next sibling comes with it."""
        if self.readers == 1 or torch.compiler.is_compiling() or x.is_inference():
            return False
        return _functorch.peek_interpreter_stack() is None  # tensors of a transform do not outlive it

    def get_or_compute(
        self,
        reader: object,
        x: Tensor,
        purpose: tuple[Any, ...],
        state: Sequence[Tensor | None],
        compute: Callable[[Tensor], Any],
    ) -> Any:
        """`compute(x)`, or what it gave to a sibling just before.

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
        same = memory is not None and memory[0] is x and memory[1:3] == (key, versions)
        # Identity too: functional_call puts other tensors, of the same version, in a parameter's place.
        if memory is not None and same and all(a is b for a, b in zip(memory[5], state, strict=True)):
            _, _, _, result, served, _ = memory
            if id(reader) not in served:
                served = served | {id(reader)}
                full = len(served) == self.readers
                self._memory = None if full else (x, key, versions, result, served, tuple(state))
                return result
        result = compute(x)
        versions = [version_of(tensor) for tensor in (x, *state)]  # computing may have set a scale
        self._memory = (x, key, versions, result, frozenset({id(reader)}), tuple(state))
        return result

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without memory (it may hold tensors of a running graph)."""
        return {**self.__dict__, "_memory": None, "outputs": SiblingOutputs()}
