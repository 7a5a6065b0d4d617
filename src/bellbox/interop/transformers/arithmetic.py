"""The arithmetic of `bellbox.models` in a model of transformers that was trained there.

Between packed layers stand norms, an activation, rotary positions and attention. transformers leaves them to torch,
which rounds otherwise than the kernels that such a model was trained and measured with, and a value beside a threshold
would get another code. So these modules compute as in `bellbox.models` where that does: in evaluation without
gradients, in fp32 on the CPU. Everywhere else, and with a mask that is more than causal (padding), they compute as in
transformers.

The folder says which models these are (`"rms_norm": "bellbox"`, `"layer_norm": "bellbox"` in `config.json`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bellbox.formats.description import LAYER_NORM, RMS_NORM
from bellbox.nn.adopted import class_for
from bellbox.ops.activate import Activation, activate, is_pinned
from bellbox.ops.attend import CacheLayer, attend, attends
from bellbox.ops.layer_norm import layer_norm
from bellbox.ops.rms_norm import rms_norm
from bellbox.ops.rotary import rotary_tables

_ATTENTION = "bellbox"
"""Name of our attention among those of transformers."""
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf",
}  # fmt: skip
"""Of transformers' configurations."""


class BellboxNorm(nn.Module):
    """An RMS norm of transformers that, in evaluation in fp32, computes as `bellbox.models` does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., size]` to the same shape."""
        norm: Any = self
        if hidden_states.dtype == norm.weight.dtype == torch.float32 and not torch.is_grad_enabled():
            return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)
        return super().forward(hidden_states)


class BellboxLayerNorm(nn.Module):
    """Likewise a LayerNorm."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., size]` to the same shape."""
        norm: Any = self
        if is_pinned(input) and norm.weight.dtype == torch.float32:
            return layer_norm(input, norm.weight, norm.bias, norm.eps)
        return super().forward(input)


class BellboxActivation(nn.Module):
    """Likewise the activation of an MLP."""

    kind: Activation

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return activate(input, self.kind) if is_pinned(input) else super().forward(input)


class BellboxRotary(nn.Module):
    """Likewise the cosines and sines of positions."""

    tables: tuple[Tensor, Tensor]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both `[B, T, head_dim]`, for positions `[B, T]`; what `x` holds does not matter."""
        cos, sin = self.tables
        if torch.compiler.is_compiling() or not is_pinned(x) or int(position_ids.max()) >= len(cos):
            return super().forward(x, position_ids)
        cos, sin = cos[position_ids], sin[position_ids]
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: by the kernels of `bellbox.models`, or else torch's.

    Args:
        module: the model's.
        query: `[B, heads, T, head_dim]`, rotated.
        key: `[B, kv_heads, S, head_dim]`, likewise; those of earlier tokens first.
        value: as `key`.
        attention_mask: None, or bool `[B or 1, 1, T, S]`.
        dropout: in training.
        scaling: of the products.
        is_causal: whether a token sees those before it alone; else the module says so.
        kwargs: further ones, for torch's.

    Returns:
        `[B, T, heads, head_dim]`, and no weights.
    """
    usual = scaling in (None, query.shape[-1] ** -0.5) and not dropout and kwargs.get("position_bias") is None
    start = None
    if usual and attends(query, None) and kwargs.get("sliding_window") is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        start = _start(query, key, attention_mask) if causal else None
    if start is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )  # fmt: skip
    tokens, head_dim = query.shape[2:]
    new_key, new_value = (_by_token(each[:, :, start : start + tokens]) for each in (key, value))
    # What is new is written where it lies already.
    held = CacheLayer(key.contiguous(), value.contiguous()) if start else None
    out = attend(_by_token(query), new_key, new_value, None, held, start, head_dim)
    return out.view(len(out), tokens, -1, head_dim), None


def _by_token(heads: Tensor) -> Tensor:
    """`[B, heads, T, head_dim]` as `[B, T, heads * head_dim]`."""
    return heads.transpose(1, 2).flatten(2)


def _start(query: Tensor, key: Tensor, mask: Tensor | None) -> int | None:
    """Position of the first new token, where each sees all before it and itself; None where the mask says otherwise."""
    tokens, held = query.shape[2], key.shape[2]
    if mask is None:  # torch's own reading of that
        return held - 1 if tokens == 1 else 0
    if mask.dtype != torch.bool or mask.dim() != 4:
        return None
    start = int(mask[0, 0, -1].sum()) - tokens
    if start < 0:
        return None
    seen = torch.arange(held) <= torch.arange(start, start + tokens)[:, None]
    return start if bool((mask == seen).all()) else None


def with_bellbox_arithmetic(model: Any) -> None:
    """Have a LLaMA or a GPT-2 that `bellbox.models` trained compute as there; other models stay as they are."""
    config = model.config
    key = {"llama": RMS_NORM, "gpt2": LAYER_NORM}.get(config.model_type)
    if key is None or getattr(config, key, None) != "bellbox":
        return
    for module in list(model.modules()):
        name = type(module).__name__
        if name == "LlamaRMSNorm":
            module.__class__ = class_for(BellboxNorm, type(module))
        elif isinstance(module, nn.LayerNorm):
            module.__class__ = class_for(BellboxLayerNorm, type(module))
        elif name == "LlamaRotaryEmbedding" and module.rope_type == "default":
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            theta = config.rope_parameters["rope_theta"]
            object.__setattr__(
                module, "tables", rotary_tables(float(theta), size, config.max_position_embeddings)
            )
            module.__class__ = class_for(BellboxRotary, type(module))
        elif name in ("LlamaMLP", "GPT2MLP"):
            _pin_activation(module.act_fn if name == "LlamaMLP" else module.act, config)
    if config._attn_implementation == "sdpa":
        config._attn_implementation = _ATTENTION


def _pin_activation(module: Any, config: Any) -> None:
    name = config.hidden_act if config.model_type == "llama" else config.activation_function
    if name in _ACTIVATIONS:
        module.__class__ = class_for(BellboxActivation, type(module))
        object.__setattr__(module, "kind", _ACTIVATIONS[name])


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, sdpa_mask)
