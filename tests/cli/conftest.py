"""One tiny trained run, its packed model and a Hugging Face folder, shared by the tests of the commands."""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox.data
import waiting
from bellbox.convert import convert
from bellbox.data.bundled import VALID
from bellbox.data.prepare import prepare
from bellbox.data.tokenizer import Tokenizer
from bellbox.formats import packed as io
from bellbox.models import LlamaConfig, build, save_hf
from bellbox.runs.config import BatchSection, DataSection, ModelSection, QuantizationSection
from bellbox.training import TrainConfig, load_run, train

CONTEXT = 32

Command = Callable[..., subprocess.CompletedProcess[str]]


def make_run(
    folder: Path, tokens: Path, steps: int, granularity: str = "token", embedding_bits: Any = None
) -> Path:
    """One block of width 64, 2 bits, trained for a moment."""
    size = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = TrainConfig(
        folder=str(folder),
        model=ModelSection("tiny", {**size, "max_position_embeddings": 2 * CONTEXT}),
        data=DataSection(source=str(tokens), context=CONTEXT),
        quantization=QuantizationSection(granularity=granularity, embedding_bits=embedding_bits),  # type: ignore[arg-type]
        batch=BatchSection(tokens=8 * CONTEXT, micro_sequences=8),
        steps=steps,
        precision="fp32",
        device="cpu",
        eval_every=max(1, steps // 3),
        checkpoint_every=max(1, steps // 3),
        log_every=2,
        tensorboard=False,
    )
    train(config, show=False)
    return folder


def tokens_of(folder: Path, vocab_size: int, text: str) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.with_suffix(".txt")
    source.write_text(text, encoding="utf-8")
    prepare([str(source)], folder, vocab_size=vocab_size, valid_fraction=0.2)
    return folder


@pytest.fixture(scope="session")
def prose() -> str:
    return lzma.decompress(VALID.read_bytes()).decode()[:40_000]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    return tokens_of(tmp_path_factory.mktemp("tokens") / "prose", 320, prose)


@pytest.fixture(scope="session")
def other_tokens(tmp_path_factory: pytest.TempPathFactory, prose: str) -> Path:
    """The same text under another tokenizer."""
    return tokens_of(tmp_path_factory.mktemp("tokens") / "other", 300, prose[:8000])


@pytest.fixture(scope="session")
def rounded_run(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """One whose embedding and head have 4 bits."""
    torch.set_num_threads(1)
    return make_run(tmp_path_factory.mktemp("rounded") / "run", tokens, 6, embedding_bits=4)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """Read-only to the tests."""
    torch.set_num_threads(1)
    return make_run(tmp_path_factory.mktemp("runs") / "small", tokens, steps=30)


@pytest.fixture(scope="session")
def tensor_run(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    torch.set_num_threads(1)
    return make_run(tmp_path_factory.mktemp("runs") / "tensor", tokens, steps=1, granularity="tensor")


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """Read-only to the tests."""
    folder = tmp_path_factory.mktemp("packed") / "small"
    opened = load_run(run)
    io.save(convert(opened.model), folder, tokenizer=opened.tokenizer)
    return folder


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """An untrained LLaMA in full precision, as `transformers` would have saved it, with the data's tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    vocabulary = bellbox.data.open(tokens).vocab_size
    save_hf(build(LlamaConfig(vocabulary, 32, 64, 1, 2, max_position_embeddings=48), seed=0), folder)
    shutil.copyfile(tokens / "tokenizer.json", folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokens: Path) -> Tokenizer:
    return Tokenizer.load(tokens)


@pytest.fixture
def bellbox_process(tmp_path: Path) -> Command:
    """Run the program in a process of its own, in an empty folder."""

    def run_it(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = "from bellbox.cli.main import main; main()"
        return waiting.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        )

    return run_it


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the program on something it must refuse: exit code 2, and the one line that it says."""
    from bellbox.cli.main import main

    def run_it(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(one) for one in arguments])
        out, error = capsys.readouterr()
        assert caught.value.code == 2
        assert error.startswith("bellbox: error: ")
        assert error.count("\n") == 1, error
        assert "Traceback" not in out + error
        return error

    return run_it
