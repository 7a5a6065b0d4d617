"""libbellbox and bellbox-run: the same tokens and text as in Python, and folders that are refused in one line."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from built_runtime import (
    BUILT,
    LIBRARY,
    PROMPT,
    ROOT,
    RUN,
    Library,
    choices,
    needs_runtime,
    packed,
    packed_vision,
    run,
    seal,
)

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.inference.generation import generate_text
from bellbox.models import ResNetConfig, ViTConfig

pytestmark = needs_runtime

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("tiny", {"bits": 1}),
    ("tiny", {"bits": 2, "embedding_bits": 4}),
    ("tiny", {"bits": 3, "embedding_bits": 8}),
    ("tiny", {"bits": 4}),
    ("tiny", {"levels": 3, "embedding_bits": 8}),
    ("gpt-tiny", {"bits": 1, "activation": "gelu_erf"}),
    ("gpt-tiny", {"bits": 2}),
    ("gpt-tiny", {"bits": 3, "activation": "relu"}),
    ("gpt-tiny", {"bits": 4, "embedding_bits": 8}),
    ("gpt-tiny", {"levels": 3, "activation": "gelu_erf"}),
]
HOW: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_k": 40, "seed": 2**40 + 1},
    {"temperature": 1.2, "top_p": 0.9, "seed": 5},
)


def the_text_is_that_of_python(folder: Path, prompt: str, count: int, how: dict[str, Any], stop: str) -> str:
    model, words = bb.load(folder), Tokenizer.load(folder)
    stop_token = words.backend.token_to_id(stop)
    stream = generate_text(model, words.backend, prompt, count, stop_token=stop_token, **how)
    flags = [part for key, value in how.items() for part in ("--" + key.replace("_", "-"), value)]
    found = run(folder, "--prompt", prompt, "--max-new-tokens", count, "--stop", stop, *flags)
    assert found.returncode == 0, found.stderr
    assert found.stdout == prompt + "".join(stream) + "\n"
    assert "kernels, loaded in" in found.stderr
    return found.stdout


def with_a_stop_that_never_comes(folder: Path) -> str:
    """A token behind the model's vocabulary, so that a text has all tokens that are asked for."""
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    number = max(words["model"]["vocab"].values()) + 1
    words["added_tokens"].append({**words["added_tokens"][0], "id": number, "content": "<|never|>"})
    file.write_text(json.dumps(words))
    seal(folder)
    return "<|never|>"


@pytest.mark.parametrize(("name", "recipe"), KINDS)
def test_the_text_is_that_of_python(
    tmp_path: Path, tokenizer: Path, name: str, recipe: dict[str, Any]
) -> None:
    folder = packed(tmp_path / "m", tokenizer, name, **recipe)
    for how in HOW:
        the_text_is_that_of_python(folder, PROMPT, 60, how, "<|endoftext|>")


@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
def test_a_coded_cache_gives_the_text_of_python(
    tmp_path: Path, tokenizer: Path, name: str, kv_cache: Any
) -> None:
    folder = packed(tmp_path / "m", tokenizer, name, bits=2)
    plain = run(folder, "--prompt", PROMPT, "--max-new-tokens", 60, "--seed", 3)
    how = {"temperature": 1.0, "seed": 3, "kv_cache": kv_cache}
    found = the_text_is_that_of_python(folder, PROMPT, 60, how, "<|endoftext|>")
    assert found != plain.stdout  # it is rounded


@pytest.mark.parametrize("embeddings", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["tiny", "gpt-tiny"])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_rounded_while_loading_are_those_of_python(
    tmp_path: Path, tokenizer: Path, name: str, embeddings: Any, tied: bool
) -> None:
    folder = packed(tmp_path / "m", tokenizer, name, bits=2, tie_word_embeddings=tied)
    library, opened, ids = Library(), ctypes.c_void_p(), [5, 9, 77]
    chosen = choices(0, {"bf16": 16, "int8": 8, "int4": 4}[embeddings])
    library.call("bellbox_open_with", str(folder).encode(), chosen, ctypes.byref(opened))
    model = bb.load(folder, embeddings=embeddings)
    with torch.no_grad():
        expected = model(torch.tensor([ids]), last_only=True)[0, 0]
    found = library.logits(opened, [ids], len(expected))[0]
    library.c.bellbox_close(opened)
    if embeddings == "bf16":  # whose product is torch's
        assert float((found - expected).abs().max() / expected.abs().max()) < 0.01
        return
    assert torch.equal(found, expected)
    found = run(folder, "--prompt", PROMPT, "--embeddings", embeddings, "--temperature", 0)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), KINDS)
def test_a_thousand_tokens_are_those_of_python(
    tmp_path: Path, tokenizer: Path, name: str, recipe: dict[str, Any]
) -> None:
    """A prompt in several pieces first, so that each token looks at up to 1,800 others."""
    folder = packed(tmp_path / "m", tokenizer, name, positions=2048, **recipe)
    prompt = (ROOT / "LICENSE").read_text()[:2000]
    stop = with_a_stop_that_never_comes(folder)
    for how in HOW[:2]:
        the_text_is_that_of_python(folder, prompt, 1000, how, stop)


@pytest.mark.parametrize(("name", "recipe"), KINDS)
def test_logits_are_those_of_python_to_the_last_bit(
    tmp_path: Path, tokenizer: Path, name: str, recipe: dict[str, Any]
) -> None:
    folder = packed(tmp_path / "m", tokenizer, name, **recipe)
    library, model = Library(), bb.load(folder)
    opened = library.open(folder)
    ids = [5, 9, 77, 300, 12, 5, *range(100, 140)]
    size = Tokenizer.load(folder).vocab_size
    with torch.no_grad():
        expected = [model(torch.tensor([ids[: i + 1]]), last_only=True)[0, 0] for i in range(len(ids))]
    whole = library.logits(opened, [ids], size)[0]
    single = library.logits(opened, [[each] for each in ids], size)
    pieces = library.logits(opened, [ids[:7], ids[7:8], ids[8:]], size)
    assert torch.equal(whole, expected[-1])
    assert all(map(torch.equal, single, expected))
    assert torch.equal(pieces[0], expected[6])
    assert torch.equal(pieces[1], expected[7])
    assert torch.equal(pieces[2], whole)
    library.c.bellbox_close(opened)


VISION: list[tuple[Any, dict[str, Any]]] = [
    (ResNetConfig(7, width=16, stages=3, blocks=2), {"bits": 2}),
    (ResNetConfig(5, width=8, stages=2, stem_kernel=7, stem_stride=2, max_pool=True), {"bits": 1}),
    (ResNetConfig(5, num_channels=1, width=8, stages=2), {"levels": 3}),
    (ResNetConfig(5, width=8, stages=2, image_size=17), {"bits": 4}),
    (ViTConfig(7, hidden_size=32, intermediate_size=64, num_hidden_layers=2), {"bits": 2}),
    (ViTConfig(7, image_size=16, hidden_size=32, num_hidden_layers=2, class_token=True), {"bits": 3}),
]


@pytest.mark.parametrize(("config", "recipe"), VISION)
def test_logits_of_an_image_are_those_of_python(tmp_path: Path, config: Any, recipe: dict[str, Any]) -> None:
    model = packed_vision(tmp_path / "m", config, recipe)
    library, draw = Library(), torch.Generator().manual_seed(0)
    opened = library.open(tmp_path / "m")
    fixed = getattr(config, "image_size", None)
    sides: list[int] = [9, 20, 33] if fixed is None else [fixed]
    for side in sides:
        for _ in range(3):
            image = torch.rand(config.num_channels, side, side, generator=draw)
            with torch.no_grad():
                expected = model(image[None])[0]
            pixels, found = image.permute(1, 2, 0).contiguous(), torch.empty(config.num_labels)
            sizes = ctypes.c_int64(side), ctypes.c_int64(side), ctypes.c_int(1)
            place = ctypes.c_void_p(found.data_ptr())
            library.call("bellbox_classify", opened, ctypes.c_void_p(pixels.data_ptr()), *sizes, place)
            assert torch.equal(found, expected)
    library.c.bellbox_close(opened)


def test_a_picture_is_classified_as_in_python(tmp_path: Path, folder: Path) -> None:
    config = ViTConfig(
        7, image_size=8, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=1
    )
    model = packed_vision(tmp_path / "m", config, {"bits": 2})
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = tmp_path / "x.ppm"
    good = b"P6\n# a comment\n8 8\n255\n" + pixels.numpy().tobytes()
    picture.write_bytes(good)
    with torch.no_grad():
        logits = model(torch.div(pixels, 255).permute(2, 0, 1)[None])[0]
    found = run(tmp_path / "m", "--image", picture)
    assert found.returncode == 0, found.stderr
    order = logits.argsort(descending=True, stable=True)[:5].tolist()
    chances = logits.double().softmax(0)
    assert found.stdout.splitlines() == [
        f"class {at}  {float(chances[at]):.4f}  logit {float(logits[at]):.6g}" for at in order
    ]
    for content, message in (
        (b"", "is no picture"),
        (b"P3 1 1 255 1 1 1", "is no picture"),
        (good[:-1], "cut short: 191 of 192"),
        (good.replace(b"8 8", b"8 9", 1), "cut short"),
        (good.replace(b"8 8", b"4 4", 1), "the model takes 8 x 8"),
        (good.replace(b"8 8", b"99999999999999999999 8", 1), "a number above 16384"),
        (good.replace(b"255", b"0", 1), "no number where"),
        (good.replace(b"255", b"7", 1), "a pixel above 7"),
        (b"P5 8 8 255 " + bytes(64), "has 1 channels"),
    ):
        picture.write_bytes(content)
        found = run(tmp_path / "m", "--image", picture)
        assert (found.returncode, found.stderr.count("\n")) == (2, 1), (content[:20], found.stderr)
        assert message in found.stderr, found.stderr
    for arguments, message in (
        ((tmp_path / "m", "--prompt", "x"), "a model of images"),
        ((folder, "--image", picture), "is a model of text"),
        ((folder, "--image", picture, "--prompt", "x"), "give one"),
    ):
        found = run(*arguments)
        assert found.returncode == 2
        assert message in found.stderr, found.stderr


def test_a_bench_is_one_line_of_json(folder: Path) -> None:
    found = run(folder, "--bench", "--prompt", PROMPT, "--max-new-tokens", 5, "--temperature", 0)
    measured = json.loads(found.stdout)
    assert 1 <= measured["new_tokens"] <= 5
    assert measured["peak_mb"] > 1
    assert measured["first_token_seconds"] > measured["load_seconds"] > 0


@pytest.mark.parametrize("kv_cache", ["fp32", "int8"])
def test_peak_memory_is_that_of_files_cache_and_activations(
    tmp_path: Path, tokenizer: Path, folder: Path, kv_cache: str
) -> None:
    """Beside the program itself, of which the peak with next to no model is the measure."""
    hidden, blocks, new = 512, 2, 400
    large = packed(tmp_path / "m", tokenizer, "tiny", positions=4096, hidden=hidden, bits=2, embedding_bits=8)
    prompt = (ROOT / "LICENSE").read_text()[:8000]

    def bench(of: Path, *flags: object) -> dict[str, float]:
        done = run(of, "--bench", "--temperature", 0, "--max-new-tokens", *flags)
        return json.loads(done.stdout)

    program = bench(folder, 1, "--prompt", "x")["peak_mb"]
    found = bench(large, new, "--prompt", prompt, "--kv-cache", kv_cache)
    tokens, head = found["prompt_tokens"] + new, hidden // 4
    row = 4 * head if kv_cache == "fp32" else head + 4
    cache = 2 * blocks * tokens * 4 * row + 4 * tokens * head  # with cosines and sines
    rows = 256  # of a piece of the prompt: x, norm, q, k, v, attention's output; gate and up; their codes
    activations = rows * (6 * 4 * hidden + 2 * 4 * 2 * hidden + 2 * hidden)
    attention = 4 * ((2 * 16 + 32) * head + tokens * head + 16 * (tokens + 64))
    packed_size = sum(each.stat().st_size for each in large.iterdir())
    allowed = packed_size + 1.2 * (cache + activations + attention)
    assert found["prompt_tokens"] > 2000
    assert found["peak_mb"] - program < allowed / 1e6, (found, program, allowed)


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


def test_what_cannot_be_run_is_one_line(tmp_path: Path, folder: Path) -> None:
    for arguments, message in (
        (("nowhere", "--prompt", "x"), "nowhere/config.json: cannot be read"),
        (("", "--prompt", "x"), "give the folder"),
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
        ((folder, "--prompt", "x", "--threads", 2**32 + 1), "--threads is 4294967297; it must be at most"),
        (
            (folder, "--prompt", "x", "--kv-cache", "int2"),
            "--kv-cache is int2; it must be fp32, int8 or int4",
        ),
        ((folder, "--prompt", "x", "--embeddings", "fp32"), "--embeddings is fp32; it must be bf16"),
        ((folder, "--prompt", "x", "--embeddings", "int8"), "no fp32 embedding that could be rounded"),
        ((folder, "--prompt", "x", "--checkpoint", "best"), "--checkpoint is of a run"),
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


def test_an_output_that_cannot_be_written_is_an_error(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        for flags in ((), ("--max-new-tokens", 1)):
            command = [RUN, str(folder), "--prompt", "x", *map(str, flags)]
            found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
            assert (found.returncode, found.stderr.count(b"\n")) == (3, 1)
            assert b"the output cannot be written (No space left on device)" in found.stderr
    closed = ["sh", "-c", '"$0" "$1" --prompt x >&-', str(RUN), str(folder)]
    found = subprocess.run(closed, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (found.returncode, found.stderr.count(b"\n")) == (3, 1)


def test_paths_with_blanks_a_folder_that_cannot_be_written_and_values_behind_a_sign(
    tmp_path: Path, folder: Path
) -> None:
    odd = tmp_path / "two words" / "mödel 漢"
    shutil.copytree(folder, odd)
    for each in (*odd.iterdir(), odd):
        each.chmod(0o555 if each.is_dir() else 0o444)
    flags = ("--max-new-tokens=5", "--temperature=0")
    expected = run(folder, "--prompt", "a=b 😀", *flags)
    assert expected.returncode == 0, expected.stderr
    for name in (odd, Path(os.path.relpath(odd)), f"{odd}/"):
        found = run(name, "--prompt=a=b 😀", *flags)
        assert (found.returncode, found.stdout) == (0, expected.stdout), found.stderr
    odd.chmod(0o755)


THREADS = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "bellbox.h"

typedef struct {
    const bellbox_model* model;
    uint64_t seed;
    char text[4096];
    size_t length;
    bellbox_status status;
} job;

static int keep(void* user, const char* text, size_t bytes) {
    job* one = user;
    if (one->length + bytes >= sizeof(one->text)) return 1;
    memcpy(one->text + one->length, text, bytes);
    one->length += bytes;
    return 0;
}

static void* work(void* user) {
    job* one = user;
    bellbox_options options = {0};
    options.max_new_tokens = 60, options.temperature = 1.0, options.seed = one->seed, options.threads = 2;
    one->length = 0;
    one->status = bellbox_generate(one->model, "a dark", &options, keep, one, NULL, NULL);
    return NULL;
}

int main(int count, char** folders) {
    bellbox_model* models[2] = {NULL, NULL};
    static job alone[4], together[4];
    pthread_t threads[4];
    if (count != 3) return 4;
    for (int i = 0; i < 2; ++i)
        if (bellbox_open(folders[i + 1], &models[i], NULL) != BELLBOX_OK) return 5;
    for (int i = 0; i < 4; ++i) {
        alone[i].model = together[i].model = models[i % 2];
        alone[i].seed = together[i].seed = (uint64_t)i;
        work(&alone[i]);
    }
    for (int round = 0; round < 5; ++round) {
        for (int i = 0; i < 4; ++i)
            if (pthread_create(&threads[i], NULL, work, &together[i]) != 0) return 6;
        for (int i = 0; i < 4; ++i) {
            pthread_join(threads[i], NULL);
            if (together[i].status != BELLBOX_OK || alone[i].length == 0) return 7;
            if (together[i].length != alone[i].length) return 8;
            if (memcmp(together[i].text, alone[i].text, alone[i].length) != 0) return 9;
        }
    }
    bellbox_close(models[0]), bellbox_close(models[1]);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_two_models_and_four_threads_in_c(tmp_path: Path, folder: Path, tokenizer: Path) -> None:
    """Each thread gets the text that it gets alone."""
    other = packed(tmp_path / "gpt", tokenizer, "gpt-tiny", bits=3)
    source, program = tmp_path / "threads.c", tmp_path / "threads"
    source.write_text(THREADS)
    include = f"-I{ROOT / 'native' / 'include'}"
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread", include, source, LIBRARY]
    subprocess.run([*command, f"-Wl,-rpath,{BUILT}", "-o", program], check=True)
    assert subprocess.run([program, folder, other], timeout=120, check=False).returncode == 0


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


@pytest.mark.skipif(
    shutil.which("cc") is None or shutil.which("cmake") is None, reason="no C compiler or cmake"
)
@pytest.mark.parametrize(
    "libraries",
    [["-l:libbellbox.a", "-fopenmp", "-lstdc++", "-lm"], ["-lbellbox", "-Wl,-rpath,{prefix}/lib"]],
)
def test_what_is_installed_serves_a_program_elsewhere(
    tmp_path: Path, folder: Path, libraries: list[str]
) -> None:
    prefix, program = tmp_path / "a prefix", tmp_path / "continue"
    subprocess.run(["cmake", "--install", BUILT, "--prefix", prefix], check=True, capture_output=True)
    found = subprocess.run([prefix / "bin" / "bellbox-run", "--help"], capture_output=True, check=True)
    assert found.stdout.startswith(b"usage: bellbox-run")
    source = ROOT / "examples" / "device" / "continue.c"
    paths = [f"-I{prefix / 'include'}", f"-L{prefix / 'lib'}"]
    linked = [each.format(prefix=prefix) for each in libraries]
    subprocess.run(["cc", source, *paths, *linked, "-o", program], check=True)
    found = subprocess.run([program, folder, PROMPT], capture_output=True, check=True)
    greedy = run(folder, "--prompt", PROMPT, "--max-new-tokens", 50, "--temperature", 0)
    assert PROMPT + found.stdout.decode() == greedy.stdout
