"""GGUF architectures: the tensors and numbers of a LLaMA or a GPT-2 in a file, and their places in our models.

Two things change on the way. LLaMA's rotary positions pair channel i of a head with i + head_dim / 2 here (as Hugging
Face stores weights) and with its neighbour in llama.cpp: so the rows of q and k are put in another order, which moves
codes and scales along with them and changes none. And a GPT-2 has q, k and v under one another in one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.interop.gguf.rope import Rope, read_rope, write_rope
from bellbox.interop.gguf.weights import Coded, weight_of
from bellbox.models import GPT, GPTConfig, Llama, LlamaConfig


@dataclass(frozen=True)
class Tensors:
    """One tensor of the file: several weights are put under one another."""

    name: str
    parts: list[Coded | Tensor]


@dataclass(frozen=True)
class Architecture:
    """What a model is in a GGUF file."""

    name: str
    """`llama` or `gpt2`."""
    vocabulary: int
    tensors: Iterator[Tensors]
    describe: Callable[[Any], None]
    """Puts its numbers into a `gguf.GGUFWriter`."""


def architecture_of(model: nn.Module) -> Architecture:
    """That of one of Bellbox's own language models, or of transformers' LLaMA.

    Raises:
        BellboxError: another model, or one with parts that GGUF's architecture has not.
    """
    if isinstance(model, GPT):
        return _gpt2(model)
    if isinstance(model, Llama):
        return _llama(model, model.config, Rope(float(model.config.rope_theta)))
    config: Any = getattr(model, "config", None)
    names = {name for name, _ in model.named_modules()}
    if getattr(config, "model_type", None) == "llama" and {"lm_head", "model.embed_tokens"} <= names:
        return _llama(model, *_of_transformers(config))
    kind = getattr(config, "model_type", None) or type(model).__name__
    raise BellboxError(
        f"a {kind} is not written to GGUF: LLaMA and GPT are (Bellbox's own, and transformers' LlamaForCausalLM)"
    )


def _of_transformers(config: Any) -> tuple[LlamaConfig, Rope]:
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise BellboxError(
                f"{name} is true, which is not written to GGUF; only a LLaMA without biases is"
            )
    if config.hidden_act not in ("silu", "swish"):
        raise BellboxError(f"hidden_act is {config.hidden_act!r}; GGUF's llama architecture has silu")
    ours = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    return ours, read_rope(config.to_dict(), ours.head_size, ours.max_position_embeddings)


def _llama(model: nn.Module, config: LlamaConfig, rope: Rope) -> Architecture:
    def describe(writer: Any) -> None:
        _describe(writer, config)
        writer.add_head_count_kv(config.key_value_heads)
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        write_rope(writer, rope)

    return Architecture("llama", config.vocab_size, _llama_tensors(model, config), describe)


def _describe(writer: Any, config: LlamaConfig | GPTConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _llama_tensors(model: nn.Module, config: LlamaConfig) -> Iterator[Tensors]:
    def one(name: str, module: str) -> Tensors:
        return Tensors(f"{name}.weight", [weight_of(module, model.get_submodule(module))])

    yield one("token_embd", "model.embed_tokens")
    for number in range(config.num_hidden_layers):
        block, there = f"model.layers.{number}", f"blk.{number}"
        yield one(f"{there}.attn_norm", f"{block}.input_layernorm")
        queries, keys, values = _queries_keys_values(model, f"{block}.self_attn", config)
        heads, key_heads = config.num_attention_heads, config.key_value_heads
        yield Tensors(f"{there}.attn_q.weight", [_rows(queries, _paired(heads, config.head_size))])
        yield Tensors(f"{there}.attn_k.weight", [_rows(keys, _paired(key_heads, config.head_size))])
        yield Tensors(f"{there}.attn_v.weight", [values])
        yield one(f"{there}.attn_output", f"{block}.self_attn.o_proj")
        yield one(f"{there}.ffn_norm", f"{block}.post_attention_layernorm")
        for ours, theirs in (("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
            yield one(f"{there}.{theirs}", f"{block}.mlp.{ours}")
    yield one("output_norm", "model.norm")
    if not config.tie_word_embeddings:
        yield one("output", "lm_head")


def _queries_keys_values(
    model: nn.Module, attention: str, config: LlamaConfig | GPTConfig
) -> list[Coded | Tensor]:
    if not config.fused_qkv:
        names = [f"{attention}.{part}_proj" for part in "qkv"]
        return [weight_of(name, model.get_submodule(name)) for name in names]
    name = f"{attention}.qkv_proj"
    whole = weight_of(name, model.get_submodule(name))
    third = config.num_attention_heads * config.head_size
    return [_rows(whole, np.arange(part * third, (part + 1) * third)) for part in range(3)]


def _rows(weight: Coded | Tensor, order: np.ndarray) -> Coded | Tensor:
    return weight.rows(order) if isinstance(weight, Coded) else weight[torch.from_numpy(order)]


def _paired(heads: int, head_dim: int) -> np.ndarray:
    """Rows of each head in the order 0, d/2, 1, d/2 + 1, ...: those that are turned together become neighbours."""
    order = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return order.swapaxes(1, 2).reshape(-1)


def _gpt2(model: GPT) -> Architecture:
    config = model.config
    if config.activation != "gelu":
        raise BellboxError(
            f"activation is {config.activation!r}; GGUF's gpt2 architecture has GPT-2's tanh GELU: train with "
            "activation: gelu"
        )

    def describe(writer: Any) -> None:
        _describe(writer, config)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)

    return Architecture("gpt2", config.vocab_size, _gpt2_tensors(model, config), describe)


def _gpt2_tensors(model: GPT, config: GPTConfig) -> Iterator[Tensors]:
    def both(name: str, module: str) -> Iterator[Tensors]:
        layer = model.get_submodule(module)
        weight = weight_of(module, layer)
        yield Tensors(f"{name}.weight", [weight])
        yield Tensors(
            f"{name}.bias", [_bias(layer, len(weight if isinstance(weight, Tensor) else weight.codes))]
        )

    yield Tensors("token_embd.weight", [weight_of("transformer.wte", model.transformer.wte)])
    positions = weight_of("transformer.wpe", model.transformer.wpe)
    yield Tensors("position_embd.weight", [positions])
    for number in range(config.num_hidden_layers):
        block, there = f"transformer.h.{number}", f"blk.{number}"
        yield from both(f"{there}.attn_norm", f"{block}.ln_1")
        parts = _queries_keys_values(model, f"{block}.attn", config)
        yield Tensors(f"{there}.attn_qkv.weight", parts)
        attention = model.get_submodule(f"{block}.attn")
        names = ("qkv_proj",) if config.fused_qkv else ("q_proj", "k_proj", "v_proj")
        width = 3 * config.hidden_size // len(names)
        biases = [_bias(attention.get_submodule(name), width) for name in names]
        yield Tensors(f"{there}.attn_qkv.bias", [torch.cat(biases)])
        yield from both(f"{there}.attn_output", f"{block}.attn.c_proj")
        yield from both(f"{there}.ffn_norm", f"{block}.ln_2")
        yield from both(f"{there}.ffn_up", f"{block}.mlp.c_fc")
        yield from both(f"{there}.ffn_down", f"{block}.mlp.c_proj")
    yield from both("output_norm", "transformer.ln_f")
    if not config.tie_word_embeddings:
        yield Tensors("output.weight", [weight_of("lm_head", model.lm_head)])


def _bias(layer: nn.Module, size: int) -> Tensor:
    """A layer's bias; zeros where it has none, since a GPT-2 of GGUF always has one."""
    bias: Any = getattr(layer, "bias", None)
    return torch.zeros(size) if bias is None else bias.detach().to(torch.float32)
