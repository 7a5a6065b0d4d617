"""Serve a model to other programs, as OpenAI's API does.

bellbox serve small-packed
bellbox serve small-packed --port 8080 --slots 32 --kv-cache int8
BELLBOX_API_KEY=... bellbox serve small-packed --host 0.0.0.0
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from bellbox.cli.output import parse_flags
from bellbox.errors import BellboxError, require
from bellbox.formats.auto import OpenedModel, open_model
from bellbox.inference.slots import SlotDecoder
from bellbox.utils.files import read_text
from bellbox.utils.processor import MAX_THREADS

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

if TYPE_CHECKING:
    from bellbox.serve.app import Service

KEY = "BELLBOX_API_KEY"
_CONTEXT = 4096
_MOST_SLOTS, _MOST_QUEUE = 256, 100_000


@dataclass(frozen=True)
class Serve:
    """Serve a model to other programs, as OpenAI's API does."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder, a packed or binarized folder, or a Hugging Face folder."""
    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own needs a key."""
    port: int = 8000
    """Likewise; 0 for one that is free."""
    name: str | None = None
    """What clients call the model; the folder's name where not given."""
    slots: int = 16
    """Texts that are decoded together."""
    queue: int = 64
    """Texts that may wait for a slot; what comes then is answered with 429."""
    context: int | None = None
    """Tokens of a text, prompt included; what the model takes, at most 4,096, where not given."""
    max_tokens: int | None = None
    """New tokens that one text may have; what the context leaves where not given."""
    max_body: int = 1 << 20
    """Bytes of a request."""
    grace: float = 30.0
    """Seconds that running texts have to end after SIGTERM or Ctrl-C; a second signal ends them at once."""
    api_key_file: Path | None = None
    """A file with the key that clients must present; else the environment's BELLBOX_API_KEY."""
    chat_template: Path | None = None
    """A chat template in jinja; that of the model's folder where not given."""
    checkpoint: str = "last"
    """Of a run: last, best, or a step."""
    bits: int | None = None
    """Of a model of several widths (docs/nested.md): the one to use; its widest where not given."""
    embeddings: Literal["bf16", "int8", "int4"] | None = None
    """Of a packed model: round its embeddings and head while loading, for speed."""
    kv_cache: Literal["fp32", "int8", "int4"] = "fp32"
    """What keys and values are kept in; int8 and int4 are less memory and faster in long texts, and round."""
    threads: int | None = None
    """Of the kernels; torch's own number where not given."""


def main(argv: list[str]) -> None:
    """Run `bellbox serve` with the arguments after that; returns after SIGTERM or Ctrl-C.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(Serve, argv, "bellbox serve", __doc__)
    for module in ("fastapi", "uvicorn", "prometheus_client", "jinja2"):
        require(module, "serve")
    from bellbox.serve import server

    _check(command)
    key = _key(command)
    if key is None and not server.is_loopback(command.host):
        raise BellboxError(
            f"--host {command.host} can be reached by others, so a key is needed: set {KEY} or --api-key-file"
        )
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    sock = server.listen(command.host, command.port)
    with sock:
        opened = open_model(command.model, command.checkpoint, command.embeddings, command.bits)
        service = _service(command, opened, key)

        def ready() -> None:
            how = "together" if service.engine.is_joint else "one after the other"
            print(
                f"{opened.description}\nup to {command.slots} texts of {service.engine.max_length:,} tokens, "
                f"decoded {how}\n{_trial(service, server.address_of(sock))}\n"
                f"serving {service.name} at {server.address_of(sock)}",
                flush=True,
            )

        server.run(service, sock, command.grace, ready)
    print("stopped", file=sys.stderr)


def _trial(service: Service, address: str) -> str:
    from bellbox.serve.trial import ABSENT, TRIAL, is_built

    if not is_built():
        return ABSENT
    what = "the model" if service.packed is not None else "a packed folder of your own"
    return f"{what} in the browser itself: {address}{TRIAL}"


def _check(command: Serve) -> None:
    limits = (
        ("port", command.port, 0, 65_535),
        ("slots", command.slots, 1, _MOST_SLOTS),
        ("queue", command.queue, 0, _MOST_QUEUE),
        ("context", command.context, 2, 1 << 24),
        ("max-tokens", command.max_tokens, 1, 1 << 24),
        ("max-body", command.max_body, 1024, 1 << 30),
        ("grace", command.grace, 0, 86_400),
        ("threads", command.threads, 1, MAX_THREADS),
    )
    for name, value, least, most in limits:
        if value is not None and not least <= value <= most:
            raise BellboxError(f"--{name} is {value}; it must be {least:,} to {most:,}")


def _key(command: Serve) -> str | None:
    if command.api_key_file is not None:
        where, key = str(command.api_key_file), read_text(command.api_key_file, 4096).strip()
    elif KEY in os.environ:
        where, key = f"the environment's {KEY}", os.environ[KEY].strip()
    else:
        return None
    if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
        raise BellboxError(f"{where}: a key must be at least 8 printable characters without spaces")
    return key


def _service(command: Serve, opened: OpenedModel, key: str | None) -> Service:
    from bellbox.serve.app import Service
    from bellbox.serve.chat import load_template
    from bellbox.serve.engine import Engine
    from bellbox.serve.metrics import Metrics
    from bellbox.serve.protocol import Limits

    if opened.is_vision:
        raise BellboxError(f"{opened.path}: is a vision model; it writes no text")
    tokenizer = opened.load_tokenizer()
    template = load_template(opened.path, tokenizer, command.chat_template)
    longest: int = opened.model.config.max_position_embeddings  # pyright: ignore[reportAttributeAccessIssue, reportAssignmentType]
    context = min(longest, _CONTEXT) if command.context is None else command.context
    decoder = SlotDecoder(opened.model, command.slots, context, command.kv_cache)
    metrics = Metrics()
    engine = Engine(decoder, tokenizer.backend, command.queue, metrics.first_token.observe)
    metrics.watch(engine)
    name = command.name or opened.path.resolve().name
    hosts = ("localhost", "127.0.0.1", "[::1]", command.host.lower())
    limits = Limits(command.max_body, choices=max(1, min(16, command.queue + command.slots)))
    packed = opened.path if opened.kind == "packed" else None
    return Service(name, engine, tokenizer, template, metrics, limits, command.max_tokens, key, hosts, packed)
