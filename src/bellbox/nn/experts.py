"""transformers' fused experts: modules that keep the matrices of all experts in one 3-D parameter a projection.

They all follow one interface, that of `transformers.integrations.moe`: a first projection (`gate_up_proj`, or `up_proj`
without a gate), a gate or an activation, and `down_proj`, with a few flags. So one forward serves them all: a loop over
the experts that were hit, each on its own tokens. Here stand how such a module is recognised and that forward; nothing
imports transformers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

DOWN = "down_proj"
"""The second projection; the first is `gate_up_proj` or `up_proj`."""
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def stack_names(experts: Any) -> tuple[str, str]:
    """The parameters that hold the matrices of all experts: of the first projection and of the second."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), DOWN


def bias_name(stack: str) -> str:
    """The parameter with the biases of a stack's experts."""
    return f"{stack}_bias"


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module in full precision is one whose forward the interface describes, and nothing else touches."""
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return False
    # The interface wraps the forward of the class; a forward of a subclass or an instance is another one.
    if not hasattr(type(module).forward, "__wrapped__") or "forward" in module.__dict__:
        return False
    if is_parametrized(module) or getattr(module, "_is_expert_parallel", False):
        return False
    return _has_its_parameters(module)


def _has_its_parameters(module: Any) -> bool:
    """Whether the parameters are those that the flags say, of shapes that fit together, and no others."""
    stacks = stack_names(module)
    first, down = (module._parameters.get(name) for name in stacks)
    if first is None or down is None or first.dim() != 3 or down.dim() != 3:
        return False
    one, two = (sizes(module, each) for each in (first, down))
    biases = {bias_name(name) for name in stacks} if module.has_bias else set[str]()
    return (
        len(first) == len(down) == module.num_experts
        and (one[0], one[1]) == (two[1], two[0] * (2 if module.has_gate else 1))
        and set(module._parameters) == {*stacks, *biases}
        and all(getattr(module, name) is not None for name in biases)
        and callable(getattr(module, "_apply_gate" if module.has_gate else "act_fn", None))
    )


def sizes(experts: Any, stack: Tensor) -> tuple[int, int]:
    """Inputs and outputs of one expert's matrix in a stack."""
    one, other = stack.shape[1:]
    return (one, other) if experts.is_transposed else (other, one)


def matrix(experts: Any, name: str, index: int) -> Tensor:
    """One expert's matrix as a linear layer has it, `[out, in]`: a view."""
    return one_of(experts, getattr(experts, name), index)  # a parametrization made after `prepare` counts


def one_of(experts: Any, stack: Tensor, index: int) -> Tensor:
    """`[out, in]` of one expert, from what belongs to all of them."""
    return stack[index].T if experts.is_transposed else stack[index]


def bias(experts: Any, name: str, index: int) -> Tensor | None:
    """One expert's bias, `[out]`: a view."""
    return getattr(experts, bias_name(name))[index] if experts.has_bias else None


class ExpertsForward(nn.Module):
    """The forward that low-bit experts have: each expert's projections on the tokens that were routed to it."""

    @abstractmethod
    def layers_of(self, stack: str) -> nn.ModuleList | None:
        """The low-bit layers of a projection, one an expert; None where it is in full precision."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: int64 `[tokens, k]`, the experts of each token; numbers beyond the last expert count for none.
            top_k_weights: `[tokens, k]`.

        Returns:
            `[tokens, hidden]` in the dtype of `hidden_states`, summed in fp32 at least, experts in order.
        """
        kind = torch.promote_types(hidden_states.dtype, torch.float32)
        out = torch.zeros(hidden_states.shape, dtype=kind, device=hidden_states.device)
        if torch.compiler.is_exporting():
            return self._of_all(hidden_states, top_k_index, top_k_weights, out).to(hidden_states.dtype)
        for index in self._hit(top_k_index):
            token, place = torch.where(top_k_index == index)
            given = self._expert(index, hidden_states[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, given.to(kind))
        return out.to(hidden_states.dtype)

    def _hit(self, top_k_index: Tensor) -> Iterator[int]:
        count: Any = self.num_experts
        yield from (index for index in top_k_index.unique().tolist() if 0 <= index < count)

    def _of_all(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, out: Tensor) -> Tensor:
        """The same sum without a choice that depends on data, for graphs: what was not routed adds zero."""
        count: Any = self.num_experts
        for index in range(count):
            routed = top_k_index == index
            weight = torch.where(routed, top_k_weights, 0).sum(-1, keepdim=True)
            given = self._expert(index, x) * weight
            out = out + torch.where(routed.any(-1, keepdim=True), given.to(out.dtype), 0)
        return out

    def _expert(self, index: int, x: Tensor) -> Tensor:
        """One expert, for `[tokens, hidden]`."""
        experts: Any = self
        first, down = stack_names(self)
        x = self._project(first, index, x)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = self._project(down, index, x)
        return experts.post_expert_norm(x) if experts.has_post_expert_norm else x

    def _project(self, stack: str, index: int, x: Tensor) -> Tensor:
        layers = self.layers_of(stack)
        if layers is not None:
            return layers[index](x)
        return F.linear(x, matrix(self, stack, index), bias(self, stack, index))
