"""The decode step of a packed model in two or three calls a block, where nothing else is asked of its layers.

One token through a small model is a millisecond of kernels and, layer by layer, as much again of Python. `generate`
takes this way where it can; it runs the same kernels in the same order as the layers do, so the logits are the same to
the last bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.models import GPT, KVCache, Llama
from bellbox.models.attention import tanh_gelu
from bellbox.models.gpt import GPTBlock
from bellbox.models.llama import LlamaBlock
from bellbox.nn import PackedLinear
from bellbox.nn.compact import CompactEmbedding
from bellbox.ops import native

Group = tuple[nn.Module, ...]


class Steps(ABC):
    """Steps of one token a sequence with one cache. Make it by `steps_for`; weights are those of that moment.

    Args:
        cache: made by the model.
        layers: of each block the layers that read the same input: q, k and v; output; MLP's first; MLP's last.
    """

    def __init__(self, cache: KVCache, layers: Sequence[Sequence[Group]]) -> None:
        self._cache = cache
        self._kept: list[native.Siblings] = []  # the compiled blocks hold addresses only
        self._siblings = [[self._compile(group) for group in block] for block in layers]

    def _compile(self, layers: Group) -> Any:
        ready = [layer.prepack() for layer in layers if isinstance(layer, PackedLinear)]
        weights, scales = [each.weights for each in ready], [each.act_scale for each in ready]
        self._kept.append(native.Siblings(ready[0].coding, weights, scales))
        return self._kept[-1].handle

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

    @abstractmethod
    def _logits(self, input_ids: Tensor, start: int, threads: int) -> Tensor:
        """Those after the token at position `start`, whose keys and values go into the cache."""


class LlamaSteps(Steps):
    """Of a LLaMA: a block is one call before the SiLU and one after it."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        blocks = _llama_blocks(model)
        super().__init__(cache, [_llama_layers(block) for block in blocks])
        self._model = model
        inner = model.config.intermediate_size
        self._gate, self._up = torch.empty(2, cache.batch, 1, inner).unbind()
        module = native.compiled()
        assert module is not None
        self._blocks = []
        for block, groups in zip(blocks, self._siblings, strict=True):
            norms = block.input_layernorm, block.post_attention_layernorm
            weights = [norm.weight.data_ptr() for norm in norms]
            self._blocks.append(module.LlamaBlock(*groups, block.self_attn.head_dim, *weights, norms[0].eps))

    def _logits(self, input_ids: Tensor, start: int, threads: int) -> Tensor:
        model, cache, gate, up = self._model, self._cache, self._gate, self._up
        rotary = model.model.rotary_emb
        offset = start * (rotary.head_dim // 2) * 4
        turn = rotary.cos.data_ptr() + offset, rotary.sin.data_ptr() + offset
        x = model.model.embed_tokens(input_ids).contiguous()
        size, pointers = (cache.batch, x.shape[2]), (gate.data_ptr(), up.data_ptr())
        for block, keys, values in zip(self._blocks, cache.keys, cache.values, strict=True):
            places = keys.data_ptr(), values.data_ptr(), cache.max_length, start
            block.attend_and_widen(x.data_ptr(), *size, *turn, *places, *pointers, threads)
            F.silu(gate, inplace=True).mul_(up)
            block.narrow(x.data_ptr(), pointers[0], cache.batch, threads)
        return model.lm_head(model.model.norm(x))


class GPTSteps(Steps):
    """Of a GPT: its layer norms are torch's, so that a block is three calls between them."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self._model, self._plain_blocks = model, _gpt_blocks(model)
        super().__init__(cache, [_gpt_layers(block) for block in self._plain_blocks])
        self._wide = torch.empty(cache.batch, 1, model.config.intermediate_size)
        module = native.compiled()
        assert module is not None
        self._blocks = [module.Block(*groups, model.config.head_size) for groups in self._siblings]

    def _logits(self, input_ids: Tensor, start: int, threads: int) -> Tensor:
        body, cache, wide = self._model.transformer, self._cache, self._wide
        x = body.wte(input_ids) + body.wpe(torch.tensor([start]))
        for layer, (block, call) in enumerate(zip(self._plain_blocks, self._blocks, strict=True)):
            places = cache.keys[layer].data_ptr(), cache.values[layer].data_ptr(), cache.max_length, start
            normed = block.ln_1(x)
            call.attention(x.data_ptr(), normed.data_ptr(), cache.batch, *places, threads)
            normed = block.ln_2(x)
            call.widen(normed.data_ptr(), cache.batch, wide.data_ptr(), threads)
            active = wide.relu() if block.mlp.relu else tanh_gelu(wide, exact=False)
            call.narrow(x.data_ptr(), active.data_ptr(), cache.batch, threads)
        return self._model.lm_head(body.ln_f(x))


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

    There is one for a LLaMA or GPT on the CPU whose blocks are packed throughout, siblings sharing their input, without
    hooks, without autocast and without `exact_attention`, in fp32 but for its packed layers, compact embeddings (they
    give fp32) and the head.
    """
    if not isinstance(cache, KVCache):
        return None
    if type(model) is Llama:
        embeddings = [model.model.embed_tokens]
        served = _plain(model, cache, model.model.layers, embeddings) and _packed(
            map(_llama_layers, _llama_blocks(model))
        )
        return LlamaSteps(model, cache) if served else None
    if type(model) is GPT:
        embeddings = [model.transformer.wte, model.transformer.wpe]
        served = _plain(model, cache, model.transformer.h, embeddings) and _packed(
            map(_gpt_layers, _gpt_blocks(model))
        )
        return GPTSteps(model, cache) if served else None
    return None


def _plain(model: Llama | GPT, cache: KVCache, blocks: nn.Module, embeddings: Sequence[nn.Module]) -> bool:
    if model.exact_attention or torch.is_autocast_enabled("cpu") or not native.available():
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return False
    tables = [p for each in embeddings if not isinstance(each, CompactEmbedding) for p in each.parameters()]
    tensors = (*cache.keys, *cache.values, *blocks.parameters(), *tables)
    return all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _packed(blocks: Iterable[list[Group]]) -> bool:
    return all(_served(group) for block in blocks for group in block)


def _served(layers: Group) -> bool:
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    return len(packed) == len(layers) and all(
        layer.compiled
        and layer.act_signs is None
        and layer.weight_packed.is_cpu
        and layer.coding == packed[0].coding
        and layer.shared is packed[0].shared
        for layer in packed
    )
