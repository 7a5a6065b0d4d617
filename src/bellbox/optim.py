"""What a training loop of one's own does for a low-bit model: parameter groups, and codebooks fitted anew.

```python
optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1))
...
optimizer.step()
refit_codebooks(model, second_moments(optimizer), step)      # of k-means, every `refit_every` steps
```

Decay pulls only on the matrices of layers. Decaying a norm's gain, a bias, an embedding row or a quantizer's gamma
pulls a *scale* towards zero: for gamma this shrinks the output grid of the layer itself, which the BBQ authors'
baselines suffered from (see LSQ).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.nn import is_fused_experts, is_transposed_linear
from bellbox.nn.experts import ExpertsForward
from bellbox.nn.quantized import QuantizedLayer
from bellbox.nn.tools import quantized_layers, stored_weights
from bellbox.quantizers import Quantizer
from bellbox.recipe import is_head


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, decay_head: bool = True
) -> list[dict[str, Any]]:
    """Split the trainable parameters: weights of linear layers, experts and convolutions decay, all else does not.

    A weight that is tied to an embedding counts as the embedding's. A quantizer may name parameters of its own that
    decay too (`decayed`), or learn at another rate (`learning_rates`, such as BBQ's gamma). Each parameter appears
    once. Schedulers of torch work on the groups as they are: they scale each group's own rate.

    Args:
        model: prepared or not.
        lr: the learning rate of what has no rate of its own.
        weight_decay: the decay of the matrices.
        decay_head: whether it pulls on the layer that gives the logits too (found by its name).

    Returns:
        groups with `params`, `weight_decay`, `lr` and `lr_scale`: what `lr` was multiplied with, for loops that set
        rates themselves. Groups without parameters are left out.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = (
        weight
        for name, m in model.named_modules()
        if multiplies(m) and (decay_head or not is_head(name))
        for weight in stored_weights(m)
    )
    decayed = {id(weight) for weight in weights if id(weight) not in embeddings}
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
        {
            "params": members,
            "weight_decay": weight_decay if decays else 0.0,
            "lr": lr * rate,
            "lr_scale": rate,
        }
        for (decays, rate), members in groups.items()
        if members
    ]


def multiplies(module: nn.Module) -> bool:
    """Whether it is a layer whose weight is multiplied with, or fused experts."""
    known = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | ExpertsForward)
    return known or is_transposed_linear(module) or is_fused_experts(module)


def refit_codebooks(
    model: nn.Module, squared_gradients: Mapping[Tensor, Tensor] | None = None, step: int | None = None
) -> list[str]:
    """Fit the codebooks of k-means anew, each to its weight as it is now.

    A function of weights, squared gradients and step alone, so a run that goes on from a checkpoint does the same.

    Args:
        model: prepared.
        squared_gradients: stored weight -> its squared gradients, of the same shape, in any unit: `second_moments` of
            an optimizer, or sums by `add_squared_gradients`. Needed by quantizers with the option `fisher`; others
            take no notice of them.
        step: optimizer steps done so far: only codebooks whose `refit_every` divides it are fitted. All where None.

    Returns:
        names of the layers whose codebook was fitted.

    Raises:
        BellboxError: a codebook that counts errors by squared gradients, and there are none for its weight.
    """
    fitted: list[str] = []
    for name, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if quantizer is None or not quantizer.refits or not _is_due(quantizer.refit_every, step):
            continue
        counts = _squares_of(name, layer, squared_gradients or {}) if quantizer.by_squared_gradients else None
        quantizer.refit(layer.weight_rows().detach(), counts)
        fitted.append(name)
    return fitted


def _is_due(every: int, step: int | None) -> bool:
    return step is None or (every > 0 and step > 0 and step % every == 0)


def _squares_of(name: str, layer: QuantizedLayer, known: Mapping[Tensor, Tensor]) -> Tensor:
    found = known.get(layer.parameter)
    if found is None:
        raise BellboxError(
            f"{name or 'the layer'}: fisher=true weighs errors by squared gradients, and there are none of its weight: "
            "pass second_moments(optimizer) of an Adam that has stepped, or sums of add_squared_gradients"
        )
    return layer.rows_of(layer.part_of(found))


def second_moments(*optimizers: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Parameter -> the running mean of its squared gradient, of optimizers of Adam's kind; others have none."""
    return {
        parameter: state["exp_avg_sq"]
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        if "exp_avg_sq" in state
    }


@torch.no_grad()
def add_squared_gradients(model: nn.Module, sums: MutableMapping[Tensor, Tensor]) -> None:
    """Add the squares of the gradients of now to `sums`, for optimizers without a second moment.

    Args:
        model: prepared, after a backward; only weights whose codebook is fitted by squared gradients are looked at.
        sums: stored weight -> fp32 sum, the shape of the weight; begin with an empty dict.
    """
    weights = {
        layer.parameter  # of experts: one parameter of many layers
        for _, layer in quantized_layers(model)
        if layer.weight_quantizer is not None and layer.weight_quantizer.by_squared_gradients
    }
    for weight in weights:
        if weight.grad is not None:
            square = weight.grad.float().square()
            sums[weight] = sums[weight] + square if weight in sums else square
