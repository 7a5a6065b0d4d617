"""A tensor that no plain model can take, so that transformers refuses a folder of codes wherever Bellbox is not asked.

`from_pretrained(folder, config=LlamaConfig(...))` reads no `config.json`, so nobody there knows of codes: every packed
layer would be missing, and get random weights. But a tensor of another shape than the model's is an error. So the file
has one under the plain name of one layer's weight: `[0]` of uint8. Whoever reads the folder as ours leaves it out, and
so do our layers in `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bellbox.nn.tools import is_guard

_OURS_ALONE = {"q_proj", "k_proj", "v_proj", "qkv_proj"}
"""Layers that a GPT of `bellbox.models`, or a LLaMA with fused q, k and v, has under other names than transformers."""


def guard(layers: Iterable[str], experts: Iterable[str] = ()) -> dict[str, Tensor]:
    """The tensor, by its name; of no layer none.

    Args:
        layers: names of the packed layers, in the model's order.
        experts: names of stacks of experts, whose layers stand below them: `mlp.experts.gate_up_proj`.
    """
    stacks = set(experts)
    plain = [name for name in layers if name and name.rpartition(".")[0] not in stacks]
    chosen = [name for name in plain if name.rpartition(".")[2] not in _OURS_ALONE] or plain
    names = [f"{name}.weight" for name in chosen] or sorted(stacks)
    return {name: torch.empty(0, dtype=torch.uint8) for name in names[:1]}


def guards_in(tensors: Mapping[str, Tensor], layers: Iterable[str], experts: Mapping[str, Any]) -> set[str]:
    """Which tensors of a file are guards.

    Args:
        tensors: of the file.
        layers: names of its packed layers.
        experts: as its description has them.
    """
    places = {f"{name}.weight" for name in layers}
    places |= {f"{name}.{stack}" for name, entry in experts.items() for stack in entry["projections"]}
    return {name for name in places & tensors.keys() if is_guard(tensors[name])}
