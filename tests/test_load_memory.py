"""Loading holds one copy of the codes, in the machine's layout, and what the mapped file shows for a moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.formats.packed import sizes
from bellbox.ops import native

SIZE, LAYERS = 4096, 16

# A child process, whose peak is its own: first a small model, for what Python and torch take anyway; from then on the
# high-water row_scale counts anew.
LOADER = """
import sys, torch, bellbox as bb
from torch import nn
def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))
def model(size, layers): return nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
def empty(size, layers):
    holder = model(1, layers)
    for layer in holder: layer.in_features = layer.out_features = size
    return holder
torch.set_num_threads(1)
with torch.no_grad():
    bb.load(sys.argv[1], into=empty(64, 1))(torch.randn(1, 64))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = memory("VmRSS")
    loaded = bb.load(sys.argv[2], into=empty(int(sys.argv[3]), int(sys.argv[4])))
    loaded(torch.randn(1, int(sys.argv[3])))
print(memory("VmHWM") - before)
"""


def packed(size: int, layers: int) -> nn.Module:
    from bellbox.core.grid import Levels
    from bellbox.nn import InputCoding, PackedLinear

    levels = Levels.gaussian(4)
    made = nn.Sequential()
    for _ in range(layers):
        layer = PackedLinear(size, size, levels.grid, InputCoding(levels, 64), bias=False)
        layer.weight_packed.random_(0, 256)
        layer.weight_scale.fill_(0.01)
        layer.act_scale.fill_(1.0)
        made.append(layer)
    return made


@pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")
def test_loading_takes_little_more_than_the_packed_size(tmp_path: Path) -> None:
    big = packed(SIZE, LAYERS)
    bb.save(packed(64, 1), tmp_path / "small")
    bb.save(big, tmp_path / "big")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, tmp_path / "small", tmp_path / "big", str(SIZE), str(LAYERS)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * sizes(big).packed_bytes


def test_letting_pages_go_loses_nothing(tmp_path: Path) -> None:
    model = packed(256, 1)
    codes = model[0].weight_packed.clone()
    bb.save(model, tmp_path / "model")
    loaded = bb.load(tmp_path / "model", into=nn.Sequential(nn.Linear(256, 256, bias=False)))
    assert torch.equal(loaded[0].weight_packed, codes)
