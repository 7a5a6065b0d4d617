"""Continue a prompt; the text comes out as it is made.

bellbox generate runs/small --prompt "It was a dark night"
bellbox generate small-packed --prompt "Alice" --temperature 0.8 --top-k 40 --seed 1
bellbox generate small-packed --prompt "Alice" --temperature 0
bellbox generate nested-packed --prompt "Alice" --bits 2      # of a model of several widths
bellbox generate runs/mine --import mine --prompt "Alice"      # a run with a method of your own, from mine.py
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from bellbox.cli.output import parse_flags
from bellbox.errors import BellboxError, require
from bellbox.formats.auto import OpenedModel, open_model
from bellbox.inference.generation import TextGeneration, generate_text
from bellbox.ops.cache_codes import CachePrecision
from bellbox.utils.memory import peak_in_words

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

if TYPE_CHECKING:
    from bellbox.data.tokenizer import Tokenizer

_DEFAULT_NEW_TOKENS = 200


@dataclass(frozen=True)
class Generate:
    """Continue a prompt; the text comes out as it is made."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a packed folder, or a Hugging Face folder."""
    prompt: str
    """The text to continue."""
    max_new_tokens: int | None = None
    """New tokens at most; 200, or what the context leaves, where not given."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the fewest likeliest tokens that together have this probability."""
    seed: int | None = None
    """The same seed gives the same text."""
    stop: str | None = None
    """A token, written as text, that ends the text; the tokenizer's end of text where not given."""
    checkpoint: str = "last"
    """Of a run: last, best, or a step."""
    bits: int | None = None
    """Of a model of several widths (docs/nested.md): the one to use; its widest where not given."""
    embeddings: Literal["bf16", "int8", "int4"] | None = None
    """Of a packed model: round its embeddings and head while loading, for speed."""
    kv_cache: Literal["fp32", "int8", "int4"] = "fp32"
    """What keys and values are kept in; int8 and int4 are less memory and faster in long texts, and round."""


def main(argv: list[str]) -> None:
    """Run `bellbox generate` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(Generate, argv, "bellbox generate", __doc__)
    begun = time.perf_counter()
    opened = open_model(command.model, command.checkpoint, command.embeddings, command.bits)
    load_seconds = time.perf_counter() - begun
    stream = continue_text(
        opened,
        command.prompt,
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        seed=command.seed,
        stop=command.stop,
        kv_cache=command.kv_cache,
    )
    print(command.prompt, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    print(f"loaded in {load_seconds:.2f} s, {speed_of(stream)}{peak_in_words(', ')}", file=sys.stderr)


def continue_text(
    opened: OpenedModel,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | None = None,
    kv_cache: CachePrecision = "fp32",
) -> TextGeneration:
    """`generate_text` with an opened model's own tokenizer.

    Raises:
        BellboxError: a prompt that leaves no room in the context, no tokenizer, a stop that is no token, or what
            `generate_text` refuses.
    """
    if opened.is_vision:
        raise BellboxError(
            f"{opened.path}: is a vision model, which names what an image shows; it writes no text"
        )
    tokenizer = opened.load_tokenizer()
    prompt_tokens = len(tokenizer.encode(prompt))
    if max_new_tokens is None:
        longest: int = opened.model.config.max_position_embeddings  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
        if prompt_tokens >= longest:
            raise BellboxError(
                f"the prompt has {prompt_tokens:,} tokens and {opened.path} takes {longest:,}, new ones included; "
                "shorten it"
            )
        max_new_tokens = min(_DEFAULT_NEW_TOKENS, longest - prompt_tokens)
    return generate_text(
        opened.model,
        tokenizer.backend,
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_token=_stop_token(tokenizer, stop),
        kv_cache=kv_cache,
    )


def _stop_token(tokenizer: Tokenizer, stop: str | None) -> int:
    if stop is None:
        return tokenizer.end_of_text
    if stop in tokenizer.vocab:
        return tokenizer.vocab[stop]
    ids = tokenizer.encode(stop)
    if len(ids) != 1:
        raise BellboxError(f"--stop {stop!r} is {len(ids)} tokens of this tokenizer; it must be exactly one")
    return ids[0]


def speed_of(stream: TextGeneration) -> str:
    """Prefill and decode speed in one line."""
    return (
        f"prefill {len(stream.prompt_ids):,} tokens at {stream.prefill_tokens_per_second:,.0f} tokens/s, "
        f"decode {len(stream.new_ids):,} tokens at {stream.decode_tokens_per_second:,.0f} tokens/s"
    )
