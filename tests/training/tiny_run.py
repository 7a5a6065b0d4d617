"""A run that is as small as a run can be, for tests in this process and in others.

    python tiny_run.py        a fork server: reads config files from stdin, trains each in a child of its own

The server imports PyTorch once, so that a test can afford a dozen processes. It answers `started PID` and,
when the child is gone, `ended STATUS` (as `os.waitstatus_to_exitcode` gives it).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bellbox.data.shards import Manifest, ShardWriter, dtype_for, write_manifest
from bellbox.data.tokenizer import Tokenizer
from bellbox.runs.config import BatchSection, DataSection, ModelSection, TrainConfig

CONTEXT = 16


def write_tokens(folder: Path, count: int = 4000) -> Path:
    """Random tokens with some order in them, in the format of `bellbox data prepare`."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(["the cat sat on the mat, the dog sat on the cat. " * 20], vocab_size=270)
    (folder / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
    draw = np.random.default_rng(0)
    dtype = dtype_for(tokenizer.vocab_size)
    splits = {}
    for split, size in (("train", count), ("valid", count // 10)):
        writer = ShardWriter(folder, split, dtype, shard_tokens=1500)
        ids = (np.arange(size) * 3 + draw.integers(0, 4, size)) % 256
        writer.append(ids, source_bytes=size)
        writer.documents = 1
        splits[split] = writer.close()
    manifest = Manifest(
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        tokenizer_sha256=tokenizer.sha256,
        sources=["synthetic"],
        splits=splits,
    )
    write_manifest(folder, manifest)
    return folder


def text_of(vocab_size: int) -> SimpleNamespace:
    """All that `resolve` asks of a dataset of tokens."""
    return SimpleNamespace(vocab_size=vocab_size)


def config(tokens: Path, folder: Path) -> TrainConfig:
    """One block of width 32, 64 tokens a step, fp32, silent."""
    return TrainConfig(
        folder=str(folder),
        model=ModelSection(
            "tiny",
            {
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "max_position_embeddings": CONTEXT,
            },
        ),
        data=DataSection(source=str(tokens), context=CONTEXT),
        batch=BatchSection(tokens=4 * CONTEXT, micro_sequences=2),
        steps=4,
        precision="fp32",
        device="cpu",
        eval_every=2,
        checkpoint_every=2,
        log_every=1,
        tensorboard=False,
    )


def _serve() -> None:
    import torch
    import torch._dynamo  # the optimizer would import it in every child

    from bellbox.training import load_config, train

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                result = train(load_config(line.strip()), show=False)
                code = 0 if result.stopped_by is None else 128 + result.stopped_by
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
            os._exit(code)
        print("started", pid, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
