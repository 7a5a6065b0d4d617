"""A packed model taken elsewhere, in whatever form, gives its own outputs to the last bit."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bellbox.ops import packed_conv2d, packed_linear, weight_layout

sys.path.insert(0, str(Path(__file__).parent))
import exported


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return exported.packed(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_every_form_gives_the_same_bits_in_another_process(model, tmp_path):
    x = exported.images()
    with torch.no_grad():
        y = model(x)
        torch.save(y, tmp_path / "y.pt")
        program = torch.export.export(model, (x,))
        names = {str(node.target) for node in program.graph.nodes}
        assert {"bellbox.packed_linear.default", "bellbox.packed_conv2d.default"} <= names
        assert torch.equal(program.module()(x), y)
        torch.export.save(program, tmp_path / "m.pt2")
        torch.jit.trace(model, x, check_trace=False).save(tmp_path / "m.jit")
        torch.save(model, tmp_path / "m.pkl")
        torch.save(model.state_dict(), tmp_path / "state.pt")
    script = Path(exported.__file__)
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == ["export True", "jit True", "pickle True", "state True"]


def test_copies_and_compiled_graphs_give_the_same_bits(model):
    torch._dynamo.reset()
    x, other = exported.images(), exported.packed(2)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), y)
        model_of_other = torch.compile(other, fullgraph=True, backend="aot_eager")
        assert torch.equal(model_of_other(x), other(x))
        assert torch.equal(compiled(x), y)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_keep_their_registered_contract(model, backend, dtype, monkeypatch):
    monkeypatch.setenv("BELLBOX_BACKEND", backend)
    linear, conv = model.linear, model.conv
    given = torch.randn(2, 3, 8), *linear.bound.tensors(), *linear.numbers, dtype
    torch.library.opcheck(packed_linear.operation.call, given)
    geometry = packed_conv2d.geometry_numbers(conv.geometry)
    for add, relu in ((None, False), (torch.ones(3, 8, 6, 5), True)):
        given = exported.images(), *conv.bound.tensors(), *conv.numbers, 16, geometry, add, relu, dtype
        torch.library.opcheck(packed_conv2d.operation.call, given)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize(("levels", "places"), [(2, 1), (4, 9), (8, 1), (16, 1), (255, 1)])
def test_layouts_keep_their_registered_contract(backend, levels, places, monkeypatch):
    monkeypatch.setenv("BELLBOX_BACKEND", backend)
    codes = torch.randint(0, levels, (17, 9 * 7), dtype=torch.uint8)
    torch.library.opcheck(weight_layout.prepack_operation.call, (codes, levels, places))
    packed = weight_layout.prepack(codes, levels, places)
    torch.library.opcheck(weight_layout.unpack_operation.call, (packed, 17, 63, levels))
