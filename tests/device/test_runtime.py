"""libbellbox and bellbox-run: the same tokens and text as in Python, and folders that are refused in one line."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.inference.generation import generate_text
from bellbox.models import build, preset
from bellbox.utils.files import canonical_sha256

ROOT = Path(__file__).parents[2]
BUILT = Path(os.environ.get("BELLBOX_RUNTIME") or ROOT / "build" / "runtime")
RUN, LIBRARY = BUILT / "bellbox-run", BUILT / "libbellbox.so"
pytestmark = pytest.mark.skipif(not RUN.is_file() or not LIBRARY.is_file(), reason=f"no {RUN}: make runtime")

PROMPT = "The naïve city was 12 miles away,"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A text that stays: with other tokens, a value may come to lie on a threshold (docs/device.md, what is exact).
    text = (ROOT / "LICENSE").read_text()
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    Tokenizer.train([text], 600).save(path)
    return path


def packed(folder: Path, tokenizer: Path, name: str, **recipe: Any) -> Path:
    config = preset(name, vocab_size=Tokenizer.load(tokenizer).vocab_size, hidden_size=64, intermediate_size=128,
                    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
                    initializer_range=0.2)  # fmt: skip
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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    return packed(tmp_path_factory.mktemp("packed") / "m", tokenizer, "tiny", bits=2, embedding_bits=4)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Its output as it is: in text mode, Python makes other line ends of some."""
    done = subprocess.run([RUN, *map(str, arguments)], capture_output=True, timeout=60, check=False)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("tiny", {"bits": 1}),
        ("tiny", {"bits": 2, "embedding_bits": 4}),
        ("tiny", {"bits": 3, "embedding_bits": 8}),
        ("tiny", {"bits": 4}),
        ("tiny", {"levels": 3, "embedding_bits": 8}),
        ("gpt-tiny", {"bits": 2}),
        ("gpt-tiny", {"bits": 4, "embedding_bits": 8}),
    ],
)
def test_the_text_is_that_of_python(
    tmp_path: Path, tokenizer: Path, name: str, recipe: dict[str, Any]
) -> None:
    folder = packed(tmp_path / "m", tokenizer, name, **recipe)
    model, words = bb.load(folder), Tokenizer.load(tokenizer)
    for how in (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_k": 40, "seed": 2**40 + 1},
        {"temperature": 1.2, "top_p": 0.9, "seed": 5},
    ):
        stream = generate_text(model, words.backend, PROMPT, 60, stop_token=words.end_of_text, **how)  # type: ignore[arg-type]
        flags = [part for key, value in how.items() for part in ("--" + key.replace("_", "-"), value)]
        found = run(folder, "--prompt", PROMPT, "--max-new-tokens", 60, *flags)
        assert found.returncode == 0, found.stderr
        assert found.stdout == PROMPT + "".join(stream) + "\n"
        assert "kernels, loaded in" in found.stderr


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


def test_logits_are_those_of_python_piece_by_piece(folder: Path) -> None:
    library, model = Library(), bb.load(folder)
    opened = library.open(folder)
    ids = [5, 9, 77, 300, 12, 5]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    whole = library.logits(opened, [ids], expected.shape[1])[0]
    single = library.logits(opened, [[each] for each in ids], expected.shape[1])
    assert torch.equal(single[-1], whole)
    for at, each in enumerate(single):
        assert float((each - expected[at]).abs().max()) <= 1e-5 * float(expected.abs().max())
    library.c.bellbox_close(opened)


def texts(count: int) -> list[str]:
    pick = random.Random(0)
    known = (ROOT / "docs" / "format.md").read_text()
    pieces = ["the ", "'", "'s", "'RE", "'\u017f", "ll ", " \n", "\t", "12", "3", "é", "漢字", "😀", "\u0301", "٣", "Ⅷ",
              "\u00a0", "\u3000", "▁", "<|endoftext|>", "</s>", "<0x0A>", "a" * 30]  # fmt: skip
    made = []
    for _ in range(count):
        at = pick.randrange(len(known) - 200)
        rare = "".join(
            chr(pick.choice([pick.randrange(1, 0x800), pick.randrange(0xE000, 0x110000)])) for _ in range(9)
        )
        made += [known[at : at + pick.randrange(1, 200)], "".join(pick.choices(pieces, k=12)), rare]
    return made


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "prefix", "sentencepiece"])
def test_tokens_are_those_of_the_tokenizers_library(
    tmp_path: Path, folder: Path, tokenizer: Path, kind: str
) -> None:
    words = json.loads(tokenizer.read_text())
    if kind == "llama3":
        split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
        byte_level = {**words["pre_tokenizer"], "use_regex": False}
        words["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    elif kind == "prefix":
        words["pre_tokenizer"]["add_prefix_space"] = True
    elif kind == "sentencepiece":
        model = ROOT.parent / "shared" / "data" / "models" / "stories260K_hf" / "tokenizer.model"
        if not model.is_file():
            pytest.skip(f"no {model}")
        from bellbox.data.spm import translate

        words = json.loads(translate(model))
    copied = tmp_path / "m"
    shutil.copytree(folder, copied)
    (copied / "tokenizer.json").write_text(json.dumps(words))
    seal(copied)
    library, backend = Library(), Tokenizer.load(copied)
    opened = library.open(copied)
    for text in texts(60):
        assert library.encode(opened, text.replace("\0", "")) == backend.encode(text.replace("\0", "")), repr(
            text
        )
    library.c.bellbox_close(opened)


def seal(folder: Path) -> None:
    """Make the checksums of a folder right again."""
    import hashlib

    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"]
    for name in section["files"]:
        content = (folder / name).read_bytes()
        section["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del section["sha256"]
    section["sha256"] = canonical_sha256(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_what_cannot_be_run_is_one_line(tmp_path: Path, folder: Path) -> None:
    for arguments, message in (
        (("nowhere", "--prompt", "x"), "nowhere/config.json: cannot be read"),
        ((folder,), "give --prompt"),
        ((folder, "--prompt", ""), "the prompt is empty"),
        ((folder, "--prompt", "x", "--max-new-tokens", 0), "at least 1"),
        ((folder, "--prompt", "x", "--max-new-tokens", 9999), "exceed the model's context of 256"),
        ((folder, "--prompt", "x", "--temperature", "-1"), "temperature must be finite"),
        ((folder, "--prompt", "x", "--temperature", "nan"), "temperature must be finite"),
        ((folder, "--prompt", "x", "--top-k", 0), "--top-k is 0"),
        ((folder, "--prompt", "x", "--top-p", 1.5), "top_p is 1.5"),
        ((folder, "--prompt", "x", "--seed", "one"), "--seed is one"),
        ((folder, "--prompt", "x", "--stop", "two words"), "it must be exactly one"),
        ((folder, "--prompt", "x", "--speed"), "--speed has no value"),
    ):
        found = run(*arguments)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1), (arguments, found.stderr)
        assert message in found.stderr, found.stderr


def test_altered_folders_are_refused_whole(tmp_path: Path, folder: Path) -> None:
    """A changed byte is seen; with checksums made right again nothing worse than a line or another text comes."""
    pick = random.Random(1)
    refused = 0
    for number in range(60):
        copied = tmp_path / str(number)
        shutil.copytree(folder, copied)
        file = copied / pick.choice(["config.json", "model.safetensors", "tokenizer.json"])
        content = bytearray(file.read_bytes())
        at = pick.randrange(min(len(content), 4000))
        content[at] = pick.choice([0, 0x22, 0x39, 0x7B, 0xFF, content[at] ^ 1])
        if number % 4 == 3:
            content = content[:at]
        same = bytes(content) == file.read_bytes()
        file.write_bytes(content)
        if number % 2 and file.name != "config.json":
            seal(copied)
        found = run(copied, "--prompt", "x", "--max-new-tokens", 2, "--temperature", 0)
        assert found.returncode in (0, 2), found.stderr
        assert found.stderr.count("\n") == 1 or found.returncode == 0
        refused += found.returncode == 2
        assert found.returncode == 2 or same or number % 2 or is_outside_of_json(file, folder)
        shutil.rmtree(copied)
    assert refused > 30


def is_outside_of_json(file: Path, original: Path) -> bool:
    """Whether a changed configuration still says the same: blanks between its parts do not matter."""
    return file.name == "config.json" and json.loads(file.read_text()) == json.loads(
        (original / file.name).read_text()
    )


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_example_in_c(tmp_path: Path, folder: Path) -> None:
    program = tmp_path / "continue"
    source = ROOT / "examples" / "device" / "continue.c"
    include = f"-I{ROOT / 'native' / 'include'}"
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", include, source, LIBRARY]
    subprocess.run([*command, f"-Wl,-rpath,{BUILT}", "-o", program], check=True)
    found = subprocess.run([program, folder, PROMPT], capture_output=True, check=True)
    greedy = run(folder, "--prompt", PROMPT, "--max-new-tokens", 50, "--temperature", 0)
    assert PROMPT + found.stdout.decode() == greedy.stdout
    assert subprocess.run([program, "nowhere", "x"], capture_output=True, check=False).returncode == 2
