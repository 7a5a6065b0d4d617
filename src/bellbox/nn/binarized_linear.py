"""The layer that a binarized weight matrix becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bellbox.core import packing
from bellbox.core.binarize import BILLM_SCALES, RTN_SCALES, Binarized, decode
from bellbox.nn.input_cache import keeping_dtype
from bellbox.ops import native
from bellbox.ops.binarized_linear import Planes, empty_layout, is_faster, lay_out, operation, read_back
from bellbox.ops.dispatch import is_unwatched


def round_activations(x: Tensor, bits: int) -> Tensor:
    """Round each token to integers of its own scale, symmetric: max|x| becomes 2^(bits-1) - 1.

    Args:
        x: float `[..., features]`.
        bits: 2 to 15; 16 leaves `x` as it is.
    """
    if bits >= 16:
        return x
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / most
    return (x / scale).round_() * scale


class BinarizedLinear(nn.Module):
    """A linear layer whose weights are stored as signs, bits and fp16 scales (`core/binarize.py` says how they decode).

    Args:
        in_features: length of the last dimension of the input.
        out_features: length of the last dimension of the output.
        bias: whether there is a bias.
        block: columns that share a row's scales.
        residual: whether there are bits and salient columns; false for rounding to nearest.
        activation_bits: what each token of the input is rounded to; 16 for no rounding.

    Its state dict is what is stored: `signs` and `bits` uint8 `[out, ceil(in / 8)]`, `salient` uint8
    `[1, ceil(in / 8)]`, `scales` fp16 `[out, blocks, 7 or 2]`, `bias` fp32 `[out]`. Its buffers are that in the layout
    of the kernels where there are bits, so that nothing is derived that could go stale.

    With inputs of at most 8 bits and few rows (a decode step) the operation `bellbox::binarized_linear` multiplies
    signs and bits as they are. Else the weights are decoded at the first use and kept in fp32. The two agree to
    rounding in fp32.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        block: int,
        residual: bool,
        activation_bits: int = 16,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block, self.activation_bits = block, activation_bits
        self.residual, self._decoded = residual, cast(tuple[tuple[int, ...], Tensor] | None, None)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        if residual:
            self._keep(empty_layout(out_features, in_features, block))
        else:
            for name, like in self._stored_shapes().items():
                self.register_buffer(name, torch.zeros(like.shape, dtype=like.dtype), persistent=False)

    def _keep(self, laid: Planes) -> None:
        for name, tensor in laid._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def _laid(self) -> Planes:
        return Planes(self.planes, self.scales, self.order, self.steps)  # type: ignore[arg-type]

    @classmethod
    def from_blocks(cls, blocks: Sequence[Binarized], bias: Tensor | None, block: int) -> BinarizedLinear:
        """Pack what `binarize_matrix` gave."""
        signs = torch.cat([one.signs for one in blocks], 1)
        rows, columns = signs.shape
        layer = cls(columns, rows, bias is not None, block, blocks[0].bits is not None)
        stored = {"signs": _pack(signs), "scales": torch.stack([one.scales for one in blocks], 1)}
        if layer.residual:
            stored["bits"] = _pack(torch.cat([one.bits for one in blocks if one.bits is not None], 1))
            stored["salient"] = _pack(
                torch.cat([one.salient for one in blocks if one.salient is not None])[None]
            )
        if bias is not None:
            stored["bias"] = bias.detach()
        layer.load_state_dict(stored)
        return layer

    def stored(self) -> dict[str, Tensor]:
        """What files hold of the weights; see the class."""
        if not self.residual:
            return {"signs": self.signs, "scales": self.scales}  # type: ignore[dict-item]
        if self._laid.planes.is_meta:
            return self._stored_shapes()
        signs, bits, salient, scales = read_back(self._laid, self.out_features, self.in_features)
        return {"signs": _pack(signs), "bits": _pack(bits), "salient": _pack(salient[None]), "scales": scales}

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Keys of `stored`."""
        return tuple(self._stored_shapes())

    def _stored_shapes(self) -> dict[str, Tensor]:
        size, blocks = packing.row_bytes(self.in_features, 2), -(-self.in_features // self.block)
        rows = {"signs": self.out_features}
        if self.residual:
            rows |= {"bits": self.out_features, "salient": 1}
        count = BILLM_SCALES if self.residual else RTN_SCALES
        with torch.device("meta"):
            made = {name: torch.empty(one, size, dtype=torch.uint8) for name, one in rows.items()}
            return {**made, "scales": torch.empty(self.out_features, blocks, count, dtype=torch.float16)}

    def weight(self) -> Tensor:
        """The weights, fp32 `[out, in]`, decoded now or before."""
        tensors = [t for name, t in self._buffers.items() if name != "bias"]
        if not all(t is not None and is_unwatched(t) for t in tensors):
            return self._decode()
        key, kept = native.fingerprint(tensors), self._decoded
        if key is None or kept is None or kept[0] != key:
            weight = self._decode()
            if key is None:  # nobody can tell whether they were written to since
                return weight
            self._decoded = kept = (key, weight)
        return kept[1]

    @torch.no_grad()
    def _decode(self) -> Tensor:
        bits = salient = None
        if self.residual:
            signs, bits, salient, scales = read_back(self._laid, self.out_features, self.in_features)
        else:
            signs, scales = packing.unpack(self.signs, self.in_features, 2).bool(), self.scales  # type: ignore[arg-type]
        parts = []
        for number, first in enumerate(range(0, self.in_features, self.block)):
            here = slice(first, first + self.block)
            some_bits = None if bits is None else bits[:, here]
            some_salient = None if salient is None else salient[here]
            parts.append(decode(Binarized(signs[:, here], some_bits, some_salient, scales[:, number])))  # type: ignore[index]
        return torch.cat(parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        fits = self.residual and x.shape[-1:] == (self.in_features,)
        if fits and is_faster(x, self.activation_bits):
            laid = self._laid
            return operation.direct(x, *laid, self.bias, self.out_features, self.block, self.activation_bits)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(round_activations(x, self.activation_bits), self.weight().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.stored_bits() / (self.in_features * self.out_features):.3g}, "
            f"activation_bits={self.activation_bits}"
        )

    def stored_bits(self) -> int:
        """Bits of everything that is stored for the weights: planes, salient columns and scales."""
        return sum(8 * t.nbytes for t in self._stored_shapes().values())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = self._stored_shapes()
        found: dict[str, Tensor] = {}
        for name, wanted in expected.items():
            tensor = state_dict.get(prefix + name)
            if tensor is None:
                missing_keys.append(prefix + name)
            elif tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
                error_msgs.append(
                    f"{prefix}{name} is {tensor.dtype} {tuple(tensor.shape)}, the layer needs {wanted.dtype} "
                    f"{tuple(wanted.shape)}"
                )
            else:
                found[name] = tensor
        rest = {
            name: value for name, value in state_dict.items() if name.removeprefix(prefix) not in expected
        }
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(found) < len(expected):
            return
        home = next(t.device for name, t in self._buffers.items() if t is not None and name != "bias")
        if home.type != "meta":
            found = {name: tensor.to(home) for name, tensor in found.items()}
        if self.residual:
            signs, bits, salient = (
                packing.unpack(found[name], self.in_features, 2).bool()
                for name in ("signs", "bits", "salient")
            )
            self._keep(lay_out(signs, bits, salient[0], found["scales"], self.block))
        else:
            self.signs, self.scales = found["signs"].clone(), found["scales"].clone()

    def __getstate__(self) -> dict[str, Any]:
        """A copy decodes for itself."""
        return {**self.__dict__, "_decoded": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BinarizedLinear:
        """Follow moves between devices, never a change of dtype: fp16 scales are what is stored."""
        return super()._apply(keeping_dtype(fn), recurse)


def _pack(bits: Tensor) -> Tensor:
    return packing.pack(bits.to(torch.uint8), 2)
