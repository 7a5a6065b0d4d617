"""Generation of a packed LLaMA in short steps: the fused decode step of Bellbox under `model.generate`.

A decode step of transformers is some forty calls a block, and what `generate` does between steps is as much again
as a small packed model needs. So where nothing is asked for that needs transformers' own loop, the loop is a short one:
the same prompt pass, then two calls a block (`ops.decoder_block`) that write into the very cache of `generate`, be it
static or dynamic. Everything else (padding, beams, hooks, other dtypes, a cache that holds something already, outputs
beside the tokens) goes the ordinary way, through transformers' modules with packed layers in them.

A LLaMA that `bellbox.models` trained computes its norms as it was trained: in one call, whose last bits are not those
of transformers' six. Its folder says so (`"rms_norm": "bellbox"` in `config.json`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from bellbox.nn import PackedLinear
from bellbox.nn.adopted import class_for
from bellbox.nn.compact import CompactEmbedding
from bellbox.nn.packed_linear import served_alike
from bellbox.ops.attend import CacheLayer
from bellbox.ops.decoder_block import llama_block
from bellbox.ops.rms_norm import rms_norm

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Classes whose blocks are a LLaMA's: two RMS norms, q, k, v and o, a SwiGLU."""
_TABLES = ("default", "linear", "llama3", "yarn")
"""Rotary positions that are a table, whatever the length of the text."""
_ASKED = {
    "attention_mask",
    "past_key_values",
    "use_cache",
    "position_ids",
    "logits_to_keep",
    "cache_position",
}
"""What the short loop knows of the arguments of a forward."""


class BellboxNorm(nn.Module):
    """An RMS norm of transformers that, in evaluation in fp32, computes as `bellbox.models` does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., size]` to the same shape."""
        norm: Any = self
        if hidden_states.dtype == norm.weight.dtype == torch.float32 and not torch.is_grad_enabled():
            return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)
        return super().forward(hidden_states)


class ShortDecoding(nn.Module):
    """What the class of a packed LLaMA adds to transformers' own: a loop of short steps, where it serves."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """See `GenerationMixin._sample`."""
        plain = not synced_gpus and _asks_for_tokens_alone(generation_config)
        limits = _limits(stopping_criteria) if plain else None
        cache = model_kwargs.get("past_key_values")
        steps = None
        if limits is not None and _is_known(self, input_ids, cache, model_kwargs):
            steps = Steps.of(self, cache, len(input_ids), limits[0])
        if steps is None or limits is None:
            parent: Any = super()
            return parent._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        choose = _sampled if generation_config.do_sample else _likeliest
        pad = generation_config._pad_token_tensor
        return _loop(steps, input_ids, logits_processor, limits, choose, pad, streamer)


def with_bellbox_norms(model: Any) -> None:
    """Have the norms of a LLaMA that `bellbox.models` trained compute as there."""
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            module.__class__ = class_for(BellboxNorm, type(module))


# --- whether ---


def _asks_for_tokens_alone(config: Any) -> bool:
    asked = (
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "is_assistant", "prefill_chunk_size",
    )  # fmt: skip
    return config.use_cache and not any(getattr(config, name, None) for name in asked)


def _limits(criteria: Any) -> tuple[int, frozenset[int]] | None:
    """Most tokens of a text, and the tokens that end one; None where there are other criteria."""
    longest, ends = None, frozenset[int]()
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            longest = each.max_length if longest is None else min(longest, each.max_length)
            if each.max_position_embeddings is not None and longest > each.max_position_embeddings:
                return None  # transformers warns
        elif type(each) is EosTokenCriteria:
            ends |= frozenset(each.eos_token_id.tolist())
        else:
            return None
    return None if longest is None else (longest, ends)


def _is_known(model: Any, input_ids: Tensor, cache: Any, asked: dict[str, Any]) -> bool:
    """Whether a plain loop over an empty cache gives what is asked for."""
    if set(asked) - _ASKED or input_ids.dim() != 2 or not input_ids.shape[1] or not input_ids.is_cpu:
        return False
    kinds = {StaticCache: StaticLayer, DynamicCache: DynamicLayer}
    if type(cache) not in kinds or getattr(cache, "offloading", False) or int(cache.get_seq_length()):
        return False
    if any(type(each) is not kinds[type(cache)] for each in cache.layers):
        return False
    mask = asked.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
        return False
    config = model.config
    if config.output_attentions or config.output_hidden_states or torch.is_grad_enabled():
        return False
    return not torch.is_autocast_enabled("cpu") and not model.training


def _is_plain(model: Any) -> bool:
    """Whether a model computes what its class says, in fp32 on the CPU, but for its packed layers."""
    config = model.config
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return False
    if getattr(config, "hidden_act", None) not in ("silu", "swish"):
        return False
    if getattr(model.model.rotary_emb, "rope_type", None) not in _TABLES:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()):
        return False
    table = model.model.embed_tokens
    if not isinstance(table, CompactEmbedding) and type(table) is not nn.Embedding:
        return False
    tables = () if isinstance(table, CompactEmbedding) else tuple(table.parameters())
    tensors = (*model.model.layers.parameters(), *model.model.norm.parameters(), *tables)
    return all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


# --- steps ---


class Steps:
    """Decode steps of one token a sequence; weights are those of the moment that it was made.

    Args:
        model: of one of `FAMILIES`.
        cache: of transformers, empty.
        blocks: the model's, as `ops.decoder_block` binds them.
        batch: sequences.
        room: tokens that the cache must hold.
    """

    def __init__(self, model: Any, cache: Any, blocks: Sequence[Any], batch: int, room: int) -> None:
        self._model, self._cache, self._blocks, self._batch = model, cache, blocks, batch
        self._room, self._length = room, 0
        self._layers: list[CacheLayer] = []
        self._gate, self._up = torch.empty(2, batch, 1, model.config.intermediate_size).unbind()
        positions = torch.arange(room)[None]
        cos, sin = model.model.rotary_emb(torch.empty(1, room, 1), positions)
        half = cos.shape[-1] // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    @classmethod
    def of(cls, model: Any, cache: Any, batch: int, room: int) -> Steps | None:
        """Steps for a model and a cache; None where a block is not packed throughout, or the model is not plain."""
        if not _is_plain(model):
            return None
        layers: list[Any] = cache.layers
        if type(cache) is StaticCache and any(each.max_cache_len < room - 1 for each in layers):
            return None
        blocks = [_block(each) for each in model.model.layers]
        return None if any(each is None for each in blocks) else cls(model, cache, blocks, batch, room)

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
        model, gate, up, batch = self._model, self._gate, self._up, self._batch
        threads = torch.get_num_threads()
        x = model.model.embed_tokens(tokens).contiguous()
        for block, layer in zip(self._blocks, self._layers, strict=True):
            places = *layer, layer.keys.shape[2], self._length
            block.attend_and_widen(x, batch, self._cos, self._sin, *places, gate, up, threads)
            F.silu(gate, inplace=True).mul_(up)
            block.narrow(x, gate, batch, threads)
        self._length += 1
        norm = model.model.norm
        return model.lm_head(rms_norm(x, norm.weight, norm.variance_epsilon))[:, -1]

    def finish(self, prompt: int) -> None:
        """Have the cache say what it holds."""
        held: list[Any] = self._cache.layers
        for index, layer in enumerate(self._layers):
            if type(self._cache) is StaticCache:
                held[index].cumulative_length.add_(self._length - prompt)
            else:
                keys, values = layer.keys[:, :, : self._length], layer.values[:, :, : self._length]
                self._cache.update(keys, values, index)


def _block(block: Any) -> Any:
    attention, mlp = block.self_attn, block.mlp
    groups = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    calls: list[Any] = []
    for layers in groups:
        if not all(isinstance(layer, PackedLinear) and served_alike(layer, layers[0]) for layer in layers):
            return None
        calls.append([layer.bound for layer in layers])
    norms = block.input_layernorm, block.post_attention_layernorm
    weights, eps = [norm.weight for norm in norms], {norm.variance_epsilon for norm in norms}
    if len(eps) > 1 or attention.scaling != attention.head_dim**-0.5:
        return None
    return llama_block(calls, attention.head_dim, weights, eps.pop())


# --- the loop ---


def _likeliest(scores: Tensor) -> Tensor:
    return scores.argmax(-1)


def _sampled(scores: Tensor) -> Tensor:
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def _loop(
    steps: Steps,
    input_ids: Tensor,
    processors: Any,
    limits: tuple[int, frozenset[int]],
    choose: Callable[[Tensor], Tensor],
    pad: Tensor | None,
    streamer: Any,
) -> Tensor:
    """Token ids `[B, T]` to `[B, T + new]`, as `GenerationMixin._sample` gives them."""
    longest, ends = limits
    batch, prompt = input_ids.shape
    ids = input_ids.new_empty(batch, max(longest, prompt + 1))
    ids[:, :prompt] = input_ids
    going = [True] * batch
    logits = steps.prompt(input_ids)
    length = prompt
    try:
        while True:
            scores = logits.float()
            if len(processors):
                scores = processors(ids[:, :length], scores.clone())
            tokens = choose(scores)
            chosen = tokens.tolist()
            if not all(going):
                assert pad is not None
                chosen = [one if on else int(pad) for one, on in zip(chosen, going, strict=True)]
                tokens = torch.tensor(chosen)
            ids[:, length] = tokens
            length += 1
            if streamer is not None:
                streamer.put(tokens)
            going = [on and one not in ends for one, on in zip(chosen, going, strict=True)]
            if length >= longest or not any(going):
                break
            logits = steps.step(tokens[:, None])
    finally:
        steps.finish(prompt)
    if streamer is not None:
        streamer.end()
    return ids[:, :length]
