"""LLaMA, written plainly, with exactly the module names of Hugging Face's.

A state dict of `LlamaForCausalLM` is a state dict of this model, by identity: `hf.py` has nothing to
translate, and a recipe's name patterns serve both. Nothing here knows of quantization: every layer that a
recipe may swap is a plain `nn.Linear`, and q, k, v (and gate, up) are handed the very same tensor object, so
that a quantizer that they share can see that it has done the work already.

Sources: Touvron et al. 2023 (arXiv 2302.13971); rotary positions, Su et al. 2021 (arXiv 2104.09864); RMSNorm,
Zhang and Sennrich 2019 (arXiv 1910.07467); SwiGLU, Shazeer 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bellbox.models import lean
from bellbox.models.attention import causal_attention, compute_dtype, gated
from bellbox.models.cache import KVCache
from bellbox.models.causal import CausalLM
from bellbox.models.config import LlamaConfig
from bellbox.models.lean import pays, swiglu
from bellbox.ops.attend import attend, attends
from bellbox.ops.rms_norm import rms_norm
from bellbox.ops.rotary import rotary_tables


class RMSNorm(nn.Module):
    """Each row divided by its root mean square, times a learned weight; fp32 inside (float64 for float64).

    The sum of squares is taken by `vector_norm`: on a CPU its forward and backward are the quickest of the
    ways that PyTorch offers (1.4 to 4 times `F.rms_norm`), and a row's result does not depend on how many
    rows there are. Without gradients fp32 takes one call instead (`bellbox.ops.rms_norm`).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` to the same shape, in the dtype of `x`, or autocast's where it is on."""
        dtype = compute_dtype(x)
        if dtype == torch.float32 == x.dtype == self.weight.dtype and not torch.is_grad_enabled():
            return rms_norm(x, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return lean.rms_norm(x, self.weight, self.eps, wide, dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RotaryEmbedding(nn.Module):
    """Rotates pairs of a head's channels by an angle that grows with the position.

    The cosines and sines of every position are computed once (`ops/rotary.py`), so that a token's
    rotation cannot depend on the call that it comes in. They follow the module from device to device but not
    into a lower precision: bf16 cannot tell neighbouring positions apart.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.theta, self.positions = (
            config.head_size,
            float(config.rope_theta),  # a whole number beyond 64 bits would be none for torch
            config.max_position_embeddings,
        )
        empty = torch.empty(self.positions, self.head_dim // 2)
        self.register_buffer("cos", empty, persistent=False)
        self.register_buffer("sin", empty.clone(), persistent=False)
        self._fill(empty.device)

    def _fill(self, device: torch.device) -> None:
        if device.type == "meta":  # nothing to fill, and torch would import its compiler for that
            return
        cos, sin = rotary_tables(self.theta, self.head_dim, self.positions)
        self.cos, self.sin = cos.to(device), sin.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self._fill(
            self.cos.device
        )  # after .to(), .half(), .to_empty(): the right device, always fp32, never garbage
        return self

    def forward(self, x: Tensor, start: int) -> Tensor:
        """`[B, heads, T, head_dim]` at positions start..start+T-1, rotated, in the dtype of `x`.

        Channel i is paired with i + head_dim / 2, as Hugging Face stores its weights.
        """
        end = start + x.shape[2]
        cos, sin = self.cos[start:end], self.sin[start:end]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class LlamaAttention(nn.Module):
    """Grouped-query self-attention."""

    input_groups = (("q_proj", "k_proj", "v_proj"),)
    """Layers that read the very same tensor."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.fused = config.head_size, config.fused_qkv
        queries, keys = config.num_attention_heads * self.head_dim, config.key_value_heads * self.head_dim
        if self.fused:
            self.qkv_proj = nn.Linear(config.hidden_size, queries + 2 * keys, bias=False)
        else:
            self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
            self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding, cache: KVCache | None, layer: int, exact: bool
    ) -> Tensor:
        """`[B, T, hidden]` to the same; new keys and values go into the cache, if there is one."""
        heads = (*x.shape[:2], -1, self.head_dim)
        start = cache.length if cache is not None else 0
        query, key, value = (
            self.qkv_proj(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        held = None if cache is None else cache.layer(layer)
        if not exact and attends(query, held):
            tables = rotary.cos, rotary.sin
            return self.o_proj(attend(query, key, value, tables, held, start, self.head_dim))
        query = rotary(query.view(heads).transpose(1, 2), start)
        key = rotary(key.view(heads).transpose(1, 2), start)
        value = value.view(heads).transpose(1, 2)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mixed = causal_attention(query, key, value, exact=exact)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """SwiGLU: one projection, gated by the SiLU of another."""

    input_groups = (("gate_proj", "up_proj"),)
    """Layers that read the very same tensor."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, exact: bool) -> Tensor:
        """`[B, T, hidden]` to the same."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        kept = not exact and gate.dtype == up.dtype and pays(gate, up)
        return self.down_proj(swiglu(gate, up) if kept else gated(gate, up, exact=exact))


class LlamaBlock(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: RotaryEmbedding, cache: KVCache | None, layer: int, exact: bool
    ) -> Tensor:
        """`[B, T, hidden]` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, layer, exact)
        return x + self.mlp(self.post_attention_layernorm(x), exact)


class LlamaBody(nn.Module):
    """Everything but the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, input_ids: Tensor, cache: KVCache | None, last_only: bool, exact: bool) -> Tensor:
        """Token ids `[B, T]` to normalised states `[B, T, hidden]`, or `[B, 1, hidden]` of the last token."""
        x = self.embed_tokens(input_ids)
        for layer, block in enumerate(self.layers):
            x = block(x, self.rotary_emb, cache, layer, exact)
        return self.norm(x[:, -1:] if last_only else x)


class Llama(CausalLM[LlamaConfig]):
    """A LLaMA language model; `state_dict()` has the names and shapes of `transformers.LlamaForCausalLM`."""

    body_name = "model"
    model: LlamaBody

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, LlamaBody(config))

    @property
    def embedding(self) -> nn.Embedding:
        """See `CausalLM`."""
        return self.model.embed_tokens

    @property
    def norm_weight(self) -> Tensor:
        """See `CausalLM`."""
        return self.model.norm.weight

    def reset_parameters(self) -> None:
        """Normal weights; those of projections into the residual stream divided by sqrt(2 x layers)."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                output = name.endswith(("o_proj", "down_proj"))
                shrink = (2 * self.config.num_hidden_layers) ** -0.5 if output else 1.0
                nn.init.normal_(module.weight, std=std * shrink)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
