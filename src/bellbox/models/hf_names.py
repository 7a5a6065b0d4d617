"""Names and layout of tensors in Hugging Face folders against ours.

LLaMA's tensors map by name. GPT-2's fused, transposed matrices are split on the way in and fused on the way out. OPT is
a GPT-2 under other names, whose table of positions begins with two rows that no position uses.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_OPT_POSITIONS = "model.decoder.embed_positions.weight"
_OPT_UNUSED_POSITIONS = 2
# Ours and OPT's, each name once; a block's own norms must be renamed before the last one, which has the same name.
_OPT = (
    ("transformer.wte.", "model.decoder.embed_tokens."),
    ("transformer.wpe.", "model.decoder.embed_positions."),
    ("transformer.h.", "model.decoder.layers."),
    (".ln_1.", ".self_attn_layer_norm."),
    (".ln_2.", ".final_layer_norm."),
    (".attn.c_proj.", ".self_attn.out_proj."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".fc1."),
    (".mlp.c_proj.", ".fc2."),
    ("transformer.ln_f.", "model.decoder.final_layer_norm."),
)
# GPT-2's and OPT's first checkpoints name the body alone.
_PREFIXES = {"gpt2": "transformer.", "opt": "model."}


def canonical(name: str, kind: str) -> str:
    """A stored name with the prefix that some checkpoints leave out."""
    prefix = _PREFIXES.get(kind, "")
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def block_prefix(kind: str, number: int) -> str:
    """What the names of a block's tensors begin with in a folder of this model_type."""
    body = {"llama": "model.layers.", "gpt2": "transformer.h.", "opt": "model.decoder.layers."}[kind]
    return f"{body}{number}."


def _transposed(name: str) -> bool:
    """GPT-2 stores these matrices as [in, out]."""
    return name.endswith((".c_proj.weight", ".c_fc.weight"))


def to_hf(state: dict[str, Tensor], kind: str, tied: bool) -> dict[str, Tensor]:
    """Our state dict, or a part of it that holds q, k and v together, under Hugging Face's names and layout.

    A LLaMA's fused q, k and v are split. A GPT-2 without biases gets zeros, which transformers wants.

    Args:
        state: tensors by our names.
        kind: the model_type.
        tied: whether the head is the embedding; it is then left out.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and tied:
            continue
        if kind == "opt":
            theirs = _renamed(name, reverse=False)
            if theirs == _OPT_POSITIONS:
                tensor = torch.cat((tensor.new_zeros(_OPT_UNUSED_POSITIONS, tensor.shape[1]), tensor))
            result[theirs] = tensor
        elif kind == "llama" and ".qkv_proj." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[name.replace("qkv_proj", f"{part}_proj")] = piece.clone()
        elif kind == "gpt2" and ".qkv_proj." in name:
            result[name.replace("qkv_proj", "c_attn")] = tensor.t() if tensor.dim() == 2 else tensor
        elif kind == "llama" or not re.search(r"\.[kqv]_proj\.", name):
            result[name] = tensor.t() if kind == "gpt2" and _transposed(name) else tensor
        elif ".q_proj." in name:
            fused = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            result[name.replace("q_proj", "c_attn")] = fused.t() if fused.dim() == 2 else fused
    if kind == "gpt2":
        for name, tensor in list(result.items()):
            if re.search(r"\.(ln_\w+|c_\w+)\.weight$", name):
                zeros = tensor.new_zeros(tensor.shape[-1])  # [in, out], or a norm's [width]
                result.setdefault(name.replace("weight", "bias"), zeros)
    return result


def from_hf(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The way back from `to_hf`, every tensor in memory of its own."""
    if kind == "llama":
        return tensors
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if kind == "opt":
            used = tensor[_OPT_UNUSED_POSITIONS:].clone() if name == _OPT_POSITIONS else tensor
            result[_renamed(name, reverse=True)] = used
        elif ".c_attn." in name:
            whole = tensor.t() if tensor.dim() == 2 else tensor
            for part, piece in zip("qkv", whole.chunk(3), strict=True):
                result[name.replace("c_attn", f"{part}_proj")] = piece.clone(
                    memory_format=torch.contiguous_format
                )
        else:
            result[name] = tensor.t().contiguous() if _transposed(name) else tensor
    return result


def opt_name(name: str) -> str:
    """OPT's name of a tensor, or of a module with a dot behind it, of a GPT of ours."""
    return _renamed(name, reverse=False)


def _renamed(name: str, reverse: bool) -> str:
    for ours, theirs in _OPT:
        old, new = (theirs, ours) if reverse else (ours, theirs)
        if reverse and old == ".final_layer_norm." and ".layers." not in name and ".h." not in name:
            continue  # the model's last norm, not a block's
        name = name.replace(old, new)
    return name
