"""CEWT around an optimizer that stays the object that it is: hooks before and after its step.

Schedulers, GradScaler, accelerate and transformers' Trainer see torch's own AdamW. What the hyperball has to remember
lies in the optimizer's parameter groups, so whoever saves and loads its state dict saves and loads that too:

- `lr` of the groups of constrained weights is the hyperball's rate. Schedulers scale it like any other.
- `hyperball_norms`: fp64 `[weights of the group]`, the norm that each keeps.
- `hyperball_steps`: steps done, by which projections are due.

The wrapped optimizer's own rate has no say over these weights: of its update only the direction counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bellbox.core.sharded import local
from bellbox.errors import BellboxError
from bellbox.optim.cewt import CEWT, Turn, constrained_weights

NORMS, STEPS = "hyperball_norms", "hyperball_steps"
_AT = "_bellbox_hyperball"


def hyperball(
    optimizer: Optimizer,
    weights: nn.Module | Mapping[Tensor, Turn | None] | Iterable[Tensor],
    *,
    lr: float = 0.02,
    every: int = 16,
    norms_only: Iterable[Tensor] = (),
) -> Optimizer:
    """Put the hyperball step, and projections to exactly Gaussian weights, around a torch optimizer.

    Weights are not changed now. The first projection is that of step number `every`; `project_weights` projects at
    once, which is good before the first step of fresh weights and after the last step of any.

    Args:
        optimizer: any that adds its update to the weights; with its own groups. Constrained weights move to groups of
            their own, without decay.
        weights: a prepared model (all weights that it quantizes, see `constrained_weights`), or fp32 matrices. Those
            that another optimizer trains are left to a call of their own.
        lr: how far a step moves a weight, in units of its norm.
        every: steps between projections; 0 for none, which keeps the norms alone.
        norms_only: matrices that keep their norm and are never projected: `head_weights(model)`, as published.

    Returns:
        The same optimizer. (A copy by `copy.deepcopy` or pickle has no hooks, as torch drops them: call this again.)

    Raises:
        BellboxError: nothing to constrain, weights that are not fp32, a scheduler that was
            made before, or an optimizer that is wrapped already or is evaluated several times a step (L-BFGS).
    """
    optimizer = _inner(optimizer)
    if hasattr(optimizer, _AT):
        raise BellboxError("the optimizer has a hyperball already")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise BellboxError(
            "L-BFGS evaluates the model within its step, where the hyperball's weights are zero"
        )
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise BellboxError(
            "the optimizer has a scheduler already: call hyperball first, then make the scheduler"
        )
    if every < 0 or not lr >= 0:
        raise BellboxError(f"hyperball: lr {lr} and every {every} must not be negative")
    if isinstance(weights, nn.Module):
        weights = constrained_weights(weights)
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    turns = dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights)
    turns = {weight: turn for weight, turn in turns.items() if id(weight) in own}
    others = [weight for weight in norms_only if id(weight) in own and weight not in turns]
    for weight in (*turns, *others):
        _require_fp32(weight)
    ball = _Hyperball(turns, others, every)
    if not ball.cewt.norms:
        raise BellboxError(
            "hyperball: none of the optimizer's parameters is a weight to constrain; give it the model that prepare "
            "returned, and the optimizer its parameters"
        )
    _separate(optimizer, ball.cewt.norms, lr)
    optimizer.register_step_pre_hook(ball.before)
    optimizer.register_step_post_hook(ball.after)
    optimizer.register_load_state_dict_pre_hook(ball.look)
    optimizer.register_load_state_dict_post_hook(ball.take)
    setattr(optimizer, _AT, ball)
    return optimizer


def project_weights(optimizer: Optimizer) -> None:
    """Make the weights of a hyperball exactly Gaussian now.

    Raises:
        BellboxError: the optimizer has no hyperball.
    """
    ball = getattr(_inner(optimizer), _AT, None)
    if ball is None:
        raise BellboxError(
            "the optimizer has no hyperball: bellbox.optim.hyperball(optimizer, model) puts it there"
        )
    ball.cewt.project()


class _Hyperball:
    """The hooks of one optimizer."""

    def __init__(self, turns: dict[Tensor, Turn | None], norms_only: list[Tensor], every: int) -> None:
        self.cewt = CEWT([], turns, norms_only=norms_only, at_once=False)
        self.every = every
        self._kept: dict[Tensor, Tensor | None] = {}

    def before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a step: a closure is evaluated while the weights are there."""
        # A step that raised left its weights at zero; they may have been loaded since.
        self.cewt.restore({weight: was for weight, was in self._kept.items() if not local(weight).any()})
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args, kwargs = args[:1], {**kwargs, "closure": lambda: loss}
        self._kept = self.cewt.before()
        return args, kwargs

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After it."""
        del args, kwargs
        kept, self._kept = self._kept, {}
        groups = _groups(optimizer)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        steps = groups[0][STEPS] + 1
        for group in groups:
            group[STEPS] = steps
        self.cewt.after(kept, lambda weight: rates[id(weight)], self.every > 0 and steps % self.every == 0)

    def look(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Refuse the state of an optimizer without this hyperball before anything of it is taken."""
        mine, given = (
            [_count(group) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
        )
        if mine != given:
            raise BellboxError(
                "the state is that of an optimizer with another hyperball, or none: build the optimizer as it was built"
                " when the state was saved"
            )

    def take(self, optimizer: Optimizer) -> None:
        """The norms that a state brought along."""
        for group in _groups(optimizer):
            norms = group[NORMS].double().cpu()
            self.cewt.norms.update(
                (p, norm.to(p.device)) for p, norm in zip(group["params"], norms.unbind(), strict=True)
            )


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if NORMS in group]


def _count(group: Mapping[str, Any]) -> int:
    """Constrained weights in a group."""
    norms = group.get(NORMS)
    return 0 if norms is None else len(norms)


def _separate(optimizer: Optimizer, norms: Mapping[Tensor, Tensor], lr: float) -> None:
    """Give constrained weights groups of their own, with the hyperball's rate and what it remembers."""
    chosen = {id(weight): norm for weight, norm in norms.items()}
    for group in list(optimizer.param_groups):
        inside = [id(p) in chosen for p in group["params"]]
        if not any(inside):
            continue
        rate = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr
        if not all(inside):
            made = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            names = group.get("param_names")
            moved = [
                p if names is None else (names[i], p) for i, p in enumerate(group["params"]) if inside[i]
            ]
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [each for each, there in zip(group[key], inside, strict=True) if not there]
            optimizer.add_param_group({**made, "params": moved})
            group = optimizer.param_groups[-1]
        group["lr"] = rate
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
        group.pop("lr_scale", None)  # which was of the former rate
        group[NORMS] = torch.stack([chosen[id(p)].cpu() for p in group["params"]])
        group[STEPS] = 0


def _require_fp32(weight: Tensor) -> None:
    if weight.dtype != torch.float32:
        raise BellboxError(
            f"hyperball: a weight of shape {tuple(weight.shape)} is {weight.dtype}: steps of 2 % of a norm need fp32; "
            "keep master weights in fp32 and train under autocast"
        )


def _inner(optimizer: Optimizer) -> Optimizer:
    """The optimizer within what accelerate puts around it, whose step calls the inner one's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer
