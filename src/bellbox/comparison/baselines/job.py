"""The job that all rows of a table share: one checkpoint, one calibration, one text to score, one prompt to time."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bellbox.data.tokenizer import Tokenizer
from bellbox.errors import BellboxError
from bellbox.formats.auto import kind_of, open_model
from bellbox.models import GPT, Llama, save_hf
from bellbox.nn import quantized_layers
from bellbox.ptq.calibration import calibration_tokens
from bellbox.utils.files import (
    canonical_sha256,
    read_json,
    read_tensors,
    sha256_file,
    write_tensors,
    write_text,
)

JOB, TOKENS, CHECKPOINT, MODELS = "job.json", "tokens.safetensors", "checkpoint", "models"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a table's rows are made, scored and timed; of a job, and the flags of its command."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the checkpoint is rounded to before any row starts from it."""
    samples: int = 16
    """Calibration sequences."""
    context: int = 256
    """Tokens of each, and of a window of the scored text."""
    tokens: int = 4096
    """Tokens to score, from the text's beginning."""
    group: int = 64
    """Columns that share a scale, where a row has groups."""
    iterations: int = 200
    """Steps a block, of AutoRound."""
    new_tokens: int = 16
    """Tokens of one timed stretch, from an empty cache."""
    seconds: float = 20.0
    """Of timing, a row and its companion together."""

    def settings(self) -> dict[str, Any]:
        """These alone, by name, where another class adds to them."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(Settings)}


@dataclass(frozen=True)
class Job(Settings):
    """One table's rows, as plain values."""

    model: str
    """The trained checkpoint: a Hugging Face folder, or a run in full precision."""
    out: str
    """Where results and made models lie."""
    calibration: str
    """Text to fit on."""
    text: str
    """Text to score."""

    def check(self) -> Job:
        """Itself, where its numbers make sense.

        Raises:
            BellboxError: one that does not, by name.
        """
        for name in ("samples", "context", "tokens", "group", "iterations", "new_tokens"):
            if getattr(self, name) < 1:
                raise BellboxError(f"--{name.replace('_', '-')} is {getattr(self, name)}, must be at least 1")
        if not 0 < self.seconds < 1e6:
            raise BellboxError(f"--seconds is {self.seconds}, must be above 0 and below a million")
        return self

    @property
    def name(self) -> str:
        """What the checkpoint is called in the table: its folder's name."""
        return Path(self.model).resolve().name

    @property
    def folder(self) -> Path:
        """Of this checkpoint's tokens and models; other checkpoints have their own beside it."""
        return Path(self.out).resolve() / MODELS / self.name

    @property
    def checkpoint(self) -> Path:
        """Hugging Face folder of the checkpoint that every row starts from, rounded, with its tokenizer."""
        return self.folder / CHECKPOINT

    def tensors(self) -> dict[str, Tensor]:
        """`calibration` int64 `[samples, context]`, and `text` int64 `[tokens + 1]`."""
        return read_tensors(self.folder / TOKENS)

    def calibration_batches(self) -> list[dict[str, Tensor]]:
        """The calibration as transformers' models take it, a sequence each."""
        sequences = self.tensors()["calibration"].split(1)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sequences]

    def save(self) -> None:
        """Write it into its folder, for `load_job`."""
        write_text(self.folder / JOB, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load_job(file: Path) -> Job:
    """What `Job.save` wrote."""
    return Job(**read_json(file))


def prepare_job(job: Job) -> dict[str, Any]:
    """Lay out what the rows read: the rounded checkpoint with its tokenizer, and the tokens.

    Returns:
        what decides the numbers beside the row: settings, and checksums of the checkpoint and of the tokens.

    Raises:
        BellboxError: no such model, a quantized or vision model, no tokenizer, or too little text.
    """
    job.check()
    model, tokenizer = _opened(job)
    context = min(job.context, model.config.max_position_embeddings)
    tokens = {
        "calibration": calibration_tokens(tokenizer, job.calibration, job.samples, context),
        "text": calibration_tokens(tokenizer, job.text, 1, job.tokens + 1).flatten(),
    }
    largest = max(int(each.max()) for each in tokens.values())
    if largest >= model.config.vocab_size:
        raise BellboxError(
            f"{job.model}: its tokenizer has more entries than its vocabulary of {model.config.vocab_size}"
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    write_tensors(job.folder / TOKENS, tokens)
    save_hf(model.to(getattr(torch, job.dtype)), job.checkpoint)
    _save_tokenizer(tokenizer, job.checkpoint)
    job.save()
    return _identity(job)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """As transformers reads it; some packages insist on a token to fill up with, though nothing is filled up here."""
    tokenizer.save(folder / TOKENIZER)
    end = next(name for name, number in tokenizer.vocab.items() if number == tokenizer.end_of_text)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    write_text(folder / "tokenizer_config.json", json.dumps(about, indent=1) + "\n")


def _opened(job: Job) -> tuple[Llama | GPT, Tokenizer]:
    kind = kind_of(job.model)
    if kind not in ("run", "huggingface"):
        raise BellboxError(
            f"{job.model}: is a {kind} model; the rows start from a checkpoint in full precision: name that one, and "
            f"this one with --packed {job.model}"
        )
    opened = open_model(job.model)
    if not isinstance(opened.model, Llama | GPT):
        raise BellboxError(f"{job.model}: is no language model, which is what the rows are scored as")
    if any(quantized_layers(opened.model)):
        raise BellboxError(
            f"{job.model}: was trained quantized; train one with --quantization.method none, and give this one, "
            "converted, with --packed FOLDER"
        )
    return opened.model, opened.load_tokenizer()


def _identity(job: Job) -> dict[str, Any]:
    settings = {
        name: getattr(job, name) for name in ("dtype", "samples", "context", "tokens", "group", "iterations")
    }
    sums = {name: canonical_sha256({"tokens": ids.tolist()}) for name, ids in job.tensors().items()}
    return {**settings, "checkpoint": sha256_file(job.checkpoint / "model.safetensors"), **sums}


def made_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """Of that, what decides a made model: not what it is scored on."""
    return {key: value for key, value in identity.items() if key not in ("text", "tokens")}


def key_of(identity: dict[str, Any], row: str, task: str, version: str | None) -> str:
    """Hex digest that two measurements share exactly if they are of the same thing."""
    return canonical_sha256({"identity": identity, "row": row, "task": task, "version": version})
