"""Looking into a model and changing its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bellbox.core.entropy import code_counts
from bellbox.errors import BellboxError
from bellbox.nn.experts import ExpertsForward, is_fused_experts, stack_names
from bellbox.nn.quantized import EXTRA_STATE, ActivationQuantizer, QuantizedLayer
from bellbox.nn.quantized_table import QuantizedTable


def without_fused_paths(model: nn.Module) -> None:
    """Have torch's own transformer layers call their linear layers.

    In evaluation they may read the weights past the layers' forward, which would use float weights where there
    are quantized ones; these attributes, checked by torch before it does, switch that off.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def stored_weight(layer: nn.Module) -> Tensor | None:
    """The parameter of a layer's weight as it is stored, rotated or not; None of a module without one."""
    return layer.parameter if isinstance(layer, QuantizedLayer) else layer._parameters.get("weight")


def stored_weights(module: nn.Module) -> list[Tensor]:
    """The parameters of two and more dimensions that a layer, or fused experts, multiply with, as they are stored."""
    if is_fused_experts(module) or isinstance(module, ExpertsForward):
        found = [module._parameters.get(name) for name in stack_names(module)]
    else:
        found = [stored_weight(module)]
    return [weight for weight in found if weight is not None]


def replace_layer(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` in every place of `root` where `old` stands (a layer may be used under several names).

    Returns:
        `root`, or `new` where `root` is the layer itself.
    """
    for parent in list(root.modules()):
        for leaf, child in parent._modules.items():
            if child is old:
                setattr(parent, leaf, new)
    return new if root is old else root


def _add_counts(total: Tensor, codes: Tensor) -> None:
    total += code_counts(codes, len(total))


@contextmanager
def record_activation_codes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count the activation codes of every quantized layer while the context is open.

    Yields:
        layer name -> int64 `[n]`, filled by each forward. Siblings that share a quantizer appear under its owner.
    """
    counts: dict[str, Tensor] = {}
    attached: list[tuple[ActivationQuantizer, Callable[[Tensor], None]]] = []
    for name, layer in quantized_layers(model):
        quantizer = layer._modules.get("activation_quantizer")
        if isinstance(quantizer, ActivationQuantizer):
            counts[name] = torch.zeros(
                quantizer.levels.n, dtype=torch.int64, device=layer.stored_weight.device
            )

            observe = partial(_add_counts, counts[name])
            quantizer.observers.append(observe)
            attached.append((quantizer, observe))
    try:
        yield counts
    finally:
        for quantizer, observe in attached:
            quantizer.observers.remove(observe)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every `QuantizedLayer` with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            yield name, module


def unique_tensors(model: nn.Module, leave_out: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict with each tensor once; what is tied goes under the first of its names.

    Args:
        model: any.
        leave_out: beginnings of names that do not count, not even as the first of a tied tensor's.

    Raises:
        BellboxError: a module with a state that is no parameter or buffer.
    """
    first: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        module, _, leaf = name.rpartition(".")
        ours = leaf == EXTRA_STATE and isinstance(
            model.get_submodule(module), QuantizedLayer | QuantizedTable
        )
        if (leaf == EXTRA_STATE and not ours) or not isinstance(value, Tensor):
            raise BellboxError(
                f"module {module!r} has state of its own making ({leaf}), which cannot be stored; keep it in buffers"
            )
        if not name.startswith(leave_out) and first.setdefault(id(value), name) == name:
            found[name] = value
    return found


def is_guard(tensor: Tensor | None) -> bool:
    """Whether a tensor under the name of a layer's weight only keeps plain models from loading (`formats.guard`)."""
    return tensor is not None and tensor.shape == (0,) and tensor.dtype == torch.uint8
