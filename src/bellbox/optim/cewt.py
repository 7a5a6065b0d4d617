"""CEWT, constrained empirical weight distribution: weights that are exactly Gaussian after every step.

A quantizer with equally likely codes assumes a bell. Weights start as one and drift away while they learn, and with
them the entropy of their codes. CEWT (the BBQ authors' follow-up, 2026) does not let them: after each optimizer step
a matrix is replaced by the one of the same rank order whose values are exactly the quantiles of a Gaussian,

    w_i = s * Phi^-1((r_i + 1/2) / N)        r_i: rank of the i-th of N entries, 0 .. N-1

with s such that the norm is the one that the matrix had at first. Codes cut at Gaussian quantiles of the whole matrix
(`weight_granularity: tensor`) are then used exactly equally often; of each row, very nearly. No rotation of the weights
is needed for it, so they can be learned directly in the rotated domain (`weights_rotated`); weights that are not are
projected in that domain all the same, since it is there that they are coded, and rotated back.

With it goes the *hyperball* step: since the norm is fixed, only the direction of an update counts. It is scaled to
the norm of the matrix and multiplied with a learning rate of its own, in place of weight decay:

    W <- project(W + lr * |W_0| * U / |U|)        U: what the wrapped optimizer would have added

**Ours and the published one.** What is described here serves both. As published, with the quantizer of
`bellbox.quantizers.cewt`, a projection follows every step and none goes before the first, the rate is .01 (95M and
125M parameters; .005 at 200M, .0025 at 300M), linear layers begin as LeCun's (`bellbox.models.lecun_`), and the weight
of the output layer is on the hyperball as well, never projected: `norms_only=head_weights(model), at_once=False`, or
`method: cewt` of a run. Ours is BBQ with learned gammas, at .02, projected at once and every 16 steps: `method: bbq`.

**How often.** Learned in the domain that they are coded in, weights stay nearly Gaussian by themselves: a projection
now and then, and one at the end, keeps the codes as equally used as one after every step, and the perplexity is the
same (docs/studies.md).

**The cost** is one sort. The bits of fp32 numbers, with those of negative ones flipped, sort as integers, which PyTorch
does by radix: 4 passes, some 10 ns an entry, ties by position. `benchmarks/cewt.py` measures it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.core.sharded import local, whole, write_whole
from bellbox.errors import BellboxError
from bellbox.nn import QuantizedExpert, QuantizedLayer, quantized_layers
from bellbox.structure import embedding_weights, outputs

Turn = Callable[[Tensor, bool], Tensor]
"""Rotates a weight into the domain that it is coded in; called with True, back from there."""


@functools.lru_cache(maxsize=16)
def normal_scores(count: int, device: torch.device) -> Tensor:
    """Phi^-1((r + 1/2) / count) for r = 0 .. count - 1, scaled to an RMS of 1.

    Args:
        count: how many, 2 at least.
        device: where they are computed, and kept for the next call.

    Returns:
        fp32 `[count]`, rising.

    Examples:
        >>> bb.optim.normal_scores(3, torch.device("cpu"))
        tensor([-1.2247,  0.0000,  1.2247])
    """
    ranks = torch.arange(count, dtype=torch.float64, device=device)
    scores = torch.special.ndtri((ranks + 0.5) / count)
    scores = (scores - scores.flip(0)) / 2  # odd to the last bit
    return (scores / scores.square().mean().sqrt()).float()


@torch.no_grad()
def project_(weight: Tensor, norm: float | Tensor) -> Tensor:
    """Replace a matrix, in place, by the one of the same rank order whose values are exactly Gaussian.

    Equal entries are ranked by position, so the result is a function of the values alone.

    Args:
        weight: fp32, contiguous, at least 2 entries, none of them NaN.
        norm: Frobenius norm of the result.

    Raises:
        BellboxError: another dtype, or a view that is not contiguous.

    Examples:
        >>> weight = torch.tensor([[0.1, 5.0, -3.0]])
        >>> bb.optim.project_(weight, norm=1.0)
        tensor([[ 0.0000,  0.7071, -0.7071]])
    """
    if weight.dtype != torch.float32 or not weight.is_contiguous() or weight.numel() < 2:
        raise BellboxError(
            f"CEWT sorts contiguous fp32 matrices, not {weight.dtype} of shape {tuple(weight.shape)}; "
            "keep master weights in fp32"
        )
    flat = weight.detach().view(-1)
    bits = flat.view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    order = torch.sort(keys, stable=True).indices
    scores = normal_scores(flat.numel(), flat.device)
    flat.scatter_(0, order, scores * (norm / flat.numel() ** 0.5))
    return weight


class CEWT:
    """CEWT around one or several optimizers; `step` takes the place of theirs (`hyperball` hooks into one instead).

    The weights are zero while the optimizers step: what they leave there is the update alone, to the last bit, and
    decay pulls on nothing. So an optimizer must add its update to what it finds; one that keeps a copy of the weights
    (schedule-free, fp32 masters of bf16) does not.

    Args:
        optimizers: which train the weights, and perhaps other parameters, which they step as usual.
        weights: fp32 matrices to constrain; as a mapping, with how those are rotated that are coded in another domain
            than they are learned in.
        hyperball: whether updates are scaled to the norm; otherwise the optimizers' own are taken as they are.
        norms_only: further matrices, which keep their norm and are never projected; without `hyperball` they are left
            alone.
        at_once: whether `weights` are projected now; else the first step does.
        norms: what weights keep, where that is known; else the norms that they have.

    A weight of zeros has neither a norm to keep nor a rank order: the optimizers step it as usual.

    Raises:
        BellboxError: see `project_`.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), bb.Recipe.bbq(bits=2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> cewt = bb.optim.CEWT([optimizer], bb.optim.constrained_weights(model))
        >>> for step in range(2):
        ...     model(torch.randn(4, 64)).square().mean().backward()
        ...     cewt.step(lr=0.02, project=step % 16 == 0)
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        weights: Iterable[Tensor] | Mapping[Tensor, Turn | None],
        hyperball: bool = True,
        norms_only: Iterable[Tensor] = (),
        at_once: bool = True,
        norms: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self.optimizers, self.hyperball = optimizers, hyperball
        self._turns: dict[Tensor, Turn | None] = (
            dict(weights) if isinstance(weights, Mapping) else dict.fromkeys(weights)
        )
        self.norms: dict[Tensor, Tensor] = {}
        """The norm that each weight keeps, 0-dimensional fp64."""
        for weight in (*self._turns, *(norms_only if hyperball else ())):
            norm = norms[weight] if norms is not None and weight in norms else _norm(weight)
            if norm > 0:
                self.norms[weight] = norm
                if at_once and weight in self._turns:
                    self._project(weight)

    @torch.no_grad()
    def _project(self, weight: Tensor) -> None:
        turn, own = self._turns[weight], weight.detach()
        full = whole(own)  # ranks are those of all entries, wherever they lie
        if turn is None:
            project_(full, self.norms[weight])
        else:
            full = turn(project_(turn(full, False).contiguous(), self.norms[weight]), True)
        if full is not own:
            write_whole(own, full)

    def project(self) -> None:
        """Make all weights Gaussian now, at the norms that they keep."""
        for weight in self.norms:
            if weight in self._turns:
                self._project(weight)

    @torch.no_grad()
    def settle(self, project: bool) -> None:
        """Bring weights that were changed outside of a step back to the norms that they keep.

        Args:
            project: whether to make them Gaussian too; without it, and without hyperball, nothing is done.
        """
        for weight in self.norms:
            self._bring_back(weight, project)

    def _bring_back(self, weight: Tensor, project: bool) -> None:
        if project and weight in self._turns:
            self._project(weight)
        elif self.hyperball:
            local(weight.detach()).mul_((self.norms[weight] / _norm(weight)).float())

    @torch.no_grad()
    def before(self) -> dict[Tensor, Tensor | None]:
        """What comes before the optimizers' step: weights become zero, so that the step leaves its update there.

        Returns:
            the weights that are to move, and what this process' part of them was; None without hyperball, where they
            stay.
        """
        kept: dict[Tensor, Tensor | None] = {}
        for weight in self.norms:
            if weight.grad is not None:
                own = local(weight.detach())
                kept[weight] = own.clone() if self.hyperball else None
                if self.hyperball:
                    own.zero_()
        return kept

    @torch.no_grad()
    def restore(self, kept: Mapping[Tensor, Tensor | None]) -> None:
        """Where a step failed: the weights as they were before it."""
        for weight, was in kept.items():
            if was is not None:
                local(weight.detach()).copy_(was)

    @torch.no_grad()
    def after(
        self, kept: Mapping[Tensor, Tensor | None], rate: Callable[[Tensor], Any], project: bool
    ) -> None:
        """What comes after it: scale the updates, add them to what the weights were, keep norms or project.

        Args:
            kept: what `before` gave.
            rate: how far a weight moves, in units of its norm.
            project: whether to sort.
        """
        for weight, was in kept.items():
            if was is not None:
                norm, length = self.norms[weight], _norm(weight)
                # An update of zero moves nothing.
                scale = torch.where(length > 0, rate(weight) * norm / length, 0.0).float()
                local(weight.detach()).mul_(scale).add_(was)
            self._bring_back(weight, project)

    def step(self, lr: float, project: bool = True) -> None:
        """One step of all the parameters.

        Args:
            lr: of the hyperball: how far a weight moves, in units of its norm.
            project: whether to sort; without it, only the norms are kept (and not even these without hyperball).
        """
        kept = self.before()
        try:
            for optimizer in self.optimizers:
                optimizer.step()
        except BaseException:
            self.restore(kept)
            raise
        self.after(kept, lambda _: lr, project)


def _norm(weight: Tensor) -> Tensor:
    """Frobenius norm of the whole matrix, fp64 `[]`, the same in all processes that hold parts of it."""
    return whole(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))


def constrained_weights(model: nn.Module) -> dict[Tensor, Turn | None]:
    """The weights of all the layers of a prepared model that quantize their weight, each once, as `CEWT` takes them.

    Experts in one 3-D parameter are not among them: a matrix of theirs is no parameter of an optimizer.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), bb.Recipe.bbq(bits=2))

        >>> [tuple(weight.shape) for weight in bb.optim.constrained_weights(model)]
        [(32, 64), (8, 32)]
    """
    return {
        layer.stored_weight: None if layer.weights_rotated else layer.turned
        for _, layer in quantized_layers(model)
        if layer.weight_quantizer is not None
        and layer.stored_weight.requires_grad
        and not isinstance(layer, QuantizedExpert)
    }


def head_weights(model: nn.Module) -> list[Tensor]:
    """The trained weights of the linear layers that give the outputs; none that is tied or quantized.

    Such a layer is known by the model's structure (`bellbox.structure.outputs`), whatever its name.

    Examples:
        >>> class Tiny(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 16)
        >>> [tuple(weight.shape) for weight in bb.optim.head_weights(Tiny())]
        [(16, 8)]
    """
    embeddings = embedding_weights(model)
    heads = [model.get_submodule(name) for name in outputs(model)]
    weights = [
        head.weight for head in heads if isinstance(head, nn.Linear) and not isinstance(head, QuantizedLayer)
    ]
    trained = [weight for weight in weights if weight.requires_grad and id(weight) not in embeddings]
    return list({id(weight): weight for weight in trained}.values())
