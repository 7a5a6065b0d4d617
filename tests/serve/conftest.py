"""A tiny packed model with a tokenizer, and servers of it as processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Server

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.models import build, preset, save_hf

TEXT = "Once upon a time there was a bell in a box. Ünïcödé 日本語 🔔, hello world!\n" * 5
TEMPLATE = (
    "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed LLaMA of random weights; any bytes come out of it, also such as are no UTF-8."""
    folder = tmp_path_factory.mktemp("served") / "small"
    tokenizer = Tokenizer.train([TEXT], 300)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = build(
        preset("tiny", vocab_size=tokenizer.vocab_size, max_position_embeddings=512, **sizes), seed=0
    )
    model = bb.prepare(model, bb.Recipe.bbq(2)).eval()
    bb.calibrate(model, [torch.arange(64).view(4, 16)])
    bb.save(bb.convert(model), folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers, which are gone in the end."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    started: list[Server] = []

    def start(model: Path, *flags: str, **environment: str) -> Server:
        started.append(Server(model, *flags, **environment))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


@pytest.fixture(scope="session")
def server(serve: Callable[..., Server], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """One for all tests that leave it as it is."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    return serve(folder, "--slots", "8", "--queue", "120", "--chat-template", str(template))


@pytest.fixture(scope="session")
def floats(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder in fp32 with the same tokenizer, which is decoded one text after the other."""
    target = tmp_path_factory.mktemp("floats") / "float"
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    save_hf(build(preset("gpt-tiny", vocab_size=tokenizer.vocab_size, **size), seed=1), target)
    tokenizer.save(target / "tokenizer.json")
    return target
