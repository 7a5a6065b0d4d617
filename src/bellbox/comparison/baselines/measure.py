"""The numbers of a row: perplexity by our own evaluation, bytes on the disk, tokens a second beside full precision."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bellbox.benchmark import Spread, take_turns
from bellbox.comparison.baselines.baseline import Baseline
from bellbox.comparison.baselines.job import Job
from bellbox.comparison.baselines.own import FULL
from bellbox.evaluation import perplexity
from bellbox.inference.generation import generate
from bellbox.models.blocks import layer_names
from bellbox.models.hf_config import read_config
from bellbox.utils.files import read_tensors

TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)
"""What belongs to the text and not to the model."""


def stored_bytes(folder: Path) -> int:
    """Bytes of all files of a model but its tokenizer, as the system counts them."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in TOKENIZER_FILES)
    return sum(os.stat(file).st_size for file in files)


def quality(row: Baseline, folder: Path, job: Job) -> dict[str, Any]:
    """Perplexity of a made model, on the text that all rows are scored on, and its bytes.

    Args:
        row: opens it.
        folder: the model's.
        job: what to score.
    """
    tokens = job.tensors()
    model = row.load(folder, job)
    context = tokens["calibration"].shape[1]
    score = perplexity(model, tokens["text"], context, batch_size=4)
    size = stored_bytes(folder)
    weights = checkpoint_weights(job)
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "protocol": score.protocol,
        "bytes": size,
        "weights": weights,
        "bits_per_weight": 8 * size / weights,
        "left": left_whole(model, job),
    }


def checkpoint_weights(job: Job) -> int:
    """Numbers in the checkpoint, a tied head counted once."""
    return sum(tensor.numel() for tensor in read_tensors(job.checkpoint / "model.safetensors").values())


def left_whole(model: nn.Module, job: Job) -> list[str]:
    """Names of the blocks' linear layers that are in full precision."""
    config, _ = read_config(job.checkpoint / "config.json")
    wanted = tuple(layer_names(config))
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    plain = {name for name, layer in found.items() if type(layer.weight.data) is Tensor}
    return sorted(name for name in wanted if any(other.endswith(name) for other in plain))


def speed(row: Baseline, folder: Path, job: Job) -> dict[str, Any]:
    """Tokens a second of greedy decoding, in turns with full precision through transformers.

    Args:
        row: opens the model.
        folder: the model's.
        job: how many tokens, and how long.
    """
    prompt = job.tensors()["text"][None, :1]
    runs: dict[str, Callable[[int], object]] = {
        "row": _decoding(row.load(folder, job), prompt, job.new_tokens)
    }
    if row.name != FULL.name:
        runs["full"] = _decoding(FULL.load(job.checkpoint, job), prompt, job.new_tokens)
    load = os.getloadavg()[0]
    begun = time.perf_counter()
    times = take_turns(runs, job.seconds)
    full = times.get("full", times["row"])
    return {
        "tokens_per_second": job.new_tokens / times["row"].median,
        "quartiles": _rates(times["row"], job.new_tokens),
        "full_tokens_per_second": job.new_tokens / full.median,
        "full_quartiles": _rates(full, job.new_tokens),
        "times_full": full.median / times["row"].median,
        "threads": torch.get_num_threads(),
        "load": max(load, os.getloadavg()[0]),
        "seconds": time.perf_counter() - begun,
    }


def _rates(spread: Spread, tokens: int) -> list[float]:
    return [tokens / spread.high, tokens / spread.low]


def _decoding(model: nn.Module, prompt: Tensor, count: int) -> Callable[[int], object]:
    """Decode so many tokens greedily after a first one, from an empty cache."""
    if hasattr(model, "new_cache"):
        return lambda _: list(generate(model, prompt, count, temperature=0))
    return lambda _: _decode_transformer(model, prompt, count)


@torch.inference_mode()
def _decode_transformer(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """What `generate` of transformers does at its heart, without what it asks around each token."""
    token, cache = prompt, None
    for _ in range(count):
        output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    return token
