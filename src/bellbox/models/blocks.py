"""A transformer block by itself: which of its layers read what, how it is filled and run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bellbox.models.config import GPTConfig, LlamaConfig, ModelConfig
from bellbox.models.gpt import GPTBlock
from bellbox.models.llama import LlamaBlock, RotaryEmbedding
from bellbox.utils.skeleton import on_meta


@dataclass(frozen=True)
class Group:
    """Linear layers of a block that read the same tensor."""

    norm: str | None
    """The norm that gives it and that nothing else reads; None where another computation stands before the layers."""
    layers: tuple[str, ...]


_GROUPS: dict[type, tuple[Group, ...]] = {
    LlamaConfig: (
        Group("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Group(None, ("self_attn.o_proj",)),
        Group("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        Group(None, ("mlp.down_proj",)),
    ),
    GPTConfig: (
        Group("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),
        Group(None, ("attn.c_proj",)),
        Group("ln_2", ("mlp.c_fc",)),
        Group(None, ("mlp.c_proj",)),
    ),
}


def groups_of(config: ModelConfig) -> tuple[Group, ...]:
    """The linear layers of each of a model's blocks."""
    first, *others = _GROUPS[type(config)]
    if config.fused_qkv:
        first = Group(first.norm, (first.layers[0].replace("q_proj", "qkv_proj"),))
    return first, *others


def layer_names(config: ModelConfig) -> Iterator[str]:
    """The names of all linear layers inside a model's blocks."""
    for number in range(config.num_hidden_layers):
        for group in groups_of(config):
            for layer in group.layers:
                yield f"{block_name(config, number)}.{layer}"


def block_name(config: ModelConfig, number: int) -> str:
    """A block's name in the model."""
    return f"{'model.layers' if isinstance(config, LlamaConfig) else 'transformer.h'}.{number}"


def filled_block(config: ModelConfig, number: int, state: dict[str, Tensor]) -> nn.Module:
    """A block of its own that holds these tensors, which have the names that they have in the model."""
    with on_meta():
        block = LlamaBlock(config) if isinstance(config, LlamaConfig) else GPTBlock(config)
    prefix = f"{block_name(config, number)}."
    block.load_state_dict({name.removeprefix(prefix): t for name, t in state.items()}, assign=True)
    return block.requires_grad_(False).eval()


def embed(config: ModelConfig, rest: dict[str, Tensor], ids: Tensor) -> Tensor:
    """What the first block reads: fp32 `[samples, tokens, hidden]` of int64 `[samples, tokens]`."""
    if isinstance(config, LlamaConfig):
        return rest["model.embed_tokens.weight"][ids]
    return rest["transformer.wte.weight"][ids] + rest["transformer.wpe.weight"][: ids.shape[1]]


class Runner:
    """Runs blocks of one model over hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        self._rotary = RotaryEmbedding(config) if isinstance(config, LlamaConfig) else None

    @torch.no_grad()
    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """`[samples, tokens, hidden]` to the same."""
        positions = () if self._rotary is None else (self._rotary,)
        return block(x, *positions, cache=None, layer=0, exact=False)
