"""LLaMA and GPT as a graph takes them: the KV cache goes in and comes out, positions and padding are inputs.

The names are those that exported language models commonly have (`input_ids`, `attention_mask`, `position_ids`,
`past_key_values.0.key`, `present.0.key`, ..., `logits`). A batch is padded on the left: mask 0 and any position. Each
row then gives what it gives alone, up to the summation of attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bellbox.models import GPT, Llama


class Decoder(nn.Module):
    """One step of a language model over any number of new tokens.

    Args:
        model: whose layers are used as they are.
    """

    def __init__(self, model: Llama | GPT) -> None:
        super().__init__()
        self.model = model
        self.is_llama = isinstance(model, Llama)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits, and the cache with the new tokens.

        Args:
            input_ids: int64 `[B, T]`.
            attention_mask: int64 `[B, P + T]`, 1 for tokens and 0 for padding, those in the cache first.
            position_ids: int64 `[B, T]`.
            past_key_values: for each block `[B, key-value heads, P, head_dim]` twice; P may be 0.

        Returns:
            fp32 `[B, T, vocabulary]`, and the cache with P + T tokens.
        """
        model, exact = self.model, self.model.exact_attention
        tokens, held = input_ids.shape[1], past_key_values[0][0].shape[2]
        keys = torch.arange(held + tokens, device=input_ids.device)
        not_later = keys[None, :] <= keys[held:, None]
        mask = (not_later[None] & (attention_mask != 0)[:, None, :])[:, None, None]
        body: Any = model.model if isinstance(model, Llama) else model.transformer
        if isinstance(model, Llama):
            x, rotary = body.embed_tokens(input_ids), body.rotary_emb
            blocks, last = body.layers, body.norm
            tables = rotary.cos[position_ids][:, None], rotary.sin[position_ids][:, None]
        else:
            x, tables = body.wte(input_ids) + body.wpe(position_ids), None
            blocks, last = body.h, body.ln_f
        present = []
        for block, past in zip(blocks, past_key_values, strict=True):
            norms = (
                (block.input_layernorm, block.post_attention_layernorm)
                if self.is_llama
                else (block.ln_1, block.ln_2)
            )
            attention = block.self_attn if self.is_llama else block.attn
            mixed, kept = _attend(attention, norms[0](x), tables, past, mask, exact)
            x = x + (attention.o_proj if self.is_llama else attention.c_proj)(mixed)
            x = x + block.mlp(norms[1](x), exact)
            present.append(kept)
        return model.lm_head(last(x)), present


def _attend(
    attention: Any,
    x: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    past: tuple[Tensor, Tensor],
    mask: Tensor,
    exact: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `models.attention.causal_attention` gives, with a mask for each sequence."""
    batch, tokens, width = x.shape[0], x.shape[1], attention.head_dim
    query, key, value = (
        attention.qkv_proj(x).chunk(3, -1)
        if attention.fused
        else (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    )
    query, key, value = (
        part.reshape(batch, tokens, -1, width).transpose(1, 2) for part in (query, key, value)
    )
    if tables is not None:
        query, key = _rotate(query, *tables), _rotate(key, *tables)
    key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
    heads = key.shape[1]
    grouped = query.reshape(batch, heads, query.shape[1] // heads, tokens, width)
    wide = torch.float64 if exact else torch.float32
    scores = (grouped.to(wide) @ key.to(wide).transpose(-1, -2).unsqueeze(2)) * width**-0.5
    scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    mixed = (scores.softmax(-1) @ value.to(wide).unsqueeze(2)).to(x.dtype)
    return mixed.reshape(batch, -1, tokens, width).transpose(1, 2).flatten(2), (key, value)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`RotaryEmbedding.forward` with the positions of each sequence."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def example(model: Llama | GPT) -> tuple[Any, ...]:
    """Arguments of one forward: two sequences, three tokens after two."""
    config = model.config
    shape = 2, config.key_value_heads, 2, config.head_size
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    ids = torch.ones(2, 3, dtype=torch.int64)
    return ids, torch.ones(2, 5, dtype=torch.int64), torch.tensor([[2, 3, 4]] * 2), past


def names(blocks: int) -> tuple[list[str], list[str], Any]:
    """Names of inputs and outputs, and the axes of the inputs that have any length."""
    past = [f"past_key_values.{i}.{kind}" for i in range(blocks) for kind in ("key", "value")]
    present = [f"present.{i}.{kind}" for i in range(blocks) for kind in ("key", "value")]
    axes = {0: "batch", 2: "past"}
    shapes = (
        {0: "batch", 1: "sequence"},
        {0: "batch", 1: "past_and_sequence"},
        {0: "batch", 1: "sequence"},
        [(dict(axes), dict(axes)) for _ in range(blocks)],
    )
    inputs = ["input_ids", "attention_mask", "position_ids", *past]
    return inputs, ["logits", *present], shapes
