"""A forward whose shapes do not depend on how many tokens came before: for graphs, which know but one shape.

Keys and values are written at given places of tensors that have room for the whole text, and attention reads all of
them behind a mask. What the mask hides is multiplied by zero, so it must be finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.models import GPT, Llama
from bellbox.models.gpt import GPTAttention, GPTBlock
from bellbox.models.llama import LlamaAttention, LlamaBlock


def forward_at(
    model: Llama | GPT, input_ids: Tensor, places: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Tensor:
    """Logits `[B, T, vocab_size]` of tokens at given places of a text.

    Args:
        model: in evaluation, of floats or packed.
        input_ids: int64 `[B, T]`.
        places: int64 `[T]`, where they stand: T in a row, the first of which comes right after what the cache holds.
        keys: for each block `[B, key-value heads, room, head_dim]`, written at these places; values likewise.
    """
    seen = torch.arange(keys[0].shape[2], device=places.device) <= places[:, None]
    if isinstance(model, Llama):
        body = model.model
        tables = tuple(table.index_select(0, places) for table in (body.rotary_emb.cos, body.rotary_emb.sin))
        x = body.embed_tokens(input_ids)
        for block, *held in zip(body.layers, keys, values, strict=True):
            assert isinstance(block, LlamaBlock)
            mixed = _attend(block.self_attn, block.input_layernorm(x), tables, places, seen, *held)
            x = x + block.self_attn.o_proj(mixed)
            x = x + block.mlp(block.post_attention_layernorm(x), False)
        return model.lm_head(body.norm(x))
    body = model.transformer
    x = body.wte(input_ids) + body.wpe(places)
    for block, *held in zip(body.h, keys, values, strict=True):
        assert isinstance(block, GPTBlock)
        mixed = _attend(block.attn, block.ln_1(x), None, places, seen, *held)
        x = x + block.attn.c_proj(mixed)
        x = x + block.mlp(block.ln_2(x), False)
    return model.lm_head(body.ln_f(x))


def _attend(
    attention: LlamaAttention | GPTAttention,
    x: Tensor,
    rotary: tuple[Tensor, ...] | None,
    places: Tensor,
    seen: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """`[B, T, hidden]` to what its output projection takes."""
    heads = (*x.shape[:2], -1, attention.head_dim)
    parts = (
        attention.qkv_proj(x).chunk(3, -1)
        if attention.fused
        else (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    )
    query, key, value = (part.reshape(heads).transpose(1, 2) for part in parts)
    if rotary is not None:
        query, key = _rotated(query, *rotary), _rotated(key, *rotary)
    keys.index_copy_(2, places, key.to(keys.dtype))
    values.index_copy_(2, places, value.to(values.dtype))
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    mixed = F.scaled_dot_product_attention(
        query, keys.to(query.dtype), values.to(query.dtype), attn_mask=seen
    )
    return mixed.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
