"""The decode step of a packed LLaMA in two calls a block, where nothing else is asked of its layers.

One token through a small model is a millisecond of kernels and, layer by layer, as much again of Python. `generate`
takes this way where it can; it runs the same kernels in the same order as the layers do, so the logits are the same to
the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.kernels import native
from bellbox.models import KVCache, Llama
from bellbox.models.llama import LlamaBlock
from bellbox.nn import PackedLinear
from bellbox.nn.prepacked import Prepacked


class LlamaSteps:
    """Steps of one token a sequence with one cache. Make it by `steps_for`; weights are those of that moment.

    Args:
        model: what `steps_for` has checked.
        cache: made by the model.
    """

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        inner = model.config.intermediate_size
        self._gate, self._up = torch.empty(2, cache.batch, 1, inner).unbind()
        self._kept: list[Prepacked] = []  # the compiled blocks hold addresses only
        self._blocks = [self._compile(block) for block in _blocks(model)]

    def _compile(self, block: LlamaBlock) -> Any:
        module = native.compiled()
        assert module is not None
        attention, mlp = block.self_attn, block.mlp
        groups = [
            self._siblings(module, layers)
            for layers in (
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            )
        ]
        norms = block.input_layernorm, block.post_attention_layernorm
        return module.LlamaBlock(
            *groups, *(norm.weight.data_ptr() for norm in norms), norms[0].eps, attention.head_dim
        )

    def _siblings(self, module: Any, layers: Sequence[nn.Module]) -> Any:
        ready = [layer.prepack() for layer in layers if isinstance(layer, PackedLinear)]
        self._kept += ready
        weights, scales = [each.weights.handle for each in ready], [each.act_scale for each in ready]
        return module.Siblings(ready[0].coding.handle, weights, scales)

    @torch.no_grad()
    def step(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, 1, vocab_size]` after one more token of each sequence, `[B, 1]` int64.

        Raises:
            BellboxError: the cache is full or for another batch.
        """
        model, cache, gate, up = self._model, self._cache, self._gate, self._up
        cache.check_room(*input_ids.shape)
        start, batch, threads = cache.length, cache.batch, torch.get_num_threads()
        rotary = model.model.rotary_emb
        offset = start * (rotary.head_dim // 2) * 4
        turn = rotary.cos.data_ptr() + offset, rotary.sin.data_ptr() + offset
        x = model.model.embed_tokens(input_ids).contiguous()
        pointers = gate.data_ptr(), up.data_ptr()
        for block, keys, values in zip(self._blocks, cache.keys, cache.values, strict=True):
            places = keys.data_ptr(), values.data_ptr()
            block.attention(x.data_ptr(), batch, *turn, *places, cache.max_length, start, *pointers, threads)
            F.silu(gate, inplace=True).mul_(up)
            block.mlp(x.data_ptr(), pointers[0], batch, threads)
        logits = model.lm_head(model.model.norm(x))
        cache.advance(1)
        return logits


def _blocks(model: Llama) -> list[LlamaBlock]:
    return [block for block in model.model.layers if isinstance(block, LlamaBlock)]


def steps_for(model: nn.Module, cache: object) -> LlamaSteps | None:
    """The short way for this model and this cache; None where there is none.

    There is one for a LLaMA on the CPU whose blocks are packed throughout, siblings sharing their input, without hooks,
    without autocast and without `exact_attention`, in fp32 but for its packed layers, embedding and head.
    """
    if type(model) is not Llama or not isinstance(cache, KVCache) or model.exact_attention:
        return None
    if torch.is_autocast_enabled("cpu") or not native.available():
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return None
    tensors = (*cache.keys, *cache.values, *(p for p in model.model.layers.parameters()))
    if not all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        return None
    for block in _blocks(model):
        attention, mlp = block.self_attn, block.mlp
        siblings = (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
            (attention.o_proj,),
            (mlp.down_proj,),
        )
        if not all(map(_served, siblings)):
            return None
    return LlamaSteps(model, cache)


def _served(layers: Sequence[nn.Module]) -> bool:
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    return len(packed) == len(layers) and all(
        layer.compiled
        and layer.act_signs is None
        and layer.weight_packed.is_cpu
        and layer.coding == packed[0].coding
        and layer.shared is packed[0].shared
        for layer in packed
    )
