"""A weight that is computed when somebody looks: what `layer.weight` of a rotated or a packed layer is.

Models and tools read a layer's weight past its forward: they ask for its dtype, tie it, add an adapter's product to it,
hand it to a functional kernel. Where the layer stores something else than that weight (rotated, or codes), this tensor
stands in. Shape, dtype and device are answered without any work; every function of torch gets the decoded weight,
differentiable with respect to what is stored; what writes in place, `.data` and `.grad` included, goes through to the
stored tensor, or is refused where codes are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from bellbox.errors import BellboxError

# fmt: off
_METADATA = frozenset((
    "_is_param", "device", "dtype", "is_cpu", "is_cuda", "is_ipu", "is_leaf", "is_maia", "is_meta",
    "is_mkldnn", "is_mps", "is_mtia", "is_nested", "is_quantized", "is_sparse", "is_vulkan", "is_xla",
    "is_xpu", "itemsize", "layout", "names", "nbytes", "ndim", "output_nr", "requires_grad",
    "retains_grad", "shape",
))
_METHODS = frozenset((
    "__hash__", "__len__", "dim", "element_size", "get_device", "has_names", "is_complex", "is_conj",
    "is_contiguous", "is_floating_point", "is_inference", "is_neg", "is_signed", "ndimension",
    "nelement", "numel", "size", "storage_offset", "stride",
))
_AUGMENTED = frozenset((
    "__iadd__", "__iand__", "__ifloordiv__", "__ilshift__", "__imod__", "__imul__", "__ior__",
    "__ipow__", "__irshift__", "__isub__", "__itruediv__", "__ixor__",
))
_VIEWS = frozenset((
    "__getitem__", "diagonal", "expand", "expand_as", "flatten", "movedim", "narrow", "permute", "reshape", "select",
    "squeeze", "t", "transpose", "unflatten", "unsqueeze", "view", "view_as",
))
# fmt: on


class WeightSource(ABC):
    """Where a lazy weight comes from and where writes go."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The weight, differentiable with respect to what is stored."""

    @abstractmethod
    def write(self, weight: Tensor) -> None:
        """Store a weight in place of the present one; no gradient.

        Raises:
            BellboxError: what is stored cannot be written this way.
        """

    def was_used(self) -> None:  # noqa: B027 (most need nothing)
        """Called where somebody computes with the weight itself, not with its `.data`."""

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The tensor that is stored."""

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """The gradient of the weight, from that of what is stored."""

    @abstractmethod
    def set_gradient(self, gradient: Tensor | None) -> None:
        """The way back from `gradient`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightSource:
        """A copy of a lazy weight would not follow its layer."""
        raise BellboxError("a lazy weight is copied as a plain tensor: use weight.detach().clone()")


class LazyWeight(Tensor):
    """See the module. Made by `LazyWeight.of`."""

    _source: WeightSource
    _detached: bool
    _is_param: bool

    @staticmethod
    def of(
        source: WeightSource, shape: Sequence[int], dtype: torch.dtype, detached: bool = False
    ) -> LazyWeight:
        """A weight of `shape` and `dtype` on the device of what is stored."""
        stored = source.stored
        wanted = stored.requires_grad and not detached
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            LazyWeight, torch.Size(shape), dtype=dtype, device=stored.device, requires_grad=wanted
        )
        made._source, made._detached = source, detached
        made._is_param = (
            isinstance(stored, torch.nn.Parameter) and not detached
        )  # isinstance(weight, Parameter) holds
        return cast(LazyWeight, made)

    def __new__(cls, *_: Any, **__: Any) -> LazyWeight:
        """Refused: a lazy weight belongs to a layer."""
        raise BellboxError("a lazy weight belongs to a layer; take layer.weight")

    def decoded(self) -> Tensor:
        """The weight as a plain tensor."""
        if not self._detached:
            self._source.was_used()
        weight = self._source.decode()
        return weight.detach() if self._detached else weight

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain tensor."""
        copied = self.decoded().detach().clone()
        return torch.nn.Parameter(copied, self.requires_grad) if self._is_param else copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A plain tensor."""
        return self.decoded().detach().clone().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        """The numbers, as of a plain tensor."""
        return f"LazyWeight({self.decoded()!r})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer about the tensor itself, write through, or compute with the decoded weight."""
        del types
        kwargs = dict(kwargs or {})
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        first = args[0] if args else None
        if isinstance(first, LazyWeight):
            if name in ("__get__", "__set__") and owner is not None:
                return _attribute(first, getattr(owner, "__name__", ""), name, args, func)
            if name in _METHODS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if name in ("data_ptr", "untyped_storage", "_typed_storage", "storage"):
                return getattr(first._source.stored, name)()
            if name == "detach":
                return LazyWeight.of(first._source, first.shape, first.dtype, detached=True)
            if name == "requires_grad_":
                first._source.stored.requires_grad_(*args[1:], **kwargs)
                return first
            if name in _VIEWS and (first._detached or not torch.is_grad_enabled()):
                return _view(first, func, args, kwargs)
            if (
                name in _AUGMENTED
                or name == "__setitem__"
                or (name.endswith("_") and not name.endswith("__"))
            ):
                return _written(first, func, args, kwargs)
        if isinstance(first, tuple | list) and name.endswith("_") and not name.endswith("__"):
            return _all_written(first, func, args, kwargs)
        given = kwargs.get("tensor")  # as torch.nn.init hands it on
        if isinstance(given, LazyWeight) and name.endswith("_") and not name.endswith("__"):
            del kwargs["tensor"]
            return _written(given, lambda plain, **rest: func(tensor=plain, **rest), (given, *args), kwargs)
        if isinstance(kwargs.get("out"), LazyWeight):
            target: LazyWeight = kwargs.pop("out")
            target._source.write(func(*_plain(args), **_plain(kwargs)))
            return target
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What comes past `__torch_function__`, from C++ or a tool that switched it off: the decoded weight again."""
        del types
        return func(*_plain(args), **_plain(dict(kwargs or {})))


class _ViewSource(WeightSource):
    """A part or another shape of a lazy weight, for what writes into it."""

    def __init__(self, base: LazyWeight, look: Callable[[Tensor], Tensor]) -> None:
        self._base, self._look = base, look

    def decode(self) -> Tensor:
        """See `WeightSource`."""
        return self._look(self._base.decoded())

    def write(self, weight: Tensor) -> None:
        """See `WeightSource`."""
        with torch.no_grad():
            plain = self._base.decoded().detach().clone()
            self._look(plain).copy_(weight)
        self._base._source.write(plain)

    @property
    def stored(self) -> Tensor:
        """See `WeightSource`."""
        return self._base._source.stored

    def gradient(self) -> Tensor | None:
        """See `WeightSource`."""
        grad = self._base._source.gradient()
        return None if grad is None else self._look(grad)

    def set_gradient(self, gradient: Tensor | None) -> None:
        """See `WeightSource`."""
        del gradient
        raise BellboxError("the gradient of a part of a weight cannot be set")


def _view(weight: LazyWeight, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function that gives views gives of a lazy weight: one that writes go through, where it is one tensor."""
    rest, named = _plain(args[1:]), _plain(kwargs)

    def look(plain: Tensor) -> Any:
        return func(plain, *rest, **named)

    found = look(weight.decoded())
    if not isinstance(found, Tensor):
        return found
    return LazyWeight.of(_ViewSource(weight, look), found.shape, found.dtype, detached=True)


def _attribute(
    weight: LazyWeight, attribute: str, kind: str, args: tuple[Any, ...], func: Callable[..., Any]
) -> Any:
    source = weight._source
    if kind == "__get__":
        if attribute == "data":
            return LazyWeight.of(source, weight.shape, weight.dtype, detached=True)
        if attribute == "grad":
            return source.gradient()
        if attribute == "_version":
            return source.stored._version
        if attribute in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        return func(weight.decoded())
    value = args[1]
    if attribute == "data":
        if isinstance(value, LazyWeight) and value._source is source:
            return None  # `weight.data += d` has written already
        source.write(_plain((value,))[0])
    elif attribute == "grad":
        source.set_gradient(value)
    elif attribute == "requires_grad":
        source.stored.requires_grad = value
    else:
        raise BellboxError(f"weight.{attribute} of a low-bit layer cannot be set")
    return None


def _written(
    weight: LazyWeight, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LazyWeight:
    """The weight after an operation in place, which has gone through to what is stored."""
    with torch.no_grad():
        plain = weight.decoded().detach().clone()
        func(plain, *_plain(args[1:]), **_plain(kwargs))
        weight._source.write(plain)
    return weight


def _all_written(
    tensors: Sequence[Tensor], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """An operation in place on several tensors, as optimizers do; lazy ones are written through."""
    with torch.no_grad():
        plain = [t.decoded().detach().clone() if isinstance(t, LazyWeight) else t for t in tensors]
        found = func(plain, *_plain(args[1:]), **_plain(kwargs))
        for weight, written in zip(tensors, plain, strict=True):
            if isinstance(weight, LazyWeight):
                weight._source.write(written)
    return found


def _plain(value: Any) -> Any:
    """`value` with every lazy weight in it decoded."""
    if isinstance(value, LazyWeight):
        return value.decoded()
    if isinstance(value, tuple | list):
        return type(value)(_plain(each) for each in value) if not hasattr(value, "_fields") else value
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value
