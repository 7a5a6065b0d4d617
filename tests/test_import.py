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


def test_importing_costs_a_fifth_of_importing_torch_at_most_and_brings_nothing_optional():
    code = (
        "import time, sys; begin = time.process_time(); import torch; start = time.process_time(); "
        "before = set(sys.modules); import bellbox; end = time.process_time(); "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print((end - start) / (start - begin), torch.cuda.is_initialized(), *sorted(new))"
    )
    shares, brought = [], set()
    for _ in range(4):  # the first may have to compile
        share, device, *modules = run(code).split()
        shares.append(float(share))
        brought |= set(modules)
        assert device == "False"
        if min(shares) < 0.2:
            break
    assert min(shares) < 0.2, shares
    assert brought.isdisjoint(OPTIONAL)
    assert "bellbox" in brought


def test_the_public_names_are_there():
    import bellbox

    assert all(hasattr(bellbox, name) for name in bellbox.__all__)
    assert {"prepare", "convert", "save", "load", "Recipe", "BellboxError"} <= set(bellbox.__all__)


LOADED_BY_LOAD = (
    "calibrate", "convert", "core", "coverage", "errors", "formats", "inference", "listing", "models", "nn", "ops",
    "quantizers", "past_forward", "recipe", "structure", "utils", "version",
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
    assert formats == ["description", "expert_places", "guard", "nested", "packed", "schema"]
    assert "bellbox.models.llama" in modules


def test_opening_a_model_for_use_brings_nothing_of_sharding():
    code = "import sys, bellbox.runs.open, bellbox.formats.auto; print('torch.distributed.tensor' in sys.modules)"
    assert run(code).strip() == "False"
