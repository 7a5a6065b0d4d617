"""A whole language model of random weights: prompts and single tokens, packed against full precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from bellbox.benchmark.timing import Spread, take_turns
from bellbox.convert import convert, prepare
from bellbox.inference.decoding import steps_for
from bellbox.models import AnyConfig, ModelConfig, ResNetConfig, ViTConfig, build
from bellbox.nn.compact import Precision
from bellbox.ops.cache_codes import CachePrecision
from bellbox.recipe import Recipe
from bellbox.utils.memory import peak_memory
from bellbox.utils.processor import fast_bf16


@dataclass(frozen=True)
class ModelResult:
    """One contender: seconds of a prompt's pass and of a decode step after it."""

    name: str
    prompt: int
    """Tokens of the prompt."""
    prefill: Spread
    decode: Spread
    peak_memory: int | None
    """Of the process so far, in bytes."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """By the median."""
        return self.prompt / self.prefill.median

    @property
    def decode_tokens_per_second(self) -> float:
        """By the median."""
        return 1 / self.decode.median

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **asdict(self),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


def images_of(config: ResNetConfig | ViTConfig, count: int = 1, side: int | None = None) -> tuple[int, ...]:
    """Shape of images that a model takes; of its own size, or that of its stem's data, where none is named."""
    own = config.image_size or (224 if isinstance(config, ResNetConfig) and config.max_pool else 32)
    return count, config.num_channels, side or own, side or own


def random_model(config: AnyConfig, bits: int, embeddings: Precision = "fp32") -> nn.Module:
    """A packed model of random weights, as loading leaves one; its activation scales come from one forward."""
    model = prepare(build(config, seed=0), Recipe.bbq(bits)).eval()
    with torch.no_grad():
        if isinstance(config, ResNetConfig | ViTConfig):
            model(torch.randn(images_of(config)))
        else:
            model(torch.randint(0, config.vocab_size, (1, 16)))
    return convert(model, embeddings)


class Contender(Protocol):
    """A model with a prompt in its cache; both calls leave it as it was, but for time."""

    def prefill(self, turn: int) -> None:
        """The prompt's pass, from an empty cache."""
        ...

    def decode(self, turn: int) -> None:
        """One token after the prompt."""
        ...


class _Decoding:
    """A model with a cache in which a prompt stands, so that steps can be repeated from the same place."""

    def __init__(
        self, model: nn.Module, vocabulary: int, prompt: int, kv_cache: CachePrecision = "fp32"
    ) -> None:
        self.model = model
        self.prompt = torch.randint(0, vocabulary, (1, prompt))
        self.token = self.prompt[:, :1]
        self.cache = model.new_cache(1, prompt + 1, kv_cache)  # pyright: ignore[reportCallIssue]
        self.steps = steps_for(model, self.cache)
        self.prefill(0)

    def prefill(self, turn: int) -> None:  # noqa: ARG002
        self.cache.reset()
        self.model(self.prompt, cache=self.cache, last_only=True)

    def decode(self, turn: int) -> None:  # noqa: ARG002
        self.cache.length = self.prompt.shape[1]
        if self.steps is not None:
            self.steps.step(self.token)
        else:
            self.model(self.token, cache=self.cache, last_only=True)


@torch.no_grad()
def bench_model(
    config: ModelConfig,
    bits: Sequence[int] = (4, 3, 2, 1),
    *,
    prompt: int = 256,
    embeddings: Sequence[Precision] = ("fp32", "int8", "int4"),
    kv_cache: Sequence[CachePrecision] = ("fp32",),
    seconds: float = 10.0,
    more: Mapping[str, Contender] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[ModelResult]:
    """Time prompts and decode steps of packed models and of the same model in fp32, in turns; in bf16, too,
    where the processor has units for it.

    Args:
        config: which model.
        bits: of weights and activations.
        prompt: tokens of the prompt; a decode step comes right after it.
        embeddings: what the packed models' embeddings and heads are in.
        kv_cache: what the packed models' keys and values are kept in.
        seconds: for prefill and for decode, all contenders together.
        more: further contenders by name.
        progress: called with a line before each part.

    Returns:
        One result a contender, the full-precision ones first.
    """

    def tell(line: str) -> None:
        if progress is not None:
            progress(line)

    models: dict[str, nn.Module] = {}
    tell("building the models")
    begun = time.perf_counter()
    models["fp32"] = build(config, seed=0).eval()
    if fast_bf16():
        models["bf16"] = build(config, seed=0).eval().to(torch.bfloat16)
    for width in bits:
        for precision in embeddings:
            models[f"{width} bit{'s' if width > 1 else ''}, {precision} embeddings"] = random_model(
                config, width, precision
            )
            tell(f"built {len(models)} models in {time.perf_counter() - begun:.0f} s")
    runs: dict[str, Contender] = {}
    for name, model in models.items():
        for coding in kv_cache if name not in ("fp32", "bf16") else ("fp32",):
            cached = name if coding == "fp32" else f"{name}, {coding} cache"
            runs[cached] = _Decoding(model, config.vocab_size, prompt, coding)
    runs.update(more or {})
    tell("prompts")
    prefill = take_turns({name: run.prefill for name, run in runs.items()}, seconds)
    for run in runs.values():
        run.prefill(0)
    tell("single tokens")
    decode = take_turns({name: run.decode for name, run in runs.items()}, seconds, least=20)
    return [ModelResult(name, prompt, prefill[name], decode[name], peak_memory()) for name in runs]
