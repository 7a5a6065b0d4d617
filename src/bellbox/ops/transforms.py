"""Functions with a gradient in closed form, made so that `torch.func` and second derivatives go through them.

Such a function of a quantizer returns, beside its result, what its gradient depends on (the normalised
value, say), as outputs that have a gradient too. The gradient itself is computed by an operation; where somebody
differentiates it again, by a second function around that operation, whose own gradient is the transpose of a plain
formula. Codes are constants in it: the second derivative is that of the function that training follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from bellbox.errors import BellboxError

Asked = TypeVar("Asked", bound=Callable[..., Any])


def constant_when_traced(function: Asked) -> Asked:
    """Have a compiler take what a function gives for a constant.

    As `torch.compiler.assume_constant_result` does, which imports the compiler.
    """
    cast(Any, function)._dynamo_marked_constant = True
    return function


class TransformableFunction(torch.autograd.Function):
    """Batched by `torch.func.vmap` as it stands; to be called by `apply`."""

    generate_vmap_rule = True


def apply(function: type[TransformableFunction], *args: Any) -> Any:
    """`function.apply(*args)`, where forward-mode derivatives are refused in one line."""
    # A compiler traces no function that has a rule for them.
    return (function if torch.compiler.is_compiling() else _reverse_only(function)).apply(*args)


@functools.cache
def _reverse_only(function: type[TransformableFunction]) -> type[TransformableFunction]:
    return type(function.__name__, (function,), {"jvp": staticmethod(_refuse)})


def _refuse(*_: Any) -> NoReturn:
    raise BellboxError(
        "quantizers have no forward-mode derivative (torch.func.jvp, jacfwd, hessian): use reverse mode, such as "
        "torch.func.vjp, jacrev, or grad of grad"
    )


def differentiated_again() -> bool:
    """Whether a backward that runs now is recorded itself, for a further derivative."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_second_derivative() -> None:
    """One line where the backward of a product on integers is differentiated again.

    Raises:
        BellboxError: with the way out.
    """
    if differentiated_again():
        raise BellboxError(
            "a training forward on integers has no second derivative: prepare the model with a recipe of "
            "integer_forward=False"
        )


def transposed(
    formula: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Cotangents of `inputs` from those of what `formula(*inputs)` gives; None counts as zero."""
    outputs, pull = cast("tuple[tuple[Tensor, ...], Any]", torch.func.vjp(formula, *inputs))
    full = tuple(
        torch.zeros_like(out) if given is None else given.to(out.dtype)
        for out, given in zip(outputs, cotangents, strict=True)
    )
    return cast("tuple[Tensor, ...]", pull(full))
