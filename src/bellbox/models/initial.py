"""First weights of linear layers, in place of a model's own."""

from __future__ import annotations

import torch
from torch import nn

from bellbox.structure import embedding_weights

APART = 0x1EC0
"""Sets the stream of the draw apart from the one that the model itself was drawn from with the same seed."""


@torch.no_grad()
def lecun_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the weights of all linear layers from N(0, 1/in_features) (LeCun et al., 1998), in place; biases stay.

    A weight that is tied to an embedding stays too.

    Args:
        model: in full precision, not yet prepared.
        seed: of the draw.

    Returns:
        `model`.
    """
    draw = torch.Generator().manual_seed(seed ^ APART)
    embeddings = embedding_weights(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings:
            weight = torch.randn(module.weight.shape, generator=draw) * module.in_features**-0.5
            module.weight.copy_(weight)
    return model
