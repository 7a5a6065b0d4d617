"""Checksums of what training, packing and running give, for `test_golden.py`.

    python tests/golden/record.py            compares, and prints what differs
    python tests/golden/record.py --write    records what this machine gives: only where numerics may change

Inputs and weights follow from integer arithmetic, so that codes, packed bytes and packed outputs are the same on every
machine: those are pinned. What training gives depends on the order in which a processor sums, so it is kept by kind of
processor, and compared where this one's kind was recorded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.formats.packed import folder_widths

HERE = Path(__file__).parent
METHODS = (
    "bbq",
    "quest",
    "lsq",
    "pact",
    "n2uq",
    "seq",
    "rtn",
    "ternary_mass",
    "ternary_support",
    "nf",
    "kmeans",
)
PACKED = ("bbq", "quest", "lsq", "pact", "n2uq", "seq", "rtn")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Bell-shaped fp32 numbers that every machine computes alike: sums of four hashed integers, exactly scaled."""
    count = torch.Size(shape).numel()
    index = torch.arange(count * 4, dtype=torch.int64) + seed * 1_000_003
    hashed = (index * 2_654_435_761 + 12_345) % 4_294_967_291
    hashed = (hashed * 48_271) % 4_294_967_291
    sums = (hashed // 65_536).reshape(count, 4).sum(1) - 131_070
    return (sums.to(torch.float32) / 32_768).reshape(shape)


def digest(*tensors: Tensor) -> str:
    """Of bytes, shapes and dtypes."""
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().contiguous().cpu()
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return found.hexdigest()[:16]


def network(width: int = 64) -> nn.Module:
    """Three layers with fixed weights."""
    model = nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 40))
    with torch.no_grad():
        for place, p in enumerate(model.parameters()):
            p.copy_(numbers(*p.shape, seed=place + 1) * (0.1 if p.dim() == 2 else 0.02))
    return model


def images() -> nn.Module:
    """Two convolutions with fixed weights."""
    model = nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(24, 32, 1, bias=False)
    )
    with torch.no_grad():
        for place, p in enumerate(model.parameters()):
            p.copy_(numbers(*p.shape, seed=place + 11) * 0.1)
    return model


def recipes(method: str) -> Iterator[tuple[str, bb.Recipe]]:
    """The method at each width that it has, by a name."""
    if method.startswith("ternary"):
        yield method, bb.Recipe.of(method, levels=3)
        return
    for bits in (1, 2, 3, 4):
        if method == "nf" and bits == 1:
            continue
        choices: dict[str, Any] = {"weight_only": "float"} if method == "kmeans" else {}
        recipe = bb.Recipe.bbq(bits) if method == "bbq" else bb.Recipe.of(method, bits, **choices)
        yield f"{method}-{bits}", recipe
    if method == "bbq":
        yield "bbq-ternary", bb.Recipe.bbq(levels=3)
        yield "bbq-paper", bb.Recipe.bbq_paper(2)
        yield "bbq-ema", bb.Recipe.bbq(2, statistic="ema", weights_rotated=False)
        yield "bbq-signs", bb.Recipe.bbq(4, weights_rotated=False, options={"signs": True})
        yield "bbq-zeta", bb.Recipe.bbq_vision(3)


def fitted(method: str, recipe: bb.Recipe) -> nn.Module:
    """The network prepared, its scales set by one batch."""
    torch.manual_seed(0)
    model = bb.prepare(network(), recipe)
    model(numbers(32, 64, seed=100))
    return model


def trained(method: str, recipe: bb.Recipe) -> tuple[str, float]:
    """Digest of the parameters after 20 steps, and the first step's loss."""
    model = fitted(method, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target, first = numbers(64, 40, seed=7), 0.0
    for step in range(20):
        loss = (model(numbers(64, 64, seed=200 + step)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first if step else loss.item()
    # The values alone: names and shapes of scales may change, what was learned may not.
    parameters = [p.reshape(-1) for p in model.parameters()]
    return digest(torch.cat(parameters)), first


def packed(recipe: bb.Recipe, method: str) -> dict[str, str]:
    """Digests of a packed network: codes, scales, and outputs for one row and many, fp32 and bf16."""
    model = bb.convert(fitted(method, recipe).eval())
    layers = [m for m in model.modules() if hasattr(m, "weight_codes")]
    rows = [numbers(count, 64, seed=300 + count) for count in (1, 5, 70)]
    return {
        "codes": digest(*(layer.weight_codes() for layer in layers)),
        "scales": digest(*(layer.weight_scale.reshape(-1) for layer in layers)),
        "outputs": digest(*(model(x) for x in rows)),
        "bf16": digest(*(model(x.bfloat16()) for x in rows)),
    }


def packed_images(bits: int) -> dict[str, str]:
    """The same of two convolutions."""
    model = bb.prepare(images(), bb.Recipe.bbq_vision(bits))
    x = numbers(3, 16, 9, 9, seed=500)
    model(x)
    model = bb.convert(model.eval())
    layers = [m for m in model.modules() if hasattr(m, "weight_codes")]
    return {
        "codes": digest(*(layer.weight_codes() for layer in layers)),
        "outputs": digest(model(x).contiguous()),
    }


def folder_outputs(folder: Path) -> str:
    """What a stored folder computes, loaded into the module that it was made of."""
    if folder.name.startswith("conv"):
        return digest(bb.load(folder, into=images())(numbers(3, 16, 9, 9, seed=500)).contiguous())
    if folder.name.startswith("llama"):
        tokens = (torch.arange(48).reshape(2, 24) * 7) % 61
        model = bb.load(folder)
        model.exact_attention = True  # type: ignore[assignment]
        return digest(model(tokens))
    widths = folder_widths(folder) or (None,)  # of several, the function of each
    return digest(*(bb.load(folder, into=network(), bits=bits)(numbers(5, 64, seed=305)) for bits in widths))


def kind_of_machine() -> str:
    """What decides the order in which torch sums."""
    vendor = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("vendor_id"):
            vendor = line.split(":")[1].strip()
            break
    from bellbox.ops import native

    # A larger processor that is held down is a kind of its own: not every library of torch's heeds that.
    held = f" held to {os.environ['BELLBOX_ISA']}" if "BELLBOX_ISA" in os.environ else ""
    kernels = native.describe().split(" (")[0] + held
    return f"{kernels}, torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {vendor}"


def measured() -> dict[str, Any]:
    """Everything that this machine gives now."""
    with tempfile.TemporaryDirectory() as folder:
        run = resumed(HERE / "run", Path(folder) / "copy")
    found: dict[str, Any] = {"trained": {"resumed run": run}, "losses": {}, "packed": {}, "folders": {}}
    for method in METHODS:
        for name, recipe in recipes(method):
            found["trained"][name], found["losses"][name] = trained(method, recipe)
            if method in PACKED and name != "bbq-paper":
                found["packed"][name] = packed(recipe, method)
    for bits in (1, 2, 3, 4):
        found["packed"][f"conv-{bits}"] = packed_images(bits)
    for folder in sorted((HERE / "folders").glob("*")):
        found["folders"][folder.name] = folder_outputs(folder)
    return found


def resumed(folder: Path, tmp: Path) -> str:
    """Parameters of the stored run after it has gone on from its checkpoint to its end."""
    from bellbox.training import load_config, train

    shutil.copytree(folder, tmp)
    config = load_config(tmp / "run" / "config.yaml")
    data = dataclasses.replace(config.data, source=str(tmp / "tokens"))
    train(dataclasses.replace(config, folder=str(tmp / "run"), data=data), show=False)
    from safetensors.torch import load_file

    tensors = load_file(tmp / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    names = sorted(name for name in tensors if name.endswith(("weight", "gamma")))
    return digest(torch.cat([tensors[name].reshape(-1) for name in names]))


def write_run(root: Path) -> None:
    """A run of four steps that stopped after two, to be gone on with by later versions."""
    sys.path.insert(0, str(HERE.parent / "training"))
    from tiny_run import config, write_tokens

    from bellbox.training import train

    made = config(write_tokens(root / "tokens", 2000), root / "run")
    train(made, show=False)
    shutil.rmtree(root / "run" / "checkpoints" / "step-00000004")
    (root / "run" / ".lock").unlink()


def write_folders() -> None:
    """Folders of the present version, to be read by later ones. Only ever written once a version."""
    from bellbox.models import LlamaConfig, build

    root = HERE / "folders"
    for name, method, recipe in (
        ("linear-v2-bbq-2", "bbq", bb.Recipe.bbq(2)),
        ("linear-v2-lsq-4", "lsq", bb.Recipe.of("lsq", 4)),
        ("linear-v2-ema-3", "bbq", bb.Recipe.bbq(3, statistic="ema", weights_rotated=False)),
        ("linear-v2-signs-1", "bbq", bb.Recipe.bbq(1, weights_rotated=False, options={"signs": True})),
        ("linear-v2-rtn-3", "rtn", bb.Recipe.of("rtn", 3)),
    ):
        bb.save(bb.convert(fitted(method, recipe).eval()), root / name)
    conv = bb.prepare(images(), bb.Recipe.bbq_vision(2))
    conv(numbers(3, 16, 9, 9, seed=500))
    bb.save(bb.convert(conv.eval()), root / "conv-v3-2")
    llama = build(LlamaConfig(61, 48, 80, 2, 4, 2, max_position_embeddings=40, initializer_range=0.3), seed=3)
    with torch.no_grad():
        for place, p in enumerate(llama.parameters()):
            if p.dim() == 2:
                p.copy_(numbers(*p.shape, seed=place + 50) * 0.3)
    bb.prepare(llama, bb.Recipe.bbq(2))
    llama((torch.arange(48).reshape(2, 24) * 5) % 61)
    for precision in ("fp32", "int8"):
        bb.save(bb.convert(llama.eval(), embeddings=precision), root / f"llama-v2-{precision}")  # type: ignore[arg-type]


def write_later_folders() -> None:
    """Likewise of versions 4 and 6."""
    from bellbox.models import LlamaConfig, build

    root = HERE / "folders"
    bb.save(bb.convert(fitted("bbq", bb.Recipe.bbq(4)).eval()), root / "linear-v4-bbq-4")
    llama = build(LlamaConfig(61, 64, 96, 1, 4, 2, max_position_embeddings=40, initializer_range=0.3), seed=3)
    with torch.no_grad():
        for place, p in enumerate(llama.parameters()):
            if p.dim() == 2:
                p.copy_(numbers(*p.shape, seed=place + 70) * 0.3)
    bb.prepare(llama, bb.Recipe.bbq(2, embedding_bits=4, embedding_group=32))
    llama((torch.arange(48).reshape(2, 24) * 5) % 61)
    bb.save(bb.convert(llama.eval()), root / "llama-v6-int4")


def write_nested_folder() -> None:
    """Likewise of version 7."""
    model = fitted("bbq", bb.Recipe.bbq(nested=(4, 3, 1)))
    bb.save(bb.convert(model.eval()), HERE / "folders" / "linear-v7-nested")


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    path = HERE / "golden.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"machines": {}}
    if "--folders" in sys.argv:
        write_folders()
    if "--later-folders" in sys.argv:
        write_later_folders()
    if "--nested-folder" in sys.argv:
        write_nested_folder()
    found = measured()
    if "--write" in sys.argv:
        machine = {"trained": found.pop("trained")}
        known = {**known, **found, "machines": {**known["machines"], kind_of_machine(): machine}}
        path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return
    for part in ("packed", "folders"):
        for name, value in known[part].items():
            if found[part].get(name) != value:
                print(part, name, "was", value, "is", found[part].get(name))
    for name, value in known["machines"].get(kind_of_machine(), {"trained": {}})["trained"].items():
        if found["trained"].get(name) != value:
            print("trained", name, "was", value, "is", found["trained"].get(name))


if __name__ == "__main__":
    main()
