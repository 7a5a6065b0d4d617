"""Whole models: a prompt by classes, decoding, training steps; and what is kept of the GPU's memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from bench import FULL, Bench
from torch import Tensor, nn
from torch.nn import functional as F

import bellbox as bb
from bellbox.benchmark.profile import CLASSES, profile
from bellbox.inference.graphs import GraphSteps, StaticSteps
from bellbox.models import build, preset


def _model(bench: Bench, config: dict[str, int], bits: int | None) -> nn.Module:
    """A LLaMA of random weights on the device, bf16 or packed."""
    room = max(bench.sizes.room, bench.sizes.prompt[1]) + 64
    made = (
        build(preset("95M", **config, max_position_embeddings=room), seed=0)
        .to(bench.device, torch.bfloat16)
        .eval()
    )
    if bits is None:
        return made
    prepared = bb.prepare(made, bb.Recipe.bbq(bits)).eval()
    with torch.no_grad():
        prepared(torch.zeros((1, 8), dtype=torch.int64, device=bench.device))
    return bb.convert(prepared)


def _each_model(bench: Bench) -> Iterator[tuple[str, str, nn.Module, int]]:
    for name, config in bench.sizes.models.items():
        for bits in (None, *bench.sizes.bits):
            model = _model(bench, config, bits)
            yield name, "bf16" if bits is None else f"{bits} bits", model, config["vocab_size"]
            del model
            gc.collect()
            if bench.cuda:
                torch.cuda.empty_cache()


def prefill(bench: Bench) -> None:
    """A prompt, split into product, quantization, element-wise operations and the rest (the paper's Figure 5)."""
    whole: dict[str, float] = {}
    for name, kind, model, vocabulary in _each_model(bench):
        tokens = torch.randint(0, vocabulary, bench.sizes.prompt, device=bench.device)
        bench.peak()
        found = profile(kind, model, tokens, bench.sizes.seconds)
        whole.setdefault(name, found.total)
        parts = {f"{each} (ms)": 1e3 * s for each, s in zip(CLASSES, found.seconds, strict=True)}
        bench.note(
            "prefill", model=name, name=kind, milliseconds=1e3 * found.total, times_bf16=whole[name] / found.total,
            **parts, peak_bytes=bench.peak(),
        )  # fmt: skip


@torch.no_grad()
def decode(bench: Bench) -> None:
    """Tokens a second after a prompt, one step at a time: as Python calls it, and as a CUDA graph."""
    for name, kind, model, vocabulary in _each_model(bench):
        for batch in bench.sizes.batches:
            cache = model.new_cache(batch, bench.sizes.room)  # pyright: ignore[reportCallIssue]
            prompt = torch.randint(0, vocabulary, (batch, bench.sizes.room // 2), device=bench.device)
            model(prompt, cache=cache, last_only=True)
            length, token = cache.length, prompt[:, :1]

            def eager(
                _: int, model: Any = model, cache: Any = cache, length: int = length, token: Tensor = token
            ) -> None:
                cache.length = length
                model(token, cache=cache, last_only=True)

            took = bench.seconds(eager)
            bench.note(
                "decode", model=name, name=kind, batch=batch, how="eager", tokens_per_second=batch / took
            )
            cache.length = length
            steps = (GraphSteps if bench.cuda else StaticSteps)(model, cache)  # type: ignore[arg-type]

            def static(
                _: int,
                steps: StaticSteps = steps,
                cache: Any = cache,
                length: int = length,
                token: Tensor = token,
            ) -> None:
                cache.length = length
                steps._expected = length  # the same place again
                steps.step(token)

            took = bench.seconds(static)
            bench.note(
                "decode", model=name, name=kind, batch=batch, how="graph", tokens_per_second=batch / took
            )


def training(bench: Bench) -> None:
    """Forward and backward of a training step in bf16 autocast, eager and compiled, against full precision."""
    for name in bench.sizes.steps:
        base: dict[str, float] = {}
        for bits in (None, *bench.sizes.bits[:2]):
            kind = "full precision" if bits is None else f"{bits} bits"
            torch.manual_seed(0)
            config = (
                preset(name)
                if bench.sizes is FULL
                else preset(name, **next(iter(bench.sizes.models.values())))
            )
            model = build(config, seed=0)
            model = (
                (model if bits is None else bb.prepare(model, bb.Recipe.bbq(bits))).to(bench.device).train()
            )
            tokens = torch.randint(0, config.vocab_size, bench.sizes.tokens, device=bench.device)
            for how in ("eager", "compiled"):
                run = model if how == "eager" else torch.compile(model, backend=bench.sizes.compiler)

                def step(_: int, run: Any = run, model: nn.Module = model, tokens: Tensor = tokens) -> None:
                    model.zero_grad(set_to_none=True)
                    with torch.autocast(bench.device.type, torch.bfloat16):
                        logits = run(tokens)
                    F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()

                bench.peak()
                took = bench.seconds(step)
                base.setdefault(how, took)
                bench.note(
                    "training", model=name, name=kind, how=how, milliseconds=took * 1e3, over_bf16=took / base[how],
                    peak_bytes=bench.peak(),
                )  # fmt: skip
            torch.compiler.reset()
