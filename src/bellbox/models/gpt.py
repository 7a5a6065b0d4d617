"""GPT-2, written plainly, with q, k, v as three layers; with ReLU in place of GELU it is OPT.

GPT-2's own checkpoints fuse q, k and v into one transposed matrix. Here they are three plain `nn.Linear`s
that read the very same tensor object, as in LLaMA, so that a recipe treats both alike; `hf_names.py` splits and
fuses without loss. The other names are GPT-2's own (`transformer.h.0.attn.c_proj`, `...mlp.c_fc`).

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Zhang et al., arXiv 2205.01068.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bellbox.models.attention import causal_attention, compute_dtype, erf_gelu, tanh_gelu
from bellbox.models.cache import KVCache
from bellbox.models.causal import CausalLM
from bellbox.models.config import GPTConfig
from bellbox.ops.activate import is_pinned
from bellbox.ops.attend import attend, attends
from bellbox.ops.layer_norm import layer_norm


class LayerNorm(nn.LayerNorm):
    """PyTorch's, fp32 inside, rounded to autocast's dtype where that is on; in evaluation `ops.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., size]` to the same shape."""
        if is_pinned(input) and self.weight.dtype == torch.float32:
            return layer_norm(input, self.weight, self.bias, self.eps)
        return super().forward(input).to(compute_dtype(input))


class GPTAttention(nn.Module):
    """Multi-head self-attention."""

    input_groups = (("q_proj", "k_proj", "v_proj"),)
    """Layers that read the very same tensor."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.bias
        self.head_dim, self.fused = config.head_size, config.fused_qkv
        if self.fused:
            self.qkv_proj = nn.Linear(width, 3 * width, bias=bias)
        else:
            self.q_proj = nn.Linear(width, width, bias=bias)
            self.k_proj = nn.Linear(width, width, bias=bias)
            self.v_proj = nn.Linear(width, width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int, exact: bool) -> Tensor:
        """`[B, T, hidden]` to the same; new keys and values go into the cache, if there is one."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (
            self.qkv_proj(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        held, start = (None, 0) if cache is None else (cache.layer(layer), cache.length)
        if not exact and attends(query, held):
            return self.c_proj(attend(query, key, value, None, held, start, self.head_dim))
        query, key, value = (part.view(heads).transpose(1, 2) for part in (query, key, value))
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mixed = causal_attention(query, key, value, exact=exact)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class GPTMLP(nn.Module):
    """Two layers with a GELU or a ReLU between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)
        self.activation = config.activation

    def forward(self, x: Tensor, exact: bool) -> Tensor:
        """`[B, T, hidden]` to the same."""
        return self.c_proj(self.activate(self.c_fc(x), exact))

    def activate(self, wide: Tensor, exact: bool) -> Tensor:
        """What stands between the two layers, elementwise."""
        if self.activation == "relu":
            return wide.relu()
        return erf_gelu(wide, exact=exact) if self.activation == "gelu_erf" else tanh_gelu(wide, exact=exact)


class GPTBlock(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=config.bias)
        self.attn = GPTAttention(config)
        self.ln_2 = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=config.bias)
        self.mlp = GPTMLP(config)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int, exact: bool) -> Tensor:
        """`[B, T, hidden]` to the same."""
        x = x + self.attn(self.ln_1(x), cache, layer, exact)
        return x + self.mlp(self.ln_2(x), exact)


class GPTBody(nn.Module):
    """Everything but the head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_f = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=config.bias)

    def forward(self, input_ids: Tensor, cache: KVCache | None, last_only: bool, exact: bool) -> Tensor:
        """Token ids `[B, T]` to normalised states `[B, T, hidden]`, or `[B, 1, hidden]` of the last token."""
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(positions)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer, exact)
        return self.ln_f(x[:, -1:] if last_only else x)


class GPT(CausalLM[GPTConfig]):
    """A GPT-2 language model, without dropout."""

    body_name = "transformer"
    transformer: GPTBody

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config, GPTBody(config))

    @property
    def embedding(self) -> nn.Embedding:
        """See `CausalLM`."""
        return self.transformer.wte

    @property
    def norm_weight(self) -> Tensor:
        """See `CausalLM`."""
        return self.transformer.ln_f.weight

    def reset_parameters(self) -> None:
        """Normal weights, zero biases; projections into the residual stream smaller, by sqrt(2 x layers)."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                shrink = (2 * self.config.num_hidden_layers) ** -0.5 if name.endswith("c_proj") else 1.0
                nn.init.normal_(module.weight, std=std * shrink)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                module.reset_parameters()
