"""Decode steps of packed models of transformers in two or three calls a block, over the caches of `generate`.

The calls are those of `inference.decoding`: the same kernels in the same order as the layers called one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from bellbox.interop.transformers.rows import split
from bellbox.nn import PackedTransposed
from bellbox.nn.compact import CompactEmbedding
from bellbox.nn.packed_linear import bound_groups
from bellbox.ops.attend import CacheLayer
from bellbox.ops.decoder_block import gpt_block, llama_block
from bellbox.ops.rms_norm import rms_norm

_TABLES = ("default", "linear", "llama3", "yarn")
"""Rotary positions that are a table, whatever the length of the text."""


class Steps(ABC):
    """Steps of one token a sequence; weights are those of the moment that they were made. Made by `steps_for`.

    Args:
        model: of transformers.
        cache: of transformers, empty.
        calls: the model's blocks, as `ops.decoder_block` binds them.
        batch: sequences.
        room: tokens that the cache must hold.
    """

    def __init__(self, model: Any, cache: Any, calls: Sequence[Any], batch: int, room: int) -> None:
        self._model, self._cache, self._calls, self._batch = model, cache, calls, batch
        self._room, self._length = room, 0
        self._layers: list[CacheLayer] = []

    @staticmethod
    @abstractmethod
    def body(model: Any) -> Any:
        """The module with embeddings, blocks and the last norm."""

    @staticmethod
    @abstractmethod
    def blocks(model: Any) -> Any:
        """The blocks."""

    @staticmethod
    @abstractmethod
    def call_of(block: Any) -> Any:
        """A block as `ops.decoder_block` binds it; None where it is not packed throughout, or computes otherwise."""

    @staticmethod
    @abstractmethod
    def is_usual(model: Any) -> bool:
        """Whether nothing in the configuration asks for another function."""

    @abstractmethod
    def _logits(self, tokens: Tensor, threads: int) -> Tensor:
        """`[B, 1, vocabulary]`."""

    def prompt(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, vocabulary]` after a prompt `[B, T]`, which goes through transformers' modules."""
        seen: Any = DynamicCache(config=self._model.config)
        found = self._model(
            input_ids=input_ids, past_key_values=seen, use_cache=True, logits_to_keep=1, return_dict=True
        )
        self._length = input_ids.shape[1]
        for index, layer in enumerate(seen.layers):
            self._take(index, layer.keys, layer.values)
        return found.logits[:, -1]

    def _take(self, index: int, keys: Tensor, values: Tensor) -> None:
        """What a prompt left, in tensors that have room for the rest: those of a static cache, or new ones."""
        if type(self._cache) is StaticCache:
            held = self._cache.update(keys, values, index)
        else:
            shape = (*keys.shape[:2], self._room, keys.shape[3])
            held = keys.new_empty(shape), values.new_empty(shape)
            for into, new in zip(held, (keys, values), strict=True):
                into[:, :, : self._length] = new
        self._layers.append(CacheLayer(*held))

    def step(self, tokens: Tensor) -> Tensor:
        """Logits `[B, vocabulary]` after one more token of each sequence, `[B, 1]`."""
        logits = self._logits(tokens, torch.get_num_threads())[:, -1]
        self._length += 1
        return logits

    def _places(self, layer: CacheLayer) -> tuple[Any, ...]:
        return *layer, layer.keys.shape[2], self._length

    def finish(self, prompt: int) -> None:
        """Have the cache say what it holds."""
        held: list[Any] = self._cache.layers
        for index, layer in enumerate(self._layers):
            if type(self._cache) is StaticCache:
                held[index].cumulative_length.add_(self._length - prompt)
            else:
                keys, values = layer.keys[:, :, : self._length], layer.values[:, :, : self._length]
                self._cache.update(keys, values, index)


class LlamaSteps(Steps):
    """Of a LLaMA: a block is one call before the SiLU and one after it."""

    def __init__(self, model: Any, cache: Any, calls: Sequence[Any], batch: int, room: int) -> None:
        super().__init__(model, cache, calls, batch, room)
        self._gate, self._up = torch.empty(2, batch, 1, model.config.intermediate_size).unbind()
        cos, sin = model.model.rotary_emb(torch.empty(1, room, 1), torch.arange(room)[None])
        half = cos.shape[-1] // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    @staticmethod
    def body(model: Any) -> Any:
        """See `Steps`."""
        return model.model

    @staticmethod
    def blocks(model: Any) -> Any:
        """See `Steps`."""
        return model.model.layers

    @staticmethod
    def is_usual(model: Any) -> bool:
        """See `Steps`."""
        config = model.config
        window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        known = getattr(model.model.rotary_emb, "rope_type", None) in _TABLES
        return not window and known and config.hidden_act in ("silu", "swish")

    @staticmethod
    def call_of(block: Any) -> Any:
        """See `Steps`."""
        attention, mlp = block.self_attn, block.mlp
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        calls = bound_groups((qkv, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)))
        norms = block.input_layernorm, block.post_attention_layernorm
        eps = {norm.variance_epsilon for norm in norms}
        if calls is None or len(eps) > 1 or attention.scaling != attention.head_dim**-0.5:
            return None
        return llama_block(calls, attention.head_dim, [norm.weight for norm in norms], eps.pop())

    def _logits(self, tokens: Tensor, threads: int) -> Tensor:
        body, gate, up, batch = self._model.model, self._gate, self._up, self._batch
        x = body.embed_tokens(tokens).contiguous()
        for call, layer in zip(self._calls, self._layers, strict=True):
            call.attend_and_widen(x, batch, self._cos, self._sin, *self._places(layer), gate, up, threads)
            F.silu(gate, inplace=True)
            call.narrow(x, gate, up, batch, threads)
        return self._model.lm_head(rms_norm(x, body.norm.weight, body.norm.variance_epsilon))


class _PlainBlocks(Steps):
    """Of a GPT-2 or an OPT: norms and activation are the model's own, so that a block is three calls between them."""

    inner: ClassVar[str]
    """Field of the configuration: width between the two layers of the MLP."""

    def __init__(self, model: Any, cache: Any, calls: Sequence[Any], batch: int, room: int) -> None:
        super().__init__(model, cache, calls, batch, room)
        self._parts = [self.parts_of(block) for block in self.blocks(model)]
        inner = getattr(model.config, self.inner) or 4 * model.config.hidden_size
        self._wide = torch.empty(batch, 1, inner)

    @staticmethod
    @abstractmethod
    def parts_of(block: Any) -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
        """Norm before attention, norm before the MLP, and the activation."""

    @abstractmethod
    def _embedded(self, tokens: Tensor) -> Tensor:
        """Tokens at the present position, `[B, 1, hidden]`."""

    @abstractmethod
    def _normed(self, x: Tensor) -> Tensor:
        """The last norm."""

    def _logits(self, tokens: Tensor, threads: int) -> Tensor:
        x, wide, batch = self._embedded(tokens).contiguous(), self._wide, self._batch
        for call, (first, second, act), layer in zip(self._calls, self._parts, self._layers, strict=True):
            call.attention(x, first(x), batch, *self._places(layer), threads)
            call.widen(second(x), batch, wide, threads)
            call.narrow(x, act(wide).contiguous(), batch, threads)
        return self._model.lm_head(self._normed(x))


class GPT2Steps(_PlainBlocks):
    """Of a GPT-2, whose q, k and v are one layer."""

    inner = "n_inner"

    @staticmethod
    def body(model: Any) -> Any:
        """See `Steps`."""
        return model.transformer

    @staticmethod
    def blocks(model: Any) -> Any:
        """See `Steps`."""
        return model.transformer.h

    @staticmethod
    def is_usual(model: Any) -> bool:
        """See `Steps`."""
        config = model.config
        other = (
            config.scale_attn_by_inverse_layer_idx,
            config.reorder_and_upcast_attn,
            config.add_cross_attention,
        )
        return config.scale_attn_weights and not any(other)

    @staticmethod
    def call_of(block: Any) -> Any:
        """See `Steps`."""
        attention, mlp = block.attn, block.mlp
        qkv = _three(attention.c_attn)
        calls = None if qkv is None else bound_groups((qkv, (attention.c_proj,), (mlp.c_fc,), (mlp.c_proj,)))
        return None if calls is None else gpt_block(calls, attention.head_dim)

    @staticmethod
    def parts_of(block: Any) -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
        """See `_PlainBlocks`."""
        return block.ln_1, block.ln_2, block.mlp.act

    def _embedded(self, tokens: Tensor) -> Tensor:
        body = self._model.transformer
        return body.wte(tokens) + body.wpe(torch.tensor([self._length]))

    def _normed(self, x: Tensor) -> Tensor:
        return self._model.transformer.ln_f(x)


class OPTSteps(_PlainBlocks):
    """Of an OPT."""

    inner = "ffn_dim"

    @staticmethod
    def body(model: Any) -> Any:
        """See `Steps`."""
        return model.model.decoder

    @staticmethod
    def blocks(model: Any) -> Any:
        """See `Steps`."""
        return model.model.decoder.layers

    @staticmethod
    def is_usual(model: Any) -> bool:
        """See `Steps`."""
        body = model.model.decoder
        return (
            model.config.do_layer_norm_before
            and body.project_in is None
            and body.final_layer_norm is not None
        )

    @staticmethod
    def call_of(block: Any) -> Any:
        """See `Steps`."""
        attention = block.self_attn
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        calls = bound_groups((qkv, (attention.out_proj,), (block.fc1,), (block.fc2,)))
        return None if calls is None else gpt_block(calls, attention.head_dim)

    @staticmethod
    def parts_of(block: Any) -> tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]:
        """See `_PlainBlocks`."""
        return block.self_attn_layer_norm, block.final_layer_norm, block.activation_fn

    def _embedded(self, tokens: Tensor) -> Tensor:
        body = self._model.model.decoder
        return (
            body.embed_tokens(tokens)
            + body.embed_positions.weight[self._length + body.embed_positions.offset]
        )

    def _normed(self, x: Tensor) -> Tensor:
        return self._model.model.decoder.final_layer_norm(x)


FAMILIES: dict[str, type[Steps]] = {
    "LlamaForCausalLM": LlamaSteps,
    "MistralForCausalLM": LlamaSteps,
    "Qwen2ForCausalLM": LlamaSteps,
    "GPT2LMHeadModel": GPT2Steps,
    "OPTForCausalLM": OPTSteps,
}
"""Steps by the name of the class; Mistral and Qwen 2 have the blocks of a LLaMA."""


def steps_for(model: Any, cache: Any, batch: int, room: int) -> Steps | None:
    """Steps for a model and an empty cache; None where a block is not packed throughout, or the model is not plain.

    Args:
        model: of a class in `FAMILIES`.
        cache: a static or a dynamic one.
        batch: sequences.
        room: most tokens of a text.
    """
    kind = FAMILIES[type(model).__name__]
    layers: list[Any] = cache.layers
    if type(cache) is StaticCache and any(each.max_cache_len < room - 1 for each in layers):
        return None
    if not (kind.is_usual(model) and _is_plain(model, kind.body(model))):
        return None
    calls = [kind.call_of(block) for block in kind.blocks(model)]
    return None if any(call is None for call in calls) else kind(model, cache, calls, batch, room)


def _is_plain(model: Any, body: Any) -> bool:
    """Whether a model computes what its class says, in fp32 on the CPU, but for its packed layers."""
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()):
        return False
    table = model.get_input_embeddings()
    if not isinstance(table, CompactEmbedding) and type(table) is not nn.Embedding:
        return False
    return all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in body.parameters())


class _Kept:
    """What was made of a layer, beside it; a copy of the layer makes its own."""

    def __init__(self, state: Any = None, parts: tuple[Any, ...] = ()) -> None:
        self.state, self.parts = state, parts

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> Any:
        """Nothing of it is stored."""
        return _Kept, ()


def _three(layer: Any) -> tuple[Any, ...] | None:
    """q, k and v of a packed layer of all three, else None; made once, and again where its tensors have changed."""
    if not isinstance(layer, PackedTransposed):
        return None
    state = [(id(each), each._version) for each in layer._buffers.values() if each is not None]
    held = layer.__dict__.get("_in_three")
    if held is None or held.state != state:
        held = _Kept(state, tuple(split(layer, [layer.row_count // 3] * 3)))
        object.__setattr__(layer, "_in_three", held)
    return held.parts
