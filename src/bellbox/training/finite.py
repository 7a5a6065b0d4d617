"""Finding the layer that broke, after a loss or a gradient was NaN or infinite.

Checking every layer in every step would cost more than it is worth; a run that breaks breaks once. So the
batch that broke is run again with hooks that look at everything, and the message names the first layer that
made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bellbox.errors import BellboxError


class NotFiniteError(BellboxError):
    """A layer's output holds NaN or infinity."""


@contextmanager
def checked_forward(model: nn.Module) -> Iterator[list[str]]:
    """Within it, the first layer whose output is not finite raises `NotFiniteError`.

    Yields:
        The names of the modules in the order in which their forward ended.
    """
    order: list[str] = []
    handles = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, _inputs: Any, output: Any) -> None:
            order.append(name)
            if _broken(output):
                broken = [key for key, value in module.named_parameters(recurse=False) if _broken(value)]
                cause = f": its {broken[0]} is not finite" if broken else ""
                raise NotFiniteError(f"the output of layer '{name}' is not finite{cause}")

        return look

    for name, module in model.named_modules():
        # An outer module ends after its parts, so the innermost one that broke is met first.
        handles.append(module.register_forward_hook(hook(name or "model")))
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def find_broken_layer(model: nn.Module, run_batch: Callable[[], Tensor]) -> str:
    """Run a batch again and say in words where it breaks.

    Args:
        model: its gradients are overwritten.
        run_batch: runs forward with autocast as in training and returns the loss.
    """
    model.zero_grad(set_to_none=True)
    try:
        with checked_forward(model) as order:
            loss = run_batch()
    except BellboxError as error:
        return str(error)
    if _broken(loss):
        return "every layer's output is finite, the loss is not"
    loss.backward()
    broken = {name.rpartition(".")[0]: name for name, p in model.named_parameters() if _broken(p.grad)}
    # Backward visits the layers from the last to the first: the last of them to run forward broke first.
    # A layer's own parameters count before those of its quantizers, which run inside it.
    for name in reversed(order):
        if name in broken:
            return f"the gradient of '{broken[name]}' is the first that is not finite"
    if broken:
        return f"the gradient of '{next(iter(broken.values()))}' is not finite"
    return "run again alone, the batch gives finite numbers in every layer"


def _broken(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_broken, value))
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())
