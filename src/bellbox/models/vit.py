"""A vision transformer, written plainly (Dosovitskiy et al. 2020, arXiv 2010.11929), with DeiT's training tricks
(arXiv 2012.12877) left to the trainer.

q, k and v read the very same tensor, so that they can share a quantizer, or are one matrix. Patch embedding
(`patch_embed`), norms and classifier (`head`) keep their precision by the recipe's own defaults. The classifier sees
the mean of the patches, or the class token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.models.attention import erf_gelu
from bellbox.models.config import ViTConfig
from bellbox.models.gpt import LayerNorm
from bellbox.models.image import DropPath, Normalise, classify, convolve, mean_of, rising
from bellbox.ops.attend import attend, attends


class Attention(nn.Module):
    """Self-attention over the patches."""

    input_groups = (("q_proj", "k_proj", "v_proj"),)
    """Layers that read the very same tensor."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads, self.fused = config.num_attention_heads, config.fused_qkv
        width = config.hidden_size
        if self.fused:
            self.qkv_proj = nn.Linear(width, 3 * width)
        else:
            self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, patches, hidden]` to the same."""
        parts = (
            self.qkv_proj(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        if attends(parts[0], None):
            head_dim = parts[0].shape[-1] // self.heads
            query, key, value = parts
            return self.o_proj(attend(query, key, value, None, None, 0, head_dim, causal=False))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, patches, hidden]` to the same."""
        return self.fc2(erf_gelu(self.fc1(x), exact=False))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.norm1, self.attention = LayerNorm(width, eps), Attention(config)
        self.norm2, self.mlp = LayerNorm(width, eps), MLP(config)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, patches, hidden]` to the same."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Images in [0, 1], `[batch, channels, image size, image size]`, to logits `[batch, labels]`.

    Attributes:
        config: its shape.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normalise(config.num_channels)
        width, patch = config.hidden_size, config.patch_size
        self.patch_embed = nn.Conv2d(config.num_channels, width, patch, patch)
        places = (config.image_size // patch) ** 2 + config.class_token
        self.positions = nn.Parameter(torch.empty(1, places, width))
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if config.class_token else None
        chances = rising(config.drop_path, config.num_hidden_layers)
        self.blocks = nn.ModuleList(Block(config, chance) for chance in chances)
        self.norm = LayerNorm(width, config.layer_norm_epsilon)
        self.head = nn.Linear(width, config.num_labels)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.positions, std=config.initializer_range)
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=config.initializer_range)

    def features(self, x: Tensor) -> Tensor:
        """What the classifier sees: `[batch, hidden]`."""
        x = convolve(self.patch_embed, self.normalise(x)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), 1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return mean_of(x, (1,)) if self.class_token is None else x[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return classify(self.head, self.features(x))
