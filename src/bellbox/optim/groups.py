"""Parameter groups for any optimizer: which parameters decay, and which learn at a rate of their own.

Decay pulls only on the matrices of layers. Decaying a norm's gain, a bias, an embedding row or a quantizer's gamma
pulls a *scale* towards zero: for gamma this shrinks the output grid of the layer itself, which the BBQ authors'
baselines suffered from (see LSQ).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bellbox.nn import is_fused_experts, is_transposed_linear
from bellbox.nn.experts import ExpertsForward
from bellbox.nn.tools import stored_weights
from bellbox.quantizers import Quantizer
from bellbox.quantizers.learned import LearnedQuantizer
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

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), bb.Recipe.bbq(bits=2))

        >>> groups = bb.optim.parameter_groups(model, lr=1e-3, weight_decay=0.1)
        >>> [(group["weight_decay"], group["lr_scale"]) for group in groups]  # matrices, biases, gammas
        [(0.1, 1.0), (0.0, 1.0), (0.0, 0.1)]
        >>> optimizer = torch.optim.AdamW(groups)
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
    """Whether it is a layer whose weight is multiplied with, or fused experts.

    Examples:
        >>> bb.optim.multiplies(nn.Linear(2, 2)), bb.optim.multiplies(nn.LayerNorm(2))
        (True, False)
    """
    known = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | ExpertsForward)
    return known or is_transposed_linear(module) or is_fused_experts(module)


def scale_gradients_by_row(model: nn.Module, on: bool = True) -> None:
    """Have gradients of learned scales of inputs not depend on how a batch is split or padded.

    As published, such a gradient is divided by the root of the number of values in the tensor. Four micro-batches then
    give twice the gradient of one batch, and padding makes it smaller. With this, it is divided by the root of a row's
    length alone, so that it is larger by the root of the number of rows: Adam's step does not notice, a clip of the
    gradient's norm may. To be called again in a process that goes on from a checkpoint; values of scales and all other
    gradients stay the same.

    Args:
        model: prepared. Methods that divide so are bbq, lsq and seq; others are left.
        on: False for the published rule.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), bb.Recipe.bbq(bits=2))

        >>> bb.optim.scale_gradients_by_row(model)
    """
    for module in model.modules():
        if isinstance(module, LearnedQuantizer) and module.rows is None:
            module.gradient_by_row = on
