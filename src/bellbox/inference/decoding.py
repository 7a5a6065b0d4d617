"""The decode step of a packed model in two or three calls a block, where nothing else is asked of its layers.

One token through a small model is a millisecond of kernels and, layer by layer, as much again of Python. `generate`
takes this way where it can; it runs the same kernels in the same order as the layers do, so the logits are the same to
the last bit.

Sequences that are decoded together get the very numbers that each would get alone: packed layers, norms, attention and
activations are a row's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.models import GPT, KVCache, Llama, SlotCache
from bellbox.models.gpt import GPTBlock
from bellbox.models.head import has_rows_of_its_own, next_logits
from bellbox.models.llama import LlamaBlock
from bellbox.nn import PackedLinear
from bellbox.nn.compact import CompactEmbedding, CompactLinear
from bellbox.nn.packed_linear import bound_groups
from bellbox.ops.decoder_block import gpt_block, head, last_norm, llama_block

Group = tuple[nn.Module, ...]


class Steps(ABC):
    """Steps of one token a sequence with one cache. Make it by `steps_for`; weights are those of that moment.

    Args:
        cache: made by the model.
        blocks: the model's, as `ops.decoder_block` binds them.
        head: the model's.
    """

    def __init__(self, cache: KVCache, blocks: Sequence[Any], head: nn.Module) -> None:
        self._cache, self._blocks, self._head, self._bound_head = cache, blocks, head, bound_head(head)

    @torch.no_grad()
    def step(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, 1, vocab_size]` after one more token of each sequence, `[B, 1]` int64.

        Raises:
            BellboxError: the cache is full or for another batch.
        """
        self._cache.check_room(*input_ids.shape)
        logits = self._logits(input_ids, self._cache.length, torch.get_num_threads())
        self._cache.advance(1)
        return logits

    @torch.no_grad()
    def step_slots(self, cache: SlotCache, slots: Sequence[int], input_ids: Tensor) -> Tensor:
        """Logits `[n, 1, vocab_size]` after one more token, `[n, 1]` int64, of the sequences in these slots.

        Args:
            cache: around the cache that these steps were made for.
            slots: of different sequences.
            input_ids: their tokens, in the order of `slots`.

        Raises:
            BellboxError: a slot twice, unknown or full.
        """
        assert cache.store is self._cache
        cache.check_room(slots)
        logits = self._logits(input_ids, cache.places(slots), torch.get_num_threads())
        cache.advance(slots)
        return logits

    def _logits_of(self, x: Tensor) -> Tensor:
        """What the head makes of `[n, 1, hidden]`."""
        return _each_alone(self._head, x) if self._bound_head is None else self._bound_head(x)

    @abstractmethod
    def _logits(self, input_ids: Tensor, start: int | Tensor, threads: int) -> Tensor:
        """Those after the token at position `start`, whose keys and values go into the cache.

        Args:
            input_ids: `[n, 1]`.
            start: of each sequence; or int64 `[n, 2]`, slot of the cache and position of each.
            threads: of the kernels.
        """


class LlamaSteps(Steps):
    """Of a LLaMA: a block is two calls."""

    def __init__(self, model: Llama, cache: KVCache, blocks: Sequence[Any]) -> None:
        super().__init__(cache, blocks, model.lm_head)
        self._model = model
        inner = model.config.intermediate_size
        self._gate, self._up = torch.empty(2, cache.batch, 1, inner).unbind()
        norm = model.model.norm
        self._norm: Callable[[Tensor], Tensor] = last_norm(norm.weight, norm.eps) or norm

    def _logits(self, input_ids: Tensor, start: int | Tensor, threads: int) -> Tensor:
        model, cache, batch = self._model, self._cache, len(input_ids)
        gate, up = self._gate[:batch], self._up[:batch]
        rotary = model.model.rotary_emb
        x = model.model.embed_tokens(input_ids).contiguous()
        for layer, block in enumerate(self._blocks):
            places = *cache.layer(layer), cache.max_length, start
            block.attend_and_widen(x, batch, rotary.cos, rotary.sin, *places, gate, up, threads)
            block.narrow_gated(x, gate, up, batch, threads)
        return self._logits_of(self._norm(x))


class GPTSteps(Steps):
    """Of a GPT: a block is three calls, its norms and its activation between them."""

    def __init__(self, model: GPT, cache: KVCache, blocks: Sequence[Any]) -> None:
        super().__init__(cache, blocks, model.lm_head)
        self._model, self._plain_blocks = model, _gpt_blocks(model)
        self._wide = torch.empty(cache.batch, 1, model.config.intermediate_size)

    def _logits(self, input_ids: Tensor, start: int | Tensor, threads: int) -> Tensor:
        body, cache, batch = self._model.transformer, self._cache, len(input_ids)
        wide = self._wide[:batch]
        positions = start[:, 1:] if isinstance(start, Tensor) else torch.tensor([start])
        x = body.wte(input_ids) + body.wpe(positions)
        for layer, (block, call) in enumerate(zip(self._plain_blocks, self._blocks, strict=True)):
            places = *cache.layer(layer), cache.max_length, start
            call.attention(x, block.ln_1(x), batch, *places, threads)
            call.widen(block.ln_2(x), batch, wide, threads)
            call.narrow(x, block.mlp.activate(wide, exact=False), batch, threads)
        return self._logits_of(body.ln_f(x))


def bound_head(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The kernel of a rounded head itself, whose sums are exact, where nothing is added to its product."""
    if not isinstance(layer, CompactLinear) or layer.coding is None or layer.bias is not None:
        return None
    return head(layer.codes())


def _each_alone(layer: nn.Module, x: Tensor) -> Tensor:
    """Logits of `[n, 1, hidden]`, each sequence's as it would get them alone."""
    exact = (isinstance(layer, CompactLinear) and layer.coding is not None) or isinstance(layer, PackedLinear)
    if len(x) == 1 or exact or has_rows_of_its_own(layer):
        return next_logits(layer, x)
    return torch.cat([layer(row) for row in x.split(1)])


def _llama_blocks(model: Llama) -> list[LlamaBlock]:
    return [block for block in model.model.layers if isinstance(block, LlamaBlock)]


def _llama_layers(block: LlamaBlock) -> list[Group]:
    attention, mlp = block.self_attn, block.mlp
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    return [qkv, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]


def _gpt_blocks(model: GPT) -> list[GPTBlock]:
    return [block for block in model.transformer.h if isinstance(block, GPTBlock)]


def _gpt_layers(block: GPTBlock) -> list[Group]:
    attention, mlp = block.attn, block.mlp
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    return [qkv, (attention.c_proj,), (mlp.c_fc,), (mlp.c_proj,)]


def steps_for(model: nn.Module, cache: object) -> Steps | None:
    """The short way for this model and this cache; None where there is none.

    There is one for a LLaMA or GPT on the CPU whose blocks are packed throughout, layers sharing their input, without
    hooks, without autocast and without `exact_attention`, with q, k and v as three layers, in fp32 but for its packed
    layers, compact embeddings (they give fp32) and the head.
    """
    if not isinstance(cache, KVCache) or (isinstance(model, Llama | GPT) and model.config.fused_qkv):
        return None
    if type(model) is Llama:
        if not _plain(model, cache, model.model.layers, [model.model.embed_tokens]):
            return None
        llama = [_llama_block(block) for block in _llama_blocks(model)]
        return LlamaSteps(model, cache, llama) if all(each is not None for each in llama) else None
    if type(model) is GPT:
        if not _plain(model, cache, model.transformer.h, [model.transformer.wte, model.transformer.wpe]):
            return None
        gpt = [_gpt_block(block, model.config.head_size) for block in _gpt_blocks(model)]
        return GPTSteps(model, cache, gpt) if all(each is not None for each in gpt) else None
    return None


def _llama_block(block: LlamaBlock) -> Any:
    layers = bound_groups(_llama_layers(block))
    norms = block.input_layernorm, block.post_attention_layernorm
    if layers is None:
        return None
    return llama_block(layers, block.self_attn.head_dim, [norm.weight for norm in norms], norms[0].eps)


def _gpt_block(block: GPTBlock, head_dim: int) -> Any:
    layers = bound_groups(_gpt_layers(block))
    return None if layers is None else gpt_block(layers, head_dim)


def _plain(model: Llama | GPT, cache: KVCache, blocks: nn.Module, embeddings: Sequence[nn.Module]) -> bool:
    if model.exact_attention or torch.is_autocast_enabled("cpu"):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    tables = [p for each in embeddings if not isinstance(each, CompactEmbedding) for p in each.parameters()]
    tensors = (*blocks.parameters(), *tables)
    if not all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        return False
    return all(cache.layer(layer).is_direct() for layer in range(len(cache.keys)))
