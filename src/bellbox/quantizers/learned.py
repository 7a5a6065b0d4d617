"""Numbers of a quantizer's own, which a first tensor sets and which are then trained."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bellbox.errors import BellboxError
from bellbox.ops.transforms import constant_when_traced
from bellbox.quantizers.base import Quantizer
from bellbox.quantizers.first_scale import first_scale
from bellbox.quantizers.moments import Moments
from bellbox.quantizers.spec import QuantizerSpec

_functorch: Any = torch._C._functorch  # pyright: ignore


def unset(*shape: int) -> Tensor:
    """A scale that is not set: NaN."""
    # On the CPU, whatever device is the default: who makes the quantizer moves it.
    return torch.full(shape, math.nan, device="cpu")


class LearnedQuantizer(Quantizer):
    """A quantizer with numbers of its own that a first tensor sets: its parameters and floating-point buffers.

    A number that is not set yet is NaN, so that whether it is set is told by the state, however that arrived. Scales
    of a whole tensor are `[1]` (FSDP2 shards no 0-d parameter); where they are used they are viewed as `[]`, which
    does not decide the dtype of a product.
    """

    gradient_by_row = False
    """Whether gradients of scales of inputs do not depend on how many rows come at once
    (`bellbox.optim.scale_gradients_by_row`)."""
    share: float = 1.0
    """Of an input: what comes at once, over what one process would see at once."""

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self._known: tuple[int, ...] | None = None
        self._stands_in = False
        self._set_by_batch = False
        self.collector: Callable[[LearnedQuantizer, Tensor], None] | None = None
        """Takes the rows that come, and may set the numbers from them, while `bb.calibrate` runs."""

    def own_scales(self) -> dict[str, Tensor]:
        """What a first tensor sets, by name."""
        own = {**self._parameters, **self._buffers}
        return {name: t for name, t in own.items() if t is not None and t.is_floating_point()}

    @property
    def is_set(self) -> bool:
        """Whether each number of its own has memory, and none is NaN.

        Reading costs under a microsecond a number on a CPU. On other devices it would wait for the device, so there a
        set scale is taken for set until the state is loaded anew or moves.
        """
        scales = [plain_tensor(t) for t in self.own_scales().values()]
        if any(t.is_meta for t in scales):
            return False
        places = tuple(t.data_ptr() for t in scales) if any(t.device.type != "cpu" for t in scales) else None
        if places is not None and places == self._known:
            return True
        found = not any(_holds_nan(t) for t in scales)
        self._known = places if found else None
        return found

    def learned(self, name: str) -> Tensor:
        """A number of its own as it is computed with: `[]` for a whole tensor's.

        One for a number that is not set since all that came yet was zero: what it is multiplied with is then known.
        """
        value = getattr(self, name)
        value = value.reshape(()) if value.shape == (1,) else value
        return torch.where(value.isnan(), 1.0, value) if self._stands_in else value

    @torch.no_grad()
    def unset(self) -> None:
        """Forget what was set; the next tensor sets it."""
        self._forget()
        for scale in self.own_scales().values():
            scale.fill_(math.nan)

    def set_from(self, x: Tensor) -> None:
        """Set the numbers from a first tensor, fp64 `[rows, features]`, finite and not all zero for an activation."""
        self.set_from_moments(Moments(x))

    def set_from_moments(self, moments: Moments) -> None:
        """`set_from`, by the few numbers of the tensor that several processes can bring together.

        A method overrides this one; or `set_from`, where they do not suffice: its activations are then not calibrated
        in several processes.
        """
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set the numbers from a first tensor, `[..., features]`; an activation does so itself on the first batch.

        Of a tensor on the meta device nothing can be told: they stay unset.
        """
        if x.is_meta:
            return
        wide = x.detach().to(torch.float64).reshape(-1, self.features)
        if self.rows is None and not 0 < float(wide.square().mean()) < math.inf:
            return  # a dead or broken first batch says nothing about the scale: wait for the next
        self.set_from(wide)

    def continue_from(self, before: LearnedQuantizer) -> bool:  # noqa: ARG002
        """Take over the numbers of one that quantized the same tensor to other levels, where they mean the same.

        Returns:
            Whether they do; else nothing is changed, and a first tensor sets them. A method overrides this.
        """
        return False

    def see_first(self, rows: Tensor) -> None:
        """Set the scale from the first rows. With one that is still not set, ones are computed with: see `learned`."""
        if torch.compiler.is_compiling():
            self._see_first_in_graph(rows)
            return
        found = self.is_set
        if self.collector is not None:
            self.collector(self, rows)
            found = self.is_set
        elif not found and rows.numel():
            self._leave_meta(rows.device)
            if not rows.is_meta:
                self._require_a_place_to_set()
            self.initialize(rows)
            found = self._set_by_batch = self.is_set
            if found and self.rows is None and not self.training:
                warnings.warn(  # without a name: one line for a model
                    "scales of inputs were not set and are taken from the first batch of evaluation; "
                    "bb.calibrate(model, batches) sets them from data of your choice",
                    stacklevel=2,
                )
        self._stands_in = not found

    def _leave_meta(self, device: torch.device) -> None:
        """Numbers that stayed on the meta device, as where a plain state was assigned, go to where their input is."""
        for name, scale in self.own_scales().items():
            if scale.is_meta and device.type != "meta":
                if hasattr(
                    self, "_hf_hook"
                ):  # accelerate brings it for the forward of this module, which not all call
                    raise BellboxError(
                        f"{self.name or 'a quantizer'}: its scale is offloaded and did not come back with its layer: "
                        "give preload_module_classes=['QuantizedLinear', ...] to accelerate, the classes of such layers"
                    )
                real = torch.full_like(scale, math.nan, device=device)
                if isinstance(scale, nn.Parameter):
                    setattr(self, name, nn.Parameter(real, scale.requires_grad))
                else:
                    setattr(self, name, real)

    def _require_a_place_to_set(self) -> None:
        where, way_out = self.name or "a quantizer", "call bb.calibrate(model, batches) before the first step"
        if transforming():
            raise BellboxError(
                f"{where}: its scale is not set, and within torch.func it cannot be: run one batch through the model, "
                "or bb.calibrate(model, batches), before"
            )
        if self._set_by_batch and distributed():
            raise BellboxError(
                f"{where}: its scale was set by a batch and is lost again (under FSDP a forward sees a copy): {way_out}"
            )
        count = processes()
        if self.rows is None and count > 1:  # a weight is the same in all of them
            raise BellboxError(
                f"{where}: its scale is not set, and each of {count} processes would take it from a batch of its own: "
                f"{way_out}, in all of them"
            )

    def _forget(self) -> None:
        self._known, self._set_by_batch = None, False

    def _see_first_in_graph(self, rows: Tensor) -> None:
        """For a compiler: a graph of a quantizer that was not set when it was traced looks in each of its runs.

        It serves one batch: `_stands_in` is then another, which a compiler guards on, so the next call is traced
        anew, with scales that are set. An exported program takes scales as they are.
        """
        if torch.compiler.is_exporting() or is_set_when_traced(self):
            return
        self._stands_in = True
        scales = list(self.own_scales().values())
        spec = spec_as_json(self)
        found = first_scale(rows, scales, spec, self.features, self.rows or 0, self.name, self.training)
        with torch.no_grad():
            for scale, value in zip(scales, found, strict=True):
                scale.copy_(value)

    def adopt(self, state: dict[str, Any], prefix: str) -> None:
        """Bring the state of an earlier version into the present form, in place.

        Scales of a whole tensor were 0-d, and a buffer `initialized` said whether they were set.

        Args:
            state: tensors by name, in which this quantizer's begin with `prefix`.
            prefix: with its last dot.
        """
        initialized = state.pop(prefix + "initialized", None)
        for name, own in self.own_scales().items():
            given = state.get(prefix + name)
            if not isinstance(given, Tensor):
                continue
            if given.dim() == 0:
                given = given.reshape(own.shape) if own.numel() == 1 else given
            if initialized is not None and not bool(initialized):
                given = torch.full_like(given, math.nan)
            state[prefix + name] = given

    def divided_by_row(self, scale: Tensor, rows: Tensor) -> Tensor:
        """A learned scale, the same value, whose gradient a division by the root of the entries of `rows` follows.

        Where `gradient_by_row`, and for inputs alone, what is left of that division is the root of a row's length;
        else, where a batch is a `share` of one, it is divided as that one's would be.
        """
        if self.rows is not None or not rows.numel() or (self.share == 1 and not self.gradient_by_row):
            return scale
        factor = math.sqrt(rows.numel() / rows.shape[-1] if self.gradient_by_row else self.share)
        return scale.detach() + (scale - scale.detach()) * factor

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.adopt(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]
        self._forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        deferred = [name for name, scale in self.own_scales().items() if scale.is_meta]
        super()._apply(fn, recurse)
        self._forget()
        with torch.no_grad():
            for name in deferred:
                scale = self.own_scales()[name]
                if not scale.is_meta:  # memory without a content
                    scale.fill_(math.nan)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy looks for itself."""
        super().__setstate__(state)
        self._forget()
        self.collector = None


@constant_when_traced
def is_set_when_traced(quantizer: LearnedQuantizer) -> bool:
    """`is_set`, as a constant of a compiled graph."""
    return quantizer.is_set


@constant_when_traced
def spec_as_json(quantizer: Quantizer) -> str:
    """The specification, as an argument of an operation."""
    return json.dumps(dataclasses.asdict(quantizer.spec))


def plain_tensor(tensor: Tensor) -> Tensor:
    """The memory behind a parameter: of one that `torch.func` has wrapped, or of this rank's part of a sharded one."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    local = getattr(tensor, "_local_tensor", None)
    return tensor if local is None else local


def transforming() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, ...) runs."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def processes(group: Any = None) -> int:
    """Processes that train together."""
    return torch.distributed.get_world_size(group) if distributed() else 1


def distributed() -> bool:
    """Whether this process is one of those that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _holds_nan(tensor: Tensor) -> bool:
    if tensor.numel() == 1:
        return math.isnan(tensor.item())
    return bool(tensor.isnan().any())
