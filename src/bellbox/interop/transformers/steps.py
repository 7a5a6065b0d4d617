"""Decode steps of packed models of transformers in two or three calls a block, over the caches of `generate`.

The calls are those of `inference.decoding`: the same kernels in the same order as the layers called one by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from bellbox.inference.decoding import bound_head
from bellbox.nn import PackedLinear, PackedTransposed
from bellbox.nn.compact import CompactEmbedding
from bellbox.nn.packed_linear import bound_groups
from bellbox.nn.rows import split
from bellbox.ops import native
from bellbox.ops.attend import CacheLayer, attend
from bellbox.ops.decoder_block import gpt_block, last_norm, llama_block
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
        self._head: Callable[[Tensor], Tensor] = bound_head(model.lm_head) or model.lm_head

    @staticmethod
    @abstractmethod
    def body(model: Any) -> Any:
        """The module with embeddings, blocks and the last norm."""

    @staticmethod
    @abstractmethod
    def blocks(model: Any) -> Any:
        """The blocks."""

    @classmethod
    @abstractmethod
    def call_of(cls, block: Any) -> Any:
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
        self._acts: list[Callable[[Tensor], Tensor]] = [
            _activation(block.mlp) for block in self.blocks(model)
        ]
        self._gate, self._up = torch.empty(2, batch, 1, model.config.intermediate_size).unbind()
        cos, sin = model.model.rotary_emb(torch.empty(1, room, 1), torch.arange(room)[None])
        half = cos.shape[-1] // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        norm = model.model.norm
        gains, eps = norm.weight, norm.variance_epsilon
        self._norm: Callable[[Tensor], Tensor] = last_norm(gains, eps) or partial(
            rms_norm, weight=gains, eps=eps
        )

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
        whole = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) == 1.0
        return not window and known and whole and config.hidden_act in ("silu", "swish")

    @staticmethod
    def groups_of(block: Any) -> tuple[tuple[Any, ...], ...] | None:
        """The layers of a block that read one input, in four groups; None where it has others."""
        attention, mlp = block.self_attn, block.mlp
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        return qkv, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)

    @classmethod
    def call_of(cls, block: Any) -> Any:
        """See `Steps`."""
        attention, groups = block.self_attn, cls.groups_of(block)
        calls = None if groups is None else bound_groups(groups)
        norms = block.input_layernorm, block.post_attention_layernorm
        eps = {norm.variance_epsilon for norm in norms}
        if calls is None or len(eps) > 1 or attention.scaling != attention.head_dim**-0.5:
            return None
        return llama_block(calls, attention.head_dim, [norm.weight for norm in norms], eps.pop())

    def _logits(self, tokens: Tensor, threads: int) -> Tensor:
        body, gate, up, batch = self._model.model, self._gate, self._up, self._batch
        x = body.embed_tokens(tokens).contiguous()
        for call, act, layer in zip(self._calls, self._acts, self._layers, strict=True):
            call.attend_and_widen(x, batch, self._cos, self._sin, *self._places(layer), gate, up, threads)
            call.narrow(x, act(gate), up, batch, threads)
        return self._head(self._norm(x))


def _activation(mlp: Any) -> Callable[[Tensor], Tensor]:
    """The module of an MLP that stands between its layers."""
    return mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn


class Phi3Steps(LlamaSteps):
    """Of a Phi 3: a LLaMA whose q, k and v are one layer, and gate and up as well."""

    @staticmethod
    def groups_of(block: Any) -> tuple[tuple[Any, ...], ...] | None:
        """See `LlamaSteps`."""
        attention, mlp = block.self_attn, block.mlp
        heads = attention.config.num_attention_heads, *[attention.num_key_value_heads] * 2
        qkv = _parts(attention.qkv_proj, [count * attention.head_dim for count in heads])
        wide = _parts(mlp.gate_up_proj, [attention.config.intermediate_size] * 2)
        return None if qkv is None or wide is None else (qkv, (attention.o_proj,), wide, (mlp.down_proj,))


class Qwen3Steps(LlamaSteps):
    """Of a Qwen 3: a LLaMA whose heads have norms before their rotary positions."""

    @classmethod
    def call_of(cls, block: Any) -> Any:
        """See `Steps`."""
        usual = super().call_of(block)
        return None if usual is None or not native.available() else _HeadNorms(block)


class _HeadNorms:
    """A block with norms of its heads: what `llama_block` gives, layer by layer around the kernel of attention."""

    def __init__(self, block: Any) -> None:
        self._attention, self._mlp = block.self_attn, block.mlp
        self._norms = block.input_layernorm, block.post_attention_layernorm

    def attend_and_widen(
        self, x: Tensor, batch: int, cosines: Tensor, sines: Tensor, keys: Tensor, values: Tensor, key_scales: Any,
        value_scales: Any, rotation: int, room: int, start: int, gate: Tensor, up: Tensor, threads: int,
    ) -> None:  # fmt: skip
        """See `ops.decoder_block.llama_block`."""
        del batch, room, threads  # the tensors know
        attention, (first, second) = self._attention, self._norms
        read = rms_norm(x, first.weight, first.variance_epsilon)
        query, key, value = attention.q_proj(read), attention.k_proj(read), attention.v_proj(read)
        query = self._normed(query, attention.q_norm)
        key = self._normed(key, attention.k_norm)
        places = CacheLayer(keys, values, key_scales, value_scales, rotation)
        x.add_(
            attention.o_proj(attend(query, key, value, (cosines, sines), places, start, attention.head_dim))
        )
        read = rms_norm(x, second.weight, second.variance_epsilon)
        gate.copy_(self._mlp.gate_proj(read))
        up.copy_(self._mlp.up_proj(read))

    def _normed(self, x: Tensor, norm: Any) -> Tensor:
        """Heads `[B, 1, heads * head_dim]`, each normed."""
        heads = x.view(len(x), 1, -1, self._attention.head_dim)
        return rms_norm(heads, norm.weight, norm.variance_epsilon).view(x.shape)

    def narrow(self, x: Tensor, gate: Tensor, up: Tensor, batch: int, threads: int) -> None:
        """See `ops.decoder_block.llama_block`."""
        del batch, threads
        x.add_(self._mlp.down_proj(gate.mul_(up)))


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
        return self._head(self._normed(x))


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

    @classmethod
    def call_of(cls, block: Any) -> Any:
        """See `Steps`."""
        attention, mlp = block.attn, block.mlp
        qkv = _parts(attention.c_attn, [attention.embed_dim] * 3)
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

    @classmethod
    def call_of(cls, block: Any) -> Any:
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
    "Qwen3ForCausalLM": Qwen3Steps,
    "Phi3ForCausalLM": Phi3Steps,
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
    layers: list[Any] = cache.layers
    if type(cache) is StaticCache and any(each.max_cache_len < room - 1 for each in layers):
        return None
    kind, calls = _calls_of(model)
    return None if kind is None or isinstance(calls, str) else kind(model, cache, calls, batch, room)


def why_no_steps(model: Any) -> str | None:
    """Why a packed model never takes short steps, as it is now; None where it does if nothing else is asked for."""
    calls = _calls_of(model)[1]
    return calls if isinstance(calls, str) else None


def _calls_of(model: Any) -> tuple[type[Steps] | None, list[Any] | str]:
    """The steps' class, and the calls of all blocks or why there are none."""
    name = type(model).__name__
    kind = FAMILIES.get(name)
    if kind is None:
        return None, f"{name} has no fused step"
    if not kind.is_usual(model):
        return kind, "its configuration asks for another function, such as a sliding window"
    if not _is_plain(model, kind.body(model)):
        return kind, "it has hooks, or is not in fp32 on the CPU"
    calls = [kind.call_of(block) for block in kind.blocks(model)]
    if any(call is None for call in calls):
        return kind, "a block is not packed throughout, or there are no compiled kernels"
    return kind, calls


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


def _parts(layer: Any, sizes: list[int]) -> tuple[Any, ...] | None:
    """Layers of so many rows each out of a packed one, else None; made once, and again where its tensors change."""
    if not isinstance(layer, PackedTransposed | PackedLinear):
        return None
    state = [(id(each), each._version) for each in layer._buffers.values() if each is not None]
    held = layer.__dict__.get("_in_parts")
    if held is None or held.state != state:
        held = _Kept(state, tuple(split(layer, sizes)))
        object.__setattr__(layer, "_in_parts", held)
    return held.parts
