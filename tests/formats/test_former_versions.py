"""Folders of versions 2 and 3: read, refused where something is wrong, written again as version 4."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packed import section_of

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.formats.packed import is_packed

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import record  # noqa: E402

LLAMA, CONV, STATIC = "llama-v2-fp32", "conv-v3-2", "linear-v2-ema-3"


def copied(name: str, to: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "folders" / name, to / "m"))


def rewrite(
    folder: Path,
    change: Callable[[dict[str, Any]], object],
    tensors: Callable[[dict[str, torch.Tensor]], object] | None = None,
) -> None:
    """Change a folder and make its checksums right again."""
    path = folder / "model.safetensors"
    if tensors is not None:
        values = {name: value.clone() for name, value in load_file(path).items()}
        tensors(values)
        save_file(values, path)
    config = json.loads((folder / "config.json").read_text())
    data = path.read_bytes()
    config["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(config)
    content = {key: value for key, value in config.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    config["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    if config.get("model") is not None:
        return bb.load(folder)
    return bb.load(folder, into=record.images() if config["version"] == 3 else record.network())


@pytest.mark.parametrize("name", [LLAMA, CONV, STATIC])
def test_a_former_folder_written_again_is_version_4_and_the_same_function(name: str, tmp_path: Path) -> None:
    former = load(GOLDEN / "folders" / name)
    bb.save(former, tmp_path / "again")
    section = section_of(tmp_path / "again")
    assert section["version"] == 4
    assert {entry["method"] for entry in section["layers"].values()} == {""}
    again = (
        bb.load(tmp_path / "again")
        if section["model"] is not None
        else bb.load(tmp_path / "again", into=record.images() if name == CONV else record.network())
    )
    before, after = former.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_former_folder_may_be_replaced(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    assert is_packed(folder)
    model = bb.load(folder)
    bb.save(model, folder)
    assert section_of(folder)["version"] == 4


def first(config: dict[str, Any]) -> dict[str, Any]:
    return next(iter(config["quantization"]["layers"].values()))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (LLAMA, lambda c: c.update(version=1), "format version 1; this Bellbox reads 2, 3, 4, 5, 6 and 7"),
        (LLAMA, lambda c: c.update(version=8), "format version 8; this Bellbox reads 2, 3, 4, 5, 6 and 7"),
        (LLAMA, lambda c: c.update(version=4), "format version 4 does not stand in this place"),
        (LLAMA, lambda c: c.update(version=True), "format version True"),
        (LLAMA, lambda c: c.update(format="gguf"), "not a packed Bellbox model"),
        (LLAMA, lambda c: c.update(quantization_config={}), "quantization_config"),
        (LLAMA, lambda c: first(c).update(method="bbq"), "method"),
        (LLAMA, lambda c: first(c).update(input="nobody"), "nobody.*not in the file"),
        (LLAMA, lambda c: first(c).update(in_features=8), "in_features|divides"),
        (CONV, lambda c: c.update(version=2), "is a convolution, which version 2 does not have"),
        (CONV, lambda c: first(c).update(input="nobody"), "input is that of a layer that is not in the file"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    name: str, change: Callable[[dict[str, Any]], object], says: str, tmp_path: Path
) -> None:
    folder = copied(name, tmp_path)
    rewrite(folder, change)
    with pytest.raises(BellboxError, match=says) as caught:
        bb.load(folder, into=record.images()) if name == CONV else bb.load(folder)
    assert "\n" not in str(caught.value)


def test_the_checksum_of_a_former_configuration_is_compared(tmp_path: Path) -> None:
    folder = copied(LLAMA, tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    assert (folder / "config.json").read_text() != text
    with pytest.raises(BellboxError, match="damaged, its checksum does not match"):
        bb.load(folder)


def rename(tensors: dict[str, torch.Tensor], leaf: str, to: str) -> None:
    name = next(each for each in tensors if each.endswith(leaf))
    tensors[name.removesuffix(leaf) + to] = tensors.pop(name)


def stretch(tensors: dict[str, torch.Tensor], leaf: str) -> None:
    name = next(each for each in tensors if each.endswith(leaf))
    tensors[name] = tensors[name].reshape(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: stretch(t, "act_scale"), r"act_scale' is \(1,\), this version has one of \(\)"),
        (lambda t: stretch(t, "act_rsigma"), r"act_rsigma' is \(1,\)"),
        (lambda t: rename(t, "act_rsigma", "act_rstd"), "act_rstd' is of a later version"),
        (lambda t: rename(t, "act_rsigma", "other"), "act_rstd' is missing"),
    ],
)
def test_tensors_of_another_version_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], says: str, tmp_path: Path
) -> None:
    folder = copied(STATIC, tmp_path)
    rewrite(folder, lambda config: None, change)
    with pytest.raises(BellboxError, match=says):
        bb.load(folder, into=record.network())


def test_a_users_own_buffers_keep_their_names(tmp_path: Path) -> None:
    def make() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        model[1].register_buffer("act_rsigma", torch.ones(3))
        return model

    model = bb.prepare(make(), bb.Recipe.bbq(2))
    model(torch.randn(2, 8))
    bb.save(bb.convert(model), tmp_path / "m")
    loaded = bb.load(tmp_path / "m", into=make())
    assert loaded[1].act_rsigma.tolist() == [1, 1, 1]
