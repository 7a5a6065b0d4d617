"""The kernels for ARM under qemu: the bits of portable C++ and the text of this machine, on three processors.

The sources are compiled once, without much optimization, into build/arm/tests; `make arm` runs more of the same with
all of it. No time of anything here says what a processor would take.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.models import build, preset

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "native"
COMPILER, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
JSON = Path("/usr/include/nlohmann/json.hpp")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64 (Debian: qemu-user)"),
]

# Processors, and the kernels that run on them, best first.
PROCESSORS = {
    "max": "i8mm, dotprod, neon, portable",
    "neoverse-n1": "dotprod, neon, portable",
    "cortex-a53": "neon, portable",
}
EXTENSIONS = {"dotprod": ["-march=armv8.2-a+dotprod"], "i8mm": ["-march=armv8.2-a+dotprod+i8mm"]}
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-function", "-ffp-contract=off",
         "-fno-math-errno", f"-I{NATIVE}", f"-I{NATIVE / 'include'}"]  # fmt: skip
PARTS = {
    **{isa: [f"kernels/{isa}/table.cpp", "-O1"] for isa in ("portable", "neon", "dotprod", "i8mm")},
    "dispatch": ["dispatch.cpp", "-O1"],
    "check": ["tests/check.cpp", "-O1", "-pthread", "-fopenmp"],
    "api": ["runtime/api.cpp", "-O1", "-fopenmp", "-idirafter", "/usr/include"],
    "run": ["runtime/run.cpp", "-O1"],
}
KERNELS = ["portable", "neon", "dotprod", "i8mm", "dispatch"]


def digest_of_sources() -> str:
    found = hashlib.sha256(repr((FLAGS, PARTS, EXTENSIONS)).encode())
    for source in sorted(each for each in NATIVE.rglob("*") if each.suffix in (".h", ".cpp")):
        found.update(source.relative_to(NATIVE).as_posix().encode() + b"\0" + source.read_bytes())
    return found.hexdigest()[:16]


def compiled(name: str, folder: Path, compiler: str, flags: list[str]) -> Path:
    """An object file, made once; of those that are made at once the last stays."""
    made = folder / f"{name}.o"
    if not made.is_file():
        source, *own = PARTS[name]
        part = folder / f"{name}.{os.getpid()}.o"
        command = [compiler, *FLAGS, *own, *flags, "-c", str(NATIVE / source), "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        part.replace(made)
    return made


def program(
    name: str, parts: list[str], compiler: str | None = COMPILER, machine: str = "-DBELLBOX_ARM=1"
) -> Path:
    folder = ROOT / "build" / "arm" / "tests" / digest_of_sources()
    if not folder.is_dir():  # what was made of other sources
        shutil.rmtree(folder.parent, ignore_errors=True)
    folder = folder / Path(str(compiler)).name
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / name
    if made.is_file():
        return made
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(
                lambda each: compiled(each, folder, str(compiler), [machine, *EXTENSIONS.get(each, [])]),
                parts,
            )
        )
    part = folder / f"{name}.{os.getpid()}"
    command = [str(compiler), "-static", "-pthread", "-fopenmp", *map(str, objects), "-o", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    part.replace(made)
    return made


def check() -> Path:
    return program("check", [*KERNELS, "check"])


def bellbox_run() -> Path:
    return program("bellbox-run", [*KERNELS, "api", "run"])


def bellbox_run_here() -> Path:
    """That of `make runtime`, else one for this machine with portable C++ alone."""
    built = Path(os.environ.get("BELLBOX_RUNTIME") or ROOT / "build" / "runtime") / "bellbox-run"
    parts = ["portable", "dispatch", "api", "run"]
    return (
        built if built.is_file() else program("bellbox-run", parts, shutil.which("g++"), "-DBELLBOX_HERE=1")
    )


def emulated(processor: str, *command: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    others = {name: value for name, value in os.environ.items() if name != "BELLBOX_ISA"}
    return subprocess.run(
        [str(QEMU), "-cpu", processor, *map(str, command)],
        capture_output=True,
        timeout=300,
        check=False,
        env=others | environment,
    )


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_kernel_has_the_bits_of_portable_cpp(processor: str) -> None:
    done = emulated(processor, check(), 12, 1 + len(processor))
    said = done.stdout.decode()
    assert done.returncode == 0, said + done.stderr.decode()
    assert f"on {PROCESSORS[processor]}, seed" in said
    for isa in PROCESSORS[processor].split(", "):
        assert f"{isa}: the same bits" in said


@pytest.mark.slow
def test_the_check_sees_a_kernel_that_is_wrong(tmp_path: Path) -> None:
    """Levels that lie one too high in one kernel: the program must say so, or it proves nothing."""
    altered = tmp_path / "native"
    shutil.copytree(NATIVE, altered)
    file = altered / "kernels" / "neon" / "codes.h"
    text = file.read_text()
    assert text.count("multiplier * c - shift") == 1
    file.write_text(text.replace("multiplier * c - shift", "multiplier * c - shift + (c == 1)"))
    folder = check().parent
    flags = [flag.replace(str(NATIVE), str(altered)) for flag in FLAGS]
    wrong = tmp_path / "neon.o"
    table = altered / "kernels" / "neon" / "table.cpp"
    subprocess.run([str(COMPILER), *flags, "-O1", "-c", str(table), "-o", str(wrong)], check=True)
    objects = [wrong if each == "neon" else folder / f"{each}.o" for each in [*KERNELS, "check"]]
    altered_check = tmp_path / "check"
    linked = [str(COMPILER), "-static", "-pthread", "-fopenmp", *map(str, objects), "-o", str(altered_check)]
    subprocess.run(linked, check=True, capture_output=True)
    done = emulated("cortex-a53", altered_check, 12)
    assert done.returncode == 1
    assert re.search(r"neon, case \d+: .*differs from the reference", done.stdout.decode())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    Tokenizer.train([(ROOT / "LICENSE").read_text()], 600).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("tiny", {"bits": 1}),
        ("tiny", {"bits": 2, "embedding_bits": 4}),
        ("gpt-tiny", {"bits": 4, "embedding_bits": 8}),
    ],
)
@pytest.mark.skipif(not JSON.is_file(), reason=f"no {JSON} (Debian: nlohmann-json3-dev)")
def test_bellbox_run_writes_the_text_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: Path, name: str, recipe: dict[str, Any]
) -> None:
    monkeypatch.setenv("BELLBOX_ISA", "reference")  # of how Python's kernels were built nothing depends here
    config = preset(name, vocab_size=Tokenizer.load(words).vocab_size, hidden_size=64, intermediate_size=128,
                    num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
                    initializer_range=0.2)  # fmt: skip
    plain = build(config, seed=0)
    random_gains = torch.Generator().manual_seed(1)
    for each in plain.parameters():
        if each.dim() == 1:  # else the sum over a LayerNorm's row is zero but for rounding: a threshold
            each.data.add_(0.1 * torch.randn(each.shape, generator=random_gains))
    model = bb.prepare(plain, bb.Recipe.bbq(**recipe)).eval()
    with torch.no_grad():
        model(torch.arange(32)[None])
    bb.save(bb.convert(model), tmp_path / "m", tokenizer=str(words))
    prompt = "The naïve city was 12 miles away,"
    flags = ["--prompt", prompt, "--max-new-tokens", 40, "--temperature", 0.9, "--top-k", 40, "--seed", 7]
    monkeypatch.delenv("BELLBOX_ISA")
    here = [str(each) for each in (bellbox_run_here(), tmp_path / "m", *flags)]
    text = subprocess.run(here, capture_output=True, check=True).stdout.decode()
    assert text.startswith(prompt)
    assert len(text) > len(prompt) + 40
    for processor, isas in PROCESSORS.items():
        done = emulated(processor, bellbox_run(), tmp_path / "m", *flags)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == text
        assert done.stderr.decode().startswith(isas.split(",")[0] + " kernels, ")
    held = emulated("max", bellbox_run(), tmp_path / "m", *flags, BELLBOX_ISA="dotprod")
    assert (held.stdout.decode(), held.stderr.split()[0]) == (text, b"dotprod")
    refused = emulated("cortex-a53", bellbox_run(), tmp_path / "m", *flags, BELLBOX_ISA="i8mm")
    assert refused.returncode != 0
    assert b"this processor cannot run it; it runs: neon, portable" in refused.stderr
