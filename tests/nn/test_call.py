"""How a packed layer is called: past torch's dispatcher where nobody looks on, as an operation of torch elsewhere."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.nn import PackedLinear
from bellbox.ops import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernels were not built")
OPERATION = "bellbox.packed_linear.default"


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(48, 20), nn.Linear(48, 5), nn.Linear(48, 33)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 20)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x),)


@pytest.fixture(params=[Alone, Siblings])
def packed(request) -> nn.Module:
    torch.manual_seed(0)
    model = bb.prepare(request.param(), bb.Recipe.bbq(2))
    model(torch.randn(9, 48))
    return bb.convert(model.eval())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1))


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(a, b, strict=True))


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_an_operation_and_nobody_pays_for_it_otherwise(packed, x, monkeypatch):
    expected = packed(x)
    with Recorded() as seen:
        assert same(packed(x), expected)
    assert OPERATION in seen.names
    monkeypatch.delattr(torch.ops.bellbox, "packed_linear")
    assert same(packed(x), expected)


def test_fake_tensors_give_shapes_and_touch_no_memory(packed, x):
    expected = packed(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for given in (mode.from_tensor(x), x):
            outs = packed(given)
            assert all(isinstance(out, FakeTensor) for out in outs)
            assert [out.shape for out in outs] == [out.shape for out in expected]
    assert same(packed(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_layers(packed, x):
    traced = torch.jit.trace(packed, x, check_trace=False)
    assert same(traced(2 * x[:1]), packed(2 * x[:1]))


def test_a_function_transform_gives_the_same_numbers(packed, x):
    assert same(torch.vmap(packed)(x), packed(x))


def test_a_compiled_layer_has_the_dtype_that_autocast_asks_for(packed, x):
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert same(compiled(x), packed(x))
        assert packed(x)[0].dtype == torch.bfloat16
    assert same(compiled(x), packed(x))


class Tagged(Tensor):
    pass


def test_subclasses_parameters_and_tensors_with_gradients_give_the_same_numbers(packed, x):
    expected = packed(x)
    for given in (x.as_subclass(Tagged), nn.Parameter(x), x.clone().requires_grad_()):
        outs = packed(given)
        assert all(out.requires_grad == given.requires_grad for out in outs)
        assert same(tuple(out.detach().as_subclass(Tensor) for out in outs), expected)


def test_the_result_has_the_dtype_that_autocast_asks_for(packed, x):
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            outs = packed(x)
            assert same(outs, packed(x))
        assert [out.dtype for out in outs] == [dtype] * len(outs)
        assert same(outs, tuple(out.to(dtype) for out in packed(x)))
    assert same(packed(x.bfloat16()), tuple(out.bfloat16() for out in packed(x.bfloat16().float())))


def test_inputs_of_any_strides_and_any_mode(packed, x):
    expected = packed(x)
    assert same(packed(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    assert same(packed(torch.stack([x, -x], dim=-1)[..., 0]), expected)
    with torch.device("meta"):  # a default device is for new tensors, not for results
        assert same(packed(x), expected)
    with torch.inference_mode():
        assert same(packed(x), expected)
        inside = x.clone()
    assert same(packed(inside), expected)


@pytest.mark.parametrize("change", ["in place", "another tensor", "load_state_dict", "assigned"])
def test_changed_numbers_are_noticed_at_the_next_call(packed, x, change):
    before = packed(x)
    layers = [layer for layer in packed.modules() if isinstance(layer, PackedLinear)]
    doubled = {
        name: 2 * value if "scale" in name and "act" in name else value
        for name, value in packed.state_dict().items()
    }
    for layer in layers:
        if change == "in place":
            layer.act_scale.mul_(2)
        elif change == "another tensor":
            layer.act_scale = 2 * layer.act_scale
    if change in ("load_state_dict", "assigned"):
        packed.load_state_dict(doubled, assign=change == "assigned")
    biases = [layer.bias for layer in layers]
    for bias, then, now in zip(biases, before, packed(x), strict=True):
        torch.testing.assert_close(now - bias, 2 * (then - bias), rtol=1e-5, atol=1e-5)


def test_numbers_that_the_kernels_cannot_read_are_one_line(packed, x):
    halves = {name: v.half() if v.is_floating_point() else v for name, v in packed.state_dict().items()}
    other = copy.deepcopy(packed)
    other.load_state_dict(halves, assign=True)
    with pytest.raises(BellboxError, match=r"weight_scale is torch.float16: fp32 is needed"):
        other(x)


def test_a_layer_that_was_saved_runs_where_there_are_no_kernels(packed, x, monkeypatch):
    expected, saved = packed(x), io.BytesIO()
    torch.save(packed, saved)
    monkeypatch.setattr(native, "_module", lambda: None)
    saved.seek(0)
    again = torch.load(saved, weights_only=False)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(again(x), expected, strict=True))


def test_copies_and_moved_layers_have_numbers_of_their_own(packed, x):
    before = packed(x)
    other = copy.deepcopy(packed)
    assert same(other(x), before)
    assert same(copy.deepcopy(packed).to(torch.bfloat16)(x), before)
    for layer in other.modules():
        if isinstance(layer, PackedLinear):
            layer.packed.bitwise_not_()
    assert not any(torch.equal(a, b) for a, b in zip(other(x), before, strict=True))
    assert same(packed(x), before)


def test_a_functional_call_uses_the_numbers_that_it_is_given(packed, x):
    state = {name: value.clone() for name, value in packed.state_dict().items()}
    given = {
        name: torch.zeros_like(value) if name.endswith("bias") else value for name, value in state.items()
    }
    before = packed(x)
    outs = torch.func.functional_call(packed, given, (x,))
    biases = [layer.bias for layer in packed.modules() if isinstance(layer, PackedLinear)]
    for out, bias, then in zip(outs, biases, before, strict=True):
        torch.testing.assert_close(out + bias, then)
    assert same(packed(x), before)


@pytest.fixture(params=[1, 2, 4])
def convolution(request) -> nn.Module:
    torch.manual_seed(0)
    conv = bb.prepare(nn.Conv2d(6, 5, 3, stride=2, padding=1), bb.Recipe.bbq(request.param))
    conv(torch.randn(2, 6, 9, 8))
    return bb.convert(conv.eval())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 6, 7, 10, generator=torch.Generator().manual_seed(1))


def test_a_mode_sees_the_operation_of_a_convolution(convolution, images):
    expected = convolution(images)
    with Recorded() as seen:
        assert torch.equal(convolution(images), expected)
    assert "bellbox.packed_conv2d.default" in seen.names


def test_a_fake_image_gives_shape_dtype_and_strides(convolution, images):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = convolution(mode.from_tensor(images))
    real = convolution(images)
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype, out.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_and_transforms_hold_a_convolution(convolution, images):
    traced = torch.jit.trace(convolution, images, check_trace=False)
    assert torch.equal(traced(2 * images[:1]), convolution(2 * images[:1]))
    batches = torch.stack((images, -images))
    assert torch.equal(torch.vmap(convolution)(batches), torch.stack([convolution(each) for each in batches]))


def test_a_compiled_convolution_is_the_operation_with_its_sum_and_relu(convolution, images):
    torch._dynamo.reset()
    add = torch.ones_like(convolution(images))
    compiled = torch.compile(convolution, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, add, True), convolution(images, add, True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(images), convolution(images))
        assert compiled(images).dtype == torch.bfloat16


def test_a_default_device_is_not_for_the_results_of_a_convolution(convolution, images):
    expected = convolution(images)
    other = copy.deepcopy(convolution)
    with torch.device("meta"):
        assert torch.equal(other(images), expected)
