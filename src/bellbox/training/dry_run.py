"""Size, memory and arithmetic of a run, without running it: the meta device has shapes, and no weights.

*Memory* is what a training step holds at its fullest, where its backward begins: weights, gradients, the optimizer's
moments, and all that the forward saves for the backward, which autograd is asked for tensor by tensor
(`utils.memory.Saved`). It is counted in fp32: under bf16 autocast a part of the activations takes half of it.

*Arithmetic* is that of matrix products, convolutions and attention: what the forward multiplies, three times, since the
backward takes two products for each. For a transformer this is 6 operations a parameter and token, and what attention
adds. Quantizers, norms, the optimizer, validation and reading data are not counted.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bellbox.convert import prepare
from bellbox.data.images import ImageDataset
from bellbox.errors import BellboxError
from bellbox.formats.auto import kind_of
from bellbox.nn import QuantizedLayer, quantized_layers
from bellbox.runs.build import make_recipe, skeleton
from bellbox.runs.config import ResolvedConfig, TrainConfig
from bellbox.runs.phases import in_words, phases_of
from bellbox.runs.resolve import resolve
from bellbox.training.arithmetic import with_arithmetic
from bellbox.training.check import check_trainable
from bellbox.training.dry_data import DataOutlook, Vocabulary, look_at_data
from bellbox.training.optim.groups import block_matrices
from bellbox.training.tasks import make_task
from bellbox.utils.memory import Saved

_FP32 = 4
_BACKWARD_TOO = 3
"""Operations of forward and backward, in units of those of the forward."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at its fullest, in fp32. A teacher's come on top."""

    weights: int
    """Parameters and buffers, twice where averaged weights are kept."""
    gradients: int
    """Of all parameters; and of the fake-quantized weights, where several passes share them."""
    optimizer: int
    """Moments."""
    activations: int
    """What one forward pass saves for its backward, and two gradients of the logits, with which that begins."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class DryRun:
    """What a run would be and take."""

    config: ResolvedConfig
    """As the run would save it."""
    data: DataOutlook
    parameters: int
    quantized: int
    """How many of them are quantized."""
    levels: tuple[tuple[int, int | None], ...]
    """Levels of weights and of their inputs (None: full precision), each pair once."""
    phases: str
    """What its steps train, in words."""
    first_batch: tuple[int, ...]
    """Shape of what the first forward pass reads."""
    memory: Memory
    operations: int
    """Floating-point additions and multiplications of all steps."""
    attention: int
    """Those of them that are products of queries, keys and values."""

    @property
    def left_whole(self) -> int:
        """Parameters in full precision."""
        return self.parameters - self.quantized


def dry_run(config: TrainConfig) -> DryRun:
    """Look at a run before it begins. Nothing is trained or written, and no hub is asked.

    Args:
        config: as the user gave it.

    Raises:
        BellboxError: what could not be trained, as the run itself would say it.
    """
    config, _ = with_arithmetic(config.check())
    data = look_at_data(config)
    resolved = _trainable(config, data)
    shape = _first_batch(resolved, data)
    model = skeleton(resolved)
    parameters, moments = sum(p.numel() for p in model.parameters()), _moments(model, resolved)
    layers = _prepared(model, resolved)
    quantized = sum(layer.stored_weight.numel() for layer, _ in layers)
    counted, saved = _forward(model, shape, resolved)
    held = _FP32 * sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    shared = _FP32 * quantized if resolved.accumulation > 1 else 0
    times = 2 * _BACKWARD_TOO * resolved.accumulation * resolved.total_steps
    return DryRun(
        config=resolved,
        data=data,
        parameters=parameters,
        quantized=quantized,
        levels=tuple(sorted({levels for _, levels in layers}, key=str)),
        phases=in_words(phases_of(resolved)),
        first_batch=shape,
        memory=Memory(
            held * (1 if resolved.averaging is None else 2), _FP32 * parameters + shared, moments, saved
        ),
        operations=times * (counted.layers + counted.attention),
        attention=times * counted.attention,
    )


def _trainable(config: TrainConfig, data: DataOutlook) -> ResolvedConfig:
    resolved = resolve(config, data.data)
    check_trainable(resolved)
    if resolved.model.pretrained is not None:
        _require_model(resolved.model.pretrained)
    return resolved


def _prepared(
    model: nn.Module, config: ResolvedConfig
) -> list[tuple[QuantizedLayer, tuple[int, int | None]]]:
    """Prepare a model: its layers with quantized weights, and the levels of weights and inputs of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run says it, where it is of use
        prepare(model, make_recipe(config.quantization))
    found: list[tuple[QuantizedLayer, tuple[int, int | None]]] = []
    for _, layer in quantized_layers(model):
        weights, inputs = layer.weight_quantizer, layer.activation_quantizer
        if weights is not None:
            found.append((layer, (weights.levels.n, None if inputs is None else inputs.levels.n)))
    return found


def _require_model(source: str) -> None:
    """Of given weights only the folder is looked at."""
    try:
        kind_of(source)
    except BellboxError as error:
        raise BellboxError(f"model.from: {error}") from None


def _first_batch(config: ResolvedConfig, data: DataOutlook) -> tuple[int, ...]:
    """Of the data themselves where they are here."""
    if data.is_here and not isinstance(data.data, Vocabulary):
        return tuple(make_task(config, data.data).micro_batches(0)[0][0].shape)
    if isinstance(data.data, ImageDataset):
        return config.vision.micro_batch or config.vision.batch, *data.data.train.shape
    return config.batch.micro_sequences, config.data.context


def _moments(model: nn.Module, config: ResolvedConfig) -> int:
    """Bytes of two moments a parameter with AdamW; of matrices one with Muon, and with SOAP four squares more."""
    kind, more = config.optimizer.kind, 0
    for matrix in [] if kind == "adamw" else block_matrices(model):
        more += -matrix.numel() if kind == "muon" else 2 * sum(size * size for size in matrix.shape)
    return _FP32 * (2 * sum(p.numel() for p in model.parameters()) + more)


class _Counted(TorchFunctionMode):
    """Counts multiply-adds, and gives attention the fused form that the meta device has not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = self.attention = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in (F.linear, F.conv2d):
            weight = args[1]
            self.layers += result.numel() * weight[0].numel()
        return result

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        self.attention += query.numel() * key.shape[-2] + value.numel() * query.shape[-2]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, 0.0, is_causal)[0]


def _forward(model: nn.Module, shape: tuple[int, ...], config: ResolvedConfig) -> tuple[_Counted, int]:
    """Multiply-adds of one forward pass, and bytes of activations at the beginning of its backward."""
    with torch.device("meta"):
        dtype = torch.float32 if config.task == "vision" else torch.int64
        inputs = torch.empty(shape, dtype=dtype)
        with _Counted() as counted, Saved((*model.parameters(), *model.buffers())) as saved:
            logits = model.train()(inputs).flatten(0, -2).float()
            loss = F.cross_entropy(logits, torch.empty(logits.shape[0], dtype=torch.int64))
    assert loss.is_meta
    return counted, saved.nbytes + 2 * math.prod(logits.shape) * _FP32
