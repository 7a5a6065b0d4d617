"""Optimizers of a run: AdamW, or for the matrices Muon or SOAP and AdamW for all else, perhaps with CEWT around."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.core.sharded import is_sharded, part_like, whole
from bellbox.errors import BellboxError
from bellbox.nn.quantized import ROTATED
from bellbox.nn.tools import stored_weight
from bellbox.optim import (
    CEWT,
    multiplies,
    parameter_groups,
    refit_codebooks,
    second_moments,
)
from bellbox.recipe import is_head
from bellbox.runs.config import OptimizerSection
from bellbox.runs.constraint import constraint_of
from bellbox.training.optim.muon import WholeMuon
from bellbox.training.optim.soap import flat, put, shape_of, soap

_NORM = "cewt_norm"


class ModelOptimizer:
    """The optimizers of one model, as one.

    Args:
        model: prepared or not.
        section: which optimizer, with which numbers. With CEWT, the weights of the quantized layers are projected now.
        norms: by the parameter's name, what CEWT keeps of each weight: it is then projected already.

    Raises:
        BellboxError: Muon or SOAP, for a model without matrices that it could train; SOAP's package is not there.
    """

    def __init__(
        self, model: nn.Module, section: OptimizerSection, norms: dict[str, Tensor] | None = None
    ) -> None:
        self.section = section
        groups = parameter_groups(
            model, lr=section.lr, weight_decay=section.weight_decay, decay_head=section.decay_head
        )
        self.parts: list[torch.optim.Optimizer] = []
        self._soap: torch.optim.Optimizer | None = None
        matrices: list[dict[str, Any]] = []
        if section.kind != "adamw":
            matrices, groups = _split(groups, block_matrices(model))
            require_matrices(section.kind, matrices)
        if section.kind == "soap":
            self._soap = soap(matrices, section)
            self.parts.append(self._soap)
        elif section.kind == "muon":
            # Scaled so that Muon takes AdamW's learning rate and decay (arXiv 2502.16982).
            dtype = torch.float32 if section.muon_dtype == "fp32" else torch.bfloat16
            self.parts.append(WholeMuon(matrices, section.lr, section.momentum, dtype))
        # Fused: the update in one pass over the memory.
        self.parts.append(
            torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
        )
        self.cewt: CEWT | None = None
        if section.cewt.every:
            at_once = section.cewt.rule == "ours" and norms is None
            self.cewt = constraint_of(model, section.cewt, self.parts, norms, at_once)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, lr: float, ball: float | None = None, project: bool = True) -> None:
        """Update all parameters.

        Args:
            lr: learning rate of this step; each group's is this times its own `lr_scale`.
            ball: rate of CEWT's hyperball in this step; needed with CEWT.
            project: whether CEWT sorts in this step.
        """
        for group in self.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self.cewt is not None:
            assert ball is not None
            self.cewt.step(ball, project)
            return
        for part in self.parts:
            part.step()

    def refit_codebooks(self, model: nn.Module, step: int) -> None:
        """Fit those codebooks anew that are due after `step` steps (`bellbox.optim.refit_codebooks`)."""
        refit_codebooks(model, second_moments(*self.parts), step)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered of a parameter, and saved: moments, and under `cewt_norm` the norm that CEWT keeps."""
        state: dict[str, Tensor] = {}
        for part in self.parts:
            state |= flat(part, parameter) if part is self._soap else part.state.get(parameter, {})
        if self.cewt is not None and parameter in self.cewt.norms:
            state[_NORM] = self.cewt.norms[parameter]
        return state

    def norms_by_name(self, model: nn.Module) -> dict[str, Tensor] | None:
        """What CEWT keeps of each weight, by the parameter's name; None without CEWT."""
        if self.cewt is None:
            return None
        return {name: self.cewt.norms[p] for name, p in model.named_parameters() if p in self.cewt.norms}

    def carry_over(
        self, names: Iterable[tuple[str, nn.Parameter]], states: dict[str, dict[str, Tensor]]
    ) -> None:
        """Take the moments of another optimizer; parameters without any start anew.

        Args:
            names: `model.named_parameters()`.
            states: by the parameter's name, what `state_of` gave.
        """
        owners = self._owners()
        for name, parameter in names:
            state = {key: value for key, value in states.get(name, {}).items() if key != _NORM}
            if state and parameter in owners:
                self._put(owners[parameter], parameter, state)

    def _owners(self) -> dict[Tensor, torch.optim.Optimizer]:
        return {p: part for part in self.parts for group in part.param_groups for p in group["params"]}

    def _put(self, part: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor]) -> None:
        if part is self._soap:
            put(part, parameter, state)
        else:
            part.state[parameter] = state

    def tensors(self, names: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        """The state as flat names: `blocks.0.attention.q.weight/exp_avg`; whole tensors.

        Args:
            names: `model.named_parameters()`.
        """
        return {name: whole(value) for name, value in self.held(names).items()}

    def held(self, names: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        """Likewise, what this process holds of them."""
        return {
            f"{name}/{key}": value
            for name, parameter in names
            for key, value in self.state_of(parameter).items()
        }

    def restore(self, names: Iterable[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`. They are copied, so that their memory is aligned as at first.

        Raises:
            KeyError: a tensor names no parameter that is trained.
            ValueError: a moment has another shape than its parameter.
        """
        parameters = dict(names)
        owners = self._owners()
        for part in self.parts:
            part.state.clear()
        found: dict[nn.Parameter, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            name, _, key = full.rpartition("/")
            if name not in parameters and name.endswith(
                "weight"
            ):  # earlier versions kept rotated weights as `weight`
                name = f"{name.removesuffix('weight')}{ROTATED}"
            parameter = parameters[name]
            if value.dim() == 0 and parameter.shape == (1,) and key != "step":
                value = value.reshape(1)  # earlier versions kept scales as 0-d tensors
            if value.numel() != 1 and tuple(value.shape) != shape_of(key, parameter):
                raise ValueError(
                    f"{full} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
                )
            if is_sharded(value):  # read for this parameter, into memory of its own
                found.setdefault(parameter, {})[key] = value
                continue
            # AdamW's `step` is a scalar on the parameter's device where the update is fused.
            copy = torch.empty_like(value, device=parameter.device).copy_(value)
            if key != _NORM:
                sharded = copy.shape == parameter.shape
                found.setdefault(parameter, {})[key] = part_like(parameter, copy) if sharded else copy
            elif self.cewt is not None:
                self.cewt.norms[parameter] = copy
        for parameter, state in found.items():
            self._put(owners[parameter], parameter, state)


def require_matrices(kind: str, found: Sequence[object]) -> None:
    """Refuse Muon and SOAP where there is nothing for them.

    Raises:
        BellboxError: no matrix was found.
    """
    if not found:
        raise BellboxError(
            f"optimizer.kind is {kind}, which trains the matrices of linear layers inside the blocks, and the model "
            "has none; use adamw"
        )


def block_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers that are no output head: what Muon and SOAP are for."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        weight = stored_weight(module) if multiplies(module) and not is_head(name) else None
        if weight is not None and weight.dim() == 2:
            found[id(weight)] = weight
    return [weight for key, weight in found.items() if key not in embeddings]


def _split(
    groups: list[dict[str, Any]], matrices: Iterable[Tensor]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups with these parameters only, and with the others only; empty ones left out."""
    chosen = {id(parameter) for parameter in matrices}

    def part(inside: bool) -> list[dict[str, Any]]:
        kept = [{**g, "params": [p for p in g["params"] if (id(p) in chosen) == inside]} for g in groups]
        return [group for group in kept if group["params"]]

    return part(True), part(False)
