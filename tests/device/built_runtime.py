"""What tests of bellbox-run and libbellbox share: where they are, small packed folders, both ways to call them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.models import build, preset
from bellbox.utils.files import canonical_sha256

ROOT = Path(__file__).parents[2]
BUILT = Path(os.environ.get("BELLBOX_RUNTIME") or ROOT / "build" / "runtime")
RUN, LIBRARY = BUILT / "bellbox-run", BUILT / "libbellbox.so"
needs_runtime = pytest.mark.skipif(
    not RUN.is_file() or not LIBRARY.is_file(), reason=f"no {RUN}: make runtime"
)

PROMPT = "The naïve city was 12 miles away,"


def packed(
    folder: Path, tokenizer: Path, name: str, positions: int = 256, hidden: int = 64, **recipe: Any
) -> Path:
    shape = {key: recipe.pop(key) for key in ("activation", "tie_word_embeddings") if key in recipe}
    vocabulary = Tokenizer.load(tokenizer).vocab_size
    config = preset(name, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden,
                    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=positions,
                    initializer_range=0.2, **shape)  # fmt: skip
    plain = build(config, seed=0)
    random_gains = torch.Generator().manual_seed(1)
    for each in plain.parameters():
        # Without them the sum over a LayerNorm's row is zero but for rounding, and that is a threshold.
        if each.dim() == 1:
            each.data.add_(0.1 * torch.randn(each.shape, generator=random_gains))
    model = bb.prepare(plain, bb.Recipe.bbq(**recipe)).eval()
    with torch.no_grad():
        model(torch.arange(32)[None])
    bb.save(bb.convert(model), folder, tokenizer=str(tokenizer))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Its output as it is: in text mode, Python makes other line ends of some."""
    done = subprocess.run([RUN, *map(str, arguments)], capture_output=True, timeout=60, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def choices(bits: int = 0, embedding_bits: int = 0) -> ctypes.Array[ctypes.c_int]:
    """A `bellbox_choices`."""
    return (ctypes.c_int * 2)(bits, embedding_bits)


class Library:
    """The C interface, as another language calls it."""

    def __init__(self) -> None:
        self.c = ctypes.CDLL(str(LIBRARY))
        self.c.bellbox_close.argtypes = self.c.bellbox_end.argtypes = [ctypes.c_void_p]
        self.error = ctypes.create_string_buffer(512)

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.c, name)(*arguments, self.error)
        assert status == 0, self.error.value.decode()

    def open(self, folder: Path) -> ctypes.c_void_p:
        model = ctypes.c_void_p()
        self.call("bellbox_open", str(folder).encode(), ctypes.byref(model))
        return model

    def encode(self, model: ctypes.c_void_p, text: str) -> list[int]:
        room, count = 4 * len(text.encode()) + 8, ctypes.c_size_t()
        ids = (ctypes.c_uint32 * room)()
        self.call("bellbox_encode", model, text.encode(), ids, ctypes.c_size_t(room), ctypes.byref(count))
        return list(ids[: count.value])

    def logits(self, model: ctypes.c_void_p, calls: Sequence[Sequence[int]], size: int) -> list[torch.Tensor]:
        session, found = ctypes.c_void_p(), []
        self.call("bellbox_begin", model, ctypes.c_int64(64), ctypes.c_int(1), ctypes.byref(session))
        for ids in calls:
            out = torch.empty(size)
            tokens = (ctypes.c_uint32 * len(ids))(*ids)
            place = ctypes.c_void_p(out.data_ptr())
            self.call("bellbox_forward", session, tokens, ctypes.c_size_t(len(ids)), place)
            found.append(out)
        self.c.bellbox_end(session)
        return found


def packed_vision(folder: Path, config: Any, recipe: dict[str, Any]) -> Any:
    plain = build(config, seed=0)
    draw = torch.Generator().manual_seed(1)
    for name, each in plain.named_parameters():
        if "norm" in name:
            each.data.add_(0.1 * torch.randn(each.shape, generator=draw))
    for name, each in plain.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            each.add_(0.2 * torch.rand(each.shape, generator=draw))
    model = bb.prepare(plain, bb.Recipe.bbq(**recipe)).eval()
    side = getattr(config, "image_size", None) or 20
    with torch.no_grad():
        model(torch.rand(4, config.num_channels, side, side, generator=draw))
    bb.save(bb.convert(model), folder)
    return bb.load(folder)


def seal(folder: Path) -> None:
    """Make the checksums of a folder right again."""
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    for name in section["files"]:
        content = (folder / name).read_bytes()
        section["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del section["sha256"]
    section["sha256"] = canonical_sha256(config)
    (folder / "config.json").write_text(json.dumps(config))
