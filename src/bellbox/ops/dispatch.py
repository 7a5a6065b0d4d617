"""Operations and the backends that run them: one registry, asked at each call.

An *operation* is a name with a schema, a plain torch reference and a fake implementation (shapes without numbers).
It takes tensors and small numbers only, so that an exported graph, a copy or another process holds all that it needs.
A *backend* answers, for a call, that it takes it or why not; it must give the same bits as the reference. The one of
highest priority that takes a call runs it, else the reference does. A new backend is a folder under `backends/` that
calls `register`; nothing else has to know of it.

`BELLBOX_BACKEND=name` (or `reference`) admits that backend alone, beside the reference for what it has no kernel for.
`BELLBOX_ISA=reference` means the same as `BELLBOX_BACKEND=reference`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bellbox.errors import BellboxError

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
# Looked up once: a packed layer asks all of them in every call.
_is_compiling = torch.compiler.is_compiling
_transform = torch._C._functorch.maybe_current_level  # pyright: ignore[reportAttributeAccessIssue]
_modes, _tracing_state = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_gradients = torch.is_grad_enabled
_library = torch.library.Library("bellbox", "FRAGMENT")
REFERENCE = "reference"
OPERATIONS: dict[str, Operation] = {}
"""Every operation by its name."""
_backends: list[Backend] = []
_changes = 0
# What os.environ reads, without the two microseconds of coding names: a packed layer asks in every call.
_environment: Mapping[Any, Any] = os.environ._data  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
_BACKEND: Any = os.environ.encodekey("BELLBOX_BACKEND")


class Backend(ABC):
    """Where operations may run.

    Examples:
        >>> from bellbox.ops.dispatch import Backend
        >>> class Nothing(Backend):
        ...     name, priority = "nothing", 1
        ...     def why_not(self, operation, arguments):
        ...         return "it is an example"
        ...     def has(self, operation):
        ...         return False
        ...     def implementation(self, operation):
        ...         raise NotImplementedError
        >>> Nothing().why_not("packed_linear", {})
        'it is an example'
    """

    name: ClassVar[str]
    """What `BELLBOX_BACKEND` and reports call it."""
    priority: ClassVar[int] = 0
    """Asked before those of lower priority."""

    @abstractmethod
    def why_not(self, operation: str, arguments: Mapping[str, Any]) -> str | None:
        """None where it takes the call, else the reason, in a few words.

        Args:
            operation: its name.
            arguments: of the call, by their names in the schema.
        """

    @abstractmethod
    def has(self, operation: str) -> bool:
        """Whether it has a kernel for an operation at all."""

    @abstractmethod
    def implementation(self, operation: str) -> Callable[..., Any]:
        """What runs a call that was taken: the operation's arguments in the order of its schema."""

    def bind(
        self, operation: str, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]
    ) -> Callable[..., Any] | None:
        """A call with all but the input fixed, or None where it has none; see the operation for how it is called.

        It may hold addresses of the tensors, and must notice by itself when one of them has another.
        """
        del operation, tensors, numbers
        return None

    def may_take(self, operation: str, tensors: Mapping[str, Tensor | None]) -> bool:
        """Whether it might take a call on these tensors though it bound none; it has to be asked at each call then."""
        del operation, tensors
        return True

    def status(self) -> str:
        """Whether it runs on this machine, in a few words for people."""
        return "there"

    def multiplies_integers(self, device: str) -> bool:
        """Whether its product of integers on a kind of device is faster than one of floats."""
        del device
        return False


@dataclass(frozen=True)
class Choice:
    """Which backend takes a call, and why those of higher priority do not."""

    operation: str
    backend: str
    refused: tuple[tuple[str, str], ...]
    """(backend, reason)."""

    def __str__(self) -> str:
        """One line."""
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refused)
        return f"{self.operation}: {self.backend}" + (f" ({reasons})" if reasons else "")


class Operation:
    """One operation, registered with torch as `bellbox::NAME`.

    Args:
        schema: as torch writes it, with the name in front.
        reference: plain torch, on any device; what every backend must give the bits of.
        fake: shapes and dtypes of the results, without numbers.
    """

    def __init__(self, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.name = schema.partition("(")[0]
        self.reference = reference
        _library.define(schema)
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bellbox::{self.name}", fake, lib=_library)
        self.call: Callable[..., Any] = getattr(torch.ops.bellbox, self.name).default
        """By way of torch's dispatcher: what compilers, tracers, modes and transforms see."""
        self._names = [each.name for each in self.call._schema.arguments]  # pyright: ignore[reportFunctionMemberAccess]
        self._required = [
            i
            for i, each in enumerate(self.call._schema.arguments)  # pyright: ignore[reportFunctionMemberAccess]
            if str(each.type) == "Tensor"
        ]
        OPERATIONS[self.name] = self

    def __call__(self, *arguments: Any) -> Any:
        """The operation, seen by whoever watches torch's operations."""
        return self.call(*arguments)

    def direct(self, *arguments: Any) -> Any:
        """The operation past torch's dispatcher, where nobody watches its first argument (`is_direct`)."""
        return self._run(*arguments) if is_direct(arguments[0]) else self.call(*arguments)

    def register_vmap(self, rule: Callable[..., tuple[Any, Any]]) -> None:
        """What `torch.func.vmap` makes of it; `rule` as `torch.library.register_vmap` wants it."""
        torch.library.register_vmap(f"bellbox::{self.name}", rule, lib=_library)

    def choose(self, arguments: Sequence[Any]) -> tuple[Backend | None, Choice]:
        """The backend for a call, None for the reference.

        Raises:
            BellboxError: `BELLBOX_BACKEND` names one that has a kernel for it and does not take it, or none at all.
        """
        named = dict(zip(self._names, arguments, strict=True))
        only, refused = forced(), list[tuple[str, str]]()
        for backend in _backends:
            if only is not None and backend.name != only:
                continue
            reason = backend.why_not(self.name, named)
            if reason is None:
                return backend, Choice(self.name, backend.name, tuple(refused))
            refused.append((backend.name, reason))
        if only not in (None, REFERENCE) and not any(
            b.name == only and not b.has(self.name) for b in _backends
        ):
            why = refused[0][1] if refused else "there is no such backend"
            raise BellboxError(f"BELLBOX_BACKEND={only} does not take {self.name}: {why}")
        return None, Choice(self.name, REFERENCE, tuple(refused))

    def _run(self, *arguments: Any) -> Any:
        filled = arguments
        if len(arguments) < len(self._names):  # torch leaves out trailing defaults
            defaults = self.call._schema.arguments[len(arguments) :]  # pyright: ignore[reportFunctionMemberAccess]
            filled = (*arguments, *(each.default_value for each in defaults))
        for i in self._required:  # torch takes None for any tensor
            if filled[i] is None:
                raise BellboxError(f"{self.name}: {self._names[i]} is None, a tensor is needed")
        backend, _ = self.choose(filled)
        run = self.reference if backend is None else backend.implementation(self.name)
        return run(*filled)


def bind(
    operation: str, tensors: Mapping[str, Tensor | None], numbers: Mapping[str, Any]
) -> Callable[..., Any] | None:
    """A backend's call of an operation with all but the input fixed; None where backends have to be asked each time.

    It holds while `Circumstances` do.
    """
    only = forced()
    for backend in _backends:
        if only is None or backend.name == only:
            bound = backend.bind(operation, tensors, numbers)
            if bound is not None or backend.may_take(operation, tensors):
                return bound
    return None


class Circumstances:
    """What the choice of a backend depends on besides the call: the registry and the environment, as they were."""

    __slots__ = ("_changes", "_only")

    def __init__(self) -> None:
        self._changes, self._only = _changes, _environment.get(_BACKEND)

    def hold(self) -> bool:
        """Whether they are what they were."""
        return self._changes == _changes and self._only == _environment.get(_BACKEND)


def register(backend: Backend) -> None:
    """Have a backend asked from now on; one of the same name is replaced."""
    unregister(backend.name)
    _backends.append(backend)
    _backends.sort(key=lambda each: -each.priority)


def unregister(name: str) -> None:
    """Ask a backend no longer."""
    global _changes
    _changes += 1
    _backends[:] = [each for each in _backends if each.name != name]


def backends() -> list[str]:
    """Names, those asked first in front."""
    return [each.name for each in _backends]


def statuses() -> dict[str, str]:
    """By the backends' names: whether each runs on this machine."""
    return {each.name: each.status() for each in _backends}


def multiplies_integers(device: str) -> bool:
    """Whether a product of integers on a kind of device has kernels that are faster than floats."""
    only = forced()
    return any(only in (None, each.name) and each.multiplies_integers(device) for each in _backends)


def kernels_of(operation: str) -> list[str]:
    """Names of the backends that have a kernel for an operation, the reference last."""
    return [each.name for each in _backends if each.has(operation)] + [REFERENCE]


def forced() -> str | None:
    """The one backend that the environment admits; None where it says nothing."""
    named = os.environ.get("BELLBOX_BACKEND") or None
    return REFERENCE if named is None and os.environ.get("BELLBOX_ISA") == REFERENCE else named


def is_unwatched(x: Tensor) -> bool:
    """Whether nobody has to see what is done with a tensor now.

    A compiler, a tracer, a mode (fake tensors, counters of operations), a subclass and a function transform (vmap)
    have to see operations of torch, and know no identity of a tensor.
    """
    return (
        not _is_compiling()
        and type(x) in _PLAIN
        and not _modes()
        and _tracing_state() is None
        and _transform() is None
    )


def is_direct(x: Tensor) -> bool:
    """Whether a backend may be called past torch's dispatcher now: autograd need not see it either.

    For nobody else is it worth the microseconds of being dispatched.
    """
    return is_unwatched(x) and not (x.requires_grad and _gradients())


def load_backends() -> None:
    """Import every folder under `backends/`; each registers itself."""
    from bellbox.ops import backends as folder

    for found in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"{folder.__name__}.{found.name}")
