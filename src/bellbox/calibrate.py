"""Scales of inputs from batches of one's own choice, the same in all processes that train together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.quantizers.base import Quantizer
from bellbox.quantizers.learned import LearnedQuantizer, plain_tensor, processes
from bellbox.quantizers.moments import SummedMoments

_DONE = -1.0
"""In place of a quantizer's number: this process has run all of its batches."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    group: Any = None,
    again: bool = False,
    forward: Callable[[Any], object] | None = None,
) -> None:
    """Set the learned scales that are not set yet, from batches that run through the model without gradients.

    A scale follows from the statistics of all batches so far, in the order in which layers run, so that each layer is
    fed by layers whose scales are set. Where `torch.distributed` is initialised, the statistics are those of all
    processes, each with batches of its own: all of them end with equal scales, under DDP, under FSDP2 (`fully_shard`,
    nested or not) and, up to the last bit of fp32, in one process with all of the data. Every process calls it, with
    equally many batches. Weights that have no scale yet get one too. The model stays in its mode.

    Args:
        model: prepared; it may be wrapped or compiled.
        batches: what the model is called with: a tensor, a tuple of arguments, or a mapping of named ones.
        group: processes that hold the same model; all of them where None.
        again: set the scales of all inputs anew.
        forward: runs one batch, for models that are not called with it as it is; `model(batch)` where None.

    Raises:
        BellboxError: nothing is prepared, no batch, processes whose layers run in different orders, batches that set no
            scale at all, a method whose scales several processes cannot set together, or the first form of FSDP.

    Examples:
        >>> model = bb.prepare(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), bb.Recipe.bbq(bits=2))
        >>> model[0].activation_quantizer.quantizer.is_set
        False
        >>> bb.calibrate(model, [torch.randn(16, 64), torch.randn(16, 64)])
        >>> model[0].activation_quantizer.quantizer.is_set
        True
    """
    if isinstance(batches, Tensor | Mapping):
        raise BellboxError("batches is one batch: give a list of them, such as [x]")
    quantizers = [module for module in model.modules() if isinstance(module, LearnedQuantizer)]
    if not any(isinstance(module, Quantizer) for module in model.modules()):
        raise BellboxError("nothing to calibrate: the model has no quantized layers; call prepare first")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise BellboxError(
            "calibrate knows torch.distributed.fsdp.fully_shard, not FullyShardedDataParallel: use that"
        )
    exchange = _Exchange(processes(group), group)
    asked = _asked(quantizers, exchange, again)
    collected = _Collected([quantizers[i] for i in asked], exchange)
    before = {quantizer: quantizer.collector for quantizer in collected.places}
    count = 0
    try:
        for quantizer in collected.places:
            quantizer.collector = collected
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                count += 1
                _run(model, batch) if forward is None else forward(batch)
        exchange.finish(_device(model))
    finally:
        for quantizer, collector in before.items():
            quantizer.collector = collector
    if not count:
        raise BellboxError("calibrate got no batch: give at least one")
    _reshard(model)
    for quantizer, values in collected.values.items():
        for name, scale in quantizer.own_scales().items():
            _write(scale, values[name])
    left = [q.name or "a quantizer" for q in collected.places if q.rows is None and q not in collected.values]
    if left:
        shown = f"{left[0]} and {len(left) - 1} more" if len(left) > 1 else left[0]
        text = (
            f"no batch has set the scale of {shown}: nothing but zeros (or NaN) reached it, or nothing at all"
        )
        if not collected.values:
            raise BellboxError(f"{text}; calibrate with other batches")
        warnings.warn(text, stacklevel=2)


def _asked(quantizers: Sequence[LearnedQuantizer], exchange: _Exchange, again: bool) -> list[int]:
    """Places of those that are to be set: not set in some process, or inputs where all are set anew."""
    flags: list[bool] = []
    for quantizer in quantizers:
        scales = [_whole(t) for t in quantizer.own_scales().values()]
        unset = any(bool(scale.isnan().any()) for scale in scales)
        flags.append(unset or (again and quantizer.rows is None and bool(scales)))
    device = next((t.device for q in quantizers for t in q.own_scales().values()), torch.device("cpu"))
    numbers = torch.tensor([len(flags), *flags], dtype=torch.float64, device=device)
    everywhere = torch.stack(exchange.gather(numbers)).any(0).tolist()
    return [i for i, flag in enumerate(everywhere[1:]) if flag]


class _Exchange:
    """Numbers of all processes, in one collective call a time."""

    def __init__(self, count: int, group: Any) -> None:
        self.count, self.group = count, group

    def gather(self, numbers: Tensor) -> list[Tensor]:
        """fp64 `[k]` of every process, in the order of ranks; the first number must agree.

        Raises:
            BellboxError: it does not: the processes are not at the same place.
        """
        if self.count == 1:
            return [numbers]
        found = [torch.empty_like(numbers) for _ in range(self.count)]
        torch.distributed.all_gather(found, numbers.contiguous(), group=self.group)
        if len({float(each[0]) for each in found}) > 1:
            raise BellboxError(
                "calibrate: the processes do not run the same layers in the same order and equally often (a layer that "
                "only some of the data reach, or different numbers of batches): calibrate in one process, and load "
                "that state in all"
            )
        return found

    def finish(self, device: torch.device) -> None:
        """Say that this process has no more batches."""
        self.gather(torch.tensor([_DONE, *[0.0] * 5], dtype=torch.float64, device=device))


class _Collected:
    """What has come to quantizers, and the scales that they were given."""

    def __init__(self, quantizers: Sequence[LearnedQuantizer], exchange: _Exchange) -> None:
        self.places = {quantizer: i for i, quantizer in enumerate(quantizers)}
        self.values: dict[LearnedQuantizer, dict[str, Tensor]] = {}
        self._moments: dict[LearnedQuantizer, SummedMoments] = {}
        self._exchange = exchange

    def __call__(self, quantizer: LearnedQuantizer, rows: Tensor) -> None:
        """See `LearnedQuantizer.collector`."""
        if quantizer.rows is not None or not _by_moments(quantizer):
            if self._exchange.count > 1 and quantizer.rows is None:
                raise BellboxError(
                    f"{quantizer.name}: {quantizer.method} sets its scales from whole tensors (it has no "
                    "set_from_moments), which several processes cannot: calibrate in one, and load that state in all"
                )
            if quantizer not in self.values:
                quantizer.initialize(rows)
                self._keep(quantizer)
            else:  # under FSDP each forward sees a copy of what is not set
                self._put(quantizer)
            return
        own = SummedMoments.of(rows.detach().to(torch.float64))
        head = own.sums.new_tensor([float(self.places[quantizer])])
        total = self._moments.get(quantizer)
        for numbers in self._exchange.gather(torch.cat((head, own.sums))):
            part = SummedMoments(numbers[1:])
            if bool(numbers.isfinite().all()):  # what is not says nothing about the scale
                total = part if total is None else total.joined(part)
        if total is None:
            return
        self._moments[quantizer] = total
        if 0 < float(total.rms) < math.inf:
            quantizer.set_from_moments(total)
            self._keep(quantizer)

    def _keep(self, quantizer: LearnedQuantizer) -> None:
        if quantizer.is_set:
            self.values[quantizer] = {name: t.detach().clone() for name, t in quantizer.own_scales().items()}

    def _put(self, quantizer: LearnedQuantizer) -> None:
        for name, scale in quantizer.own_scales().items():
            scale.copy_(self.values[quantizer][name])


def _by_moments(quantizer: LearnedQuantizer) -> bool:
    return type(quantizer).set_from_moments is not LearnedQuantizer.set_from_moments


def _run(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**cast("Mapping[str, Any]", batch))
    elif isinstance(batch, tuple | list):
        model(*cast("Sequence[Any]", batch))
    else:
        model(batch)


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in model.parameters()), torch.device("cpu"))


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded (together with the processes that hold the rest)."""
    return cast(Any, tensor).full_tensor() if plain_tensor(tensor) is not tensor else tensor


def _reshard(model: nn.Module) -> None:
    """Have the parameters of FSDP2 be their shards again."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None and type(module).__name__.startswith("FSDP"):
            reshard()


def _write(scale: Tensor, value: Tensor) -> None:
    if plain_tensor(scale) is scale:
        scale.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, scale)
    # Every process has the value: none needs to send it.
    shard = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.to_local().copy_(shard.to_local())
