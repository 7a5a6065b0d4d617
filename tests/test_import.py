from __future__ import annotations

import os
import subprocess
import sys

OPTIONAL = (
    "tyro",
    "rich",
    "matplotlib",
    "transformers",
    "tokenizers",
    "datasets",
    "triton",
    "tensorboard",
    "yaml",
    "onnx",
)


def run(code: str) -> str:
    """What a process prints; it may keep bytecode, as users' do, whatever this one was told."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
    ).stdout.strip()


def test_importing_costs_less_than_three_tenths_of_a_second_beyond_torch_and_brings_nothing_optional():
    code = (
        "import time, sys, torch; before = set(sys.modules); start = time.process_time(); import bellbox; "
        "spent = time.process_time() - start; new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(spent, torch.cuda.is_initialized(), *sorted(new))"
    )
    times, brought = [], set()
    for _ in range(4):  # the first may have to compile
        seconds, device, *modules = run(code).split()
        times.append(float(seconds))
        brought |= set(modules)
        assert device == "False"
        if min(times) < 0.3:
            break
    assert min(times) < 0.3, times  # of the processor
    assert brought.isdisjoint(OPTIONAL)
    assert "bellbox" in brought


def test_the_public_names_are_there():
    import bellbox

    assert all(hasattr(bellbox, name) for name in bellbox.__all__)
    assert {"prepare", "convert", "save", "load", "Recipe", "BellboxError"} <= set(bellbox.__all__)


LOADED_BY_LOAD = (
    "calibrate", "convert", "core", "coverage", "errors", "formats", "inference", "models", "nn", "ops", "quantizers",
    "past_forward", "recipe", "structure", "utils", "version",
)  # fmt: skip


def test_loading_a_packed_model_imports_nothing_of_training(tmp_path):
    import torch

    import bellbox as bb
    from bellbox.models import LlamaConfig, build

    model = bb.prepare(build(LlamaConfig(13, 16, 24, 1, 2, 1, max_position_embeddings=8)), bb.Recipe.bbq(2))
    model(torch.arange(7)[None])
    bb.save(bb.convert(model), tmp_path / "m")
    code = (
        f"import sys, bellbox; bellbox.load({str(tmp_path / 'm')!r}); "
        "print(*sorted(m for m in sys.modules if m.startswith('bellbox.')))"
    )
    modules = run(code).split()
    assert {name.split(".")[1] for name in modules if not name.startswith("bellbox._")} <= set(LOADED_BY_LOAD)
    formats = [name.rpartition(".")[2] for name in modules if name.startswith("bellbox.formats.")]
    assert formats == ["description", "packed", "schema"]
    assert "bellbox.models.llama" in modules
