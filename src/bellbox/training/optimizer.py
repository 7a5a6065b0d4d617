"""AdamW with two groups: decay pulls only on the matrices of linear layers.

Decaying a norm's gain, a bias, an embedding row or a quantizer's gamma pulls a *scale* towards zero: for
gamma this shrinks the output grid of the layer itself, which the BBQ authors' baselines suffered from (see
LSQ).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters: weights of `nn.Linear` and its subclasses decay, everything else does
    not.

    A weight that is tied to an embedding counts as the embedding's. A quantizer may name parameters of its own that
    decay too (`decayed`), or learn at another rate (`learning_rates`): that is the group's `lr_scale`, for `set_lr`.
    Each parameter appears once.

    Args:
        model: prepared or not; quantized linear layers count by being `nn.Linear` or by their name
            `QuantizedLinear`.
        weight_decay: the decay of the first group.
    """
    from bellbox.quantizers import Quantizer

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = {
        id(m.weight)
        for m in model.modules()
        if _is_linear(m) and isinstance(m.weight, Tensor) and id(m.weight) not in embeddings
    }
    rates: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, Quantizer):
            own = module._parameters
            decayed.update(id(own[name]) for name in module.decayed)
            rates.update((id(own[name]), rate) for name, rate in module.learning_rates.items() if name in own)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault((id(p) in decayed, rates.get(id(p), 1.0)), []).append(p)
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, "lr_scale": rate}
        for (decays, rate), members in groups.items()
    ]


def _is_linear(module: nn.Module) -> bool:
    from bellbox.nn import QuantizedLinear

    return isinstance(module, nn.Linear | QuantizedLinear)


def make_adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, the update fused into one pass over the memory."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group this learning rate, times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def carry_state(before: torch.optim.Optimizer, after: torch.optim.Optimizer) -> None:
    """Give `after` the moments of all the parameters that both of them train; the others start without."""
    known = {id(parameter) for group in after.param_groups for parameter in group["params"]}
    for parameter, state in before.state.items():
        if id(parameter) in known:
            after.state[parameter] = state


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """The optimizer's state as flat names: `blocks.0.attention.q.weight/exp_avg`.

    Args:
        optimizer: whose per-parameter state is tensors only, as AdamW's.
        names: `model.named_parameters()`.
    """
    return {
        f"{name}/{key}": value
        for name, parameter in names
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Iterable[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`. The tensors are copied, so that their memory is aligned as at
    first.

    Raises:
        KeyError: a tensor names no parameter.
        ValueError: a moment has another shape than its parameter.
    """
    parameters = dict(names)
    optimizer.state.clear()
    for flat, value in tensors.items():
        name, _, key = flat.rpartition("/")
        parameter = parameters[name]
        if value.numel() != 1 and value.shape != parameter.shape:
            raise ValueError(f"{flat} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
        # AdamW's `step` is a scalar on the parameter's device where the update is fused.
        optimizer.state[parameter][key] = torch.empty_like(value, device=parameter.device).copy_(value)
