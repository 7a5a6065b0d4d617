from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.core.hadamard import butterfly
from bellbox.errors import BellboxError
from bellbox.nn import (
    ActivationQuantizer,
    QuantizedLinear,
    quantized_layers,
    record_activation_codes,
)
from bellbox.ops import native, packed_linear
from bellbox.quantizers.bbq import BBQ

WIDTH = 32


class Attention(nn.Module):
    """Three siblings and what they are siblings for."""

    input_groups = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)) + self.v_proj(x))


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, int]]:
    """Which quantizers have run, in order."""
    made: list[tuple[str, int]] = []
    for method in ("forward", "encode"):
        original = getattr(BBQ, method)

        def counted(self, x, original=original, method=method):
            made.append((method, id(self)))
            return original(self, x)

        monkeypatch.setattr(BBQ, method, counted)
    return made


def attention(share: bool = True, granularity: str = "token") -> Attention:
    torch.manual_seed(0)
    return bb.prepare(Attention(), bb.Recipe.bbq(2, share_inputs=share, granularity=granularity))  # type: ignore[arg-type]


def some_input(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def count(calls: list[tuple[str, int]], layer: QuantizedLinear) -> int:
    assert layer.activation_quantizer is not None
    return sum(which == id(layer.activation_quantizer.quantizer) for _, which in calls)


def test_siblings_quantize_their_input_once(calls):
    model = attention()
    assert model.q_proj.activation_quantizer is model.k_proj.activation_quantizer
    assert model.o_proj.activation_quantizer is not model.q_proj.activation_quantizer
    model(some_input())
    assert count(calls, model.q_proj) == 1
    calls.clear()
    model(some_input()).sum().backward()
    assert count(calls, model.q_proj) == 1


@pytest.mark.parametrize("compiled", [True, False])
def test_packed_siblings_code_their_input_once(monkeypatch, compiled):
    if compiled and not native.available():
        pytest.skip("the compiled kernels were not built")
    monkeypatch.setattr(native, "available", lambda: compiled)
    model = attention()
    model(some_input())
    packed = bb.convert(model)
    alone, original = [], packed_linear.Bound.__call__
    monkeypatch.setattr(
        packed_linear.Bound, "__call__", lambda self, *args: alone.append(self) or original(self, *args)
    )
    packed(some_input())
    # one call for q, k and v where the kernels are; without them each for itself
    expected = [packed.o_proj] if compiled else [packed.q_proj, packed.k_proj, packed.v_proj, packed.o_proj]
    assert {id(each) for each in alone} == {id(layer.bound) for layer in expected}
    with torch.inference_mode():  # no version to tell a change by: each for itself
        assert torch.equal(packed(some_input()), packed(some_input()))


@pytest.mark.parametrize("mode", ["training", "evaluation", "packed"])
def test_a_tensor_changed_between_siblings_is_quantized_anew(mode):
    model, alone = attention(), attention(share=False)
    model(some_input())
    for layer in (alone.q_proj, alone.k_proj, alone.v_proj, alone.o_proj):
        layer.activation_quantizer.quantizer.load_state_dict(
            (
                model.o_proj if layer is alone.o_proj else model.q_proj
            ).activation_quantizer.quantizer.state_dict()
        )
    if mode == "packed":
        model, alone = bb.convert(model), bb.convert(alone)
    elif mode == "evaluation":
        model, alone = model.eval(), alone.eval()
    with torch.no_grad():
        x = some_input()
        for change in (lambda: x.mul_(-1), lambda: x[0].zero_(), lambda: None, lambda: x.view(-1).neg_()):
            assert torch.equal(model.q_proj(x), alone.q_proj(x))
            change()
            assert torch.equal(model.k_proj(x), alone.k_proj(x))
            change()
            assert torch.equal(model.v_proj(x), alone.v_proj(x))
        other = x.clone()
        other[0] += 1
        assert torch.equal(model.q_proj(x), alone.q_proj(x))
        assert torch.equal(model.k_proj(other), alone.k_proj(other))
        assert torch.equal(model.v_proj(x), alone.v_proj(x))


def test_a_scale_changed_between_siblings_is_noticed():
    model = attention()
    x = some_input()
    model(x)
    expected = model.k_proj(x)
    with torch.no_grad():
        model.q_proj(x)
        model.q_proj.activation_quantizer.gamma.mul_(2)
        doubled = model.k_proj(x) - model.k_proj.bias
    torch.testing.assert_close(doubled, 2 * (expected - model.k_proj.bias))
    model = attention(granularity="ema")
    model(x)
    model.eval()
    with torch.no_grad():
        model.q_proj(x)
        model.q_proj.activation_quantizer.quantizer.r_ema.mul_(
            0.01
        )  # everything near zero: inner levels only
        codes = model.k_proj.activation_quantizer.quantizer.codes(x)
    assert set(codes.unique().tolist()) <= {1, 2}


def test_a_layer_called_again_on_the_same_tensor_can_be_differentiated_again():
    model = attention()
    x = some_input().requires_grad_()
    for _ in range(5):
        model.q_proj(x).sum().backward()
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad


@pytest.mark.parametrize("granularity", ["token", "ema", "tensor"])
@pytest.mark.parametrize("training", [True, False])
def test_sharing_changes_neither_values_nor_gradients(granularity, training):
    shared, alone = attention(granularity=granularity), attention(share=False, granularity=granularity)
    grads = []
    for model in (shared, alone):
        model(some_input(1))
        model.train(training)
        x = some_input().requires_grad_()
        out = model(x)
        out.square().sum().backward()
        weights = [getattr(model, name).weight.grad for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        names = ("q_proj", "k_proj", "v_proj")
        gammas = {id(q): q.gamma.grad for n in names if (q := getattr(model, n).activation_quantizer)}
        grads.append((out, x.grad, *weights, sum(gammas.values())))
    assert torch.equal(grads[0][0], grads[1][0])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


def test_the_memory_of_a_shared_input_is_let_go():
    model = attention()
    x = some_input()
    gone = weakref.ref(x)
    model(x)
    del x
    gc.collect()
    assert gone() is None


def test_a_shared_quantizer_has_one_place_in_the_state_dict():
    names = [n for n in attention().state_dict() if n.endswith("activation_quantizer.quantizer.gamma")]
    assert names == [f"{layer}.activation_quantizer.quantizer.gamma" for layer in ("q_proj", "o_proj")]
    parameters = list(attention().parameters())
    assert len({id(p) for p in parameters}) == len(parameters) == 8 + 4 + 2


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16, 7, 256])
@pytest.mark.parametrize("granularity", ["token", "ema"])
@pytest.mark.parametrize("bias", [True, False])
def test_evaluation_is_the_packed_function_to_the_last_bit(n, granularity, bias):
    torch.manual_seed(n)
    recipe = bb.Recipe.bbq(levels=n, granularity=granularity)  # type: ignore[arg-type]
    layer = bb.prepare(nn.Linear(48, 7, bias), recipe)
    x = torch.randn(2, 9, 48)
    training = layer(x)
    packed = bb.convert(layer)
    with torch.no_grad():
        exact = layer.eval()(x)
    assert torch.equal(packed(x), exact)
    assert torch.equal(layer(x), exact)  # with gradients on: the same values
    if granularity == "token":
        torch.testing.assert_close(training, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(packed(x), layer(x))
    assert torch.equal(packed.weight_codes(), layer.weight_codes())
    assert torch.equal(packed(x[0, 0]), exact[0, 0])
    assert packed(x[:0]).shape == (0, 9, 7)


def test_gradients_in_evaluation_are_those_of_training():
    layer = bb.prepare(nn.Linear(48, 7), bb.Recipe.bbq(2))
    x = torch.randn(9, 48, requires_grad=True)
    layer(x).square().sum().backward()
    grads = [x.grad, layer.weight.grad]
    x.grad = layer.weight.grad = None
    layer.eval()(x).square().sum().backward()
    for ours, theirs in zip((x.grad, layer.weight.grad), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_nan_in_the_input_marks_its_row_in_every_form():
    layer = bb.prepare(nn.Linear(16, 4), bb.Recipe.bbq(2))
    x = torch.randn(3, 16)
    layer(x)
    x[1, 2] = torch.nan
    packed = bb.convert(layer)
    with torch.no_grad():
        for out in (layer(x), layer.eval()(x), packed(x)):
            assert out[1].isnan().all()
            assert out[[0, 2]].isfinite().all()


def test_a_nan_in_a_weight_marks_its_row_and_cannot_be_packed():
    layer = bb.prepare(nn.Linear(16, 4), bb.Recipe.bbq(2))
    x = torch.randn(3, 16)
    layer(x)
    with torch.no_grad():
        layer.weight[2, 3] = torch.inf
        for out in (layer(x), layer.eval()(x)):
            assert out[:, 2].isnan().all()
            assert out[:, [0, 1, 3]].isfinite().all()
    with pytest.raises(BellboxError, match="NaN or infinity"):
        bb.convert(layer)


def test_the_integer_weight_follows_the_parameter():
    layer = bb.prepare(nn.Linear(16, 4), bb.Recipe.bbq(2)).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        layer.weight.neg_()
        assert not torch.equal(layer(x), first)
        layer.weight.neg_()
        assert torch.equal(layer(x), first)
        layer.weight = nn.Parameter(torch.randn(4, 16))
        assert not torch.equal(layer(x), first)


def test_packed_scales_stay_fp32_whatever_is_asked():
    layer = bb.prepare(nn.Linear(48, 7), bb.Recipe.bbq(3, granularity="ema"))
    x = torch.randn(9, 48)
    layer(x)
    packed = bb.convert(layer)
    expected = packed(x)
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        changed = change(copy.deepcopy(packed))
        dtypes = {name: b.dtype for name, b in changed.named_buffers()}
        assert dtypes.pop("packed") == torch.uint8
        assert set(dtypes.values()) == {torch.float32}
        assert torch.equal(changed(x), expected)
    low = packed(x.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, packed(x.to(torch.bfloat16).float()).to(torch.bfloat16))


def test_packed_state_dict_round_trip():
    one, other = (bb.prepare(nn.Linear(16, 4), bb.Recipe.bbq(2, granularity="ema")) for _ in range(2))
    x = torch.randn(3, 16)
    one(x), other(5 * x)
    one, other = bb.convert(one), bb.convert(other)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert set(one.state_dict()) == {
        "packed",
        "weight_scale",
        "act_scale",
        "act_thresholds",
        "act_rstd",
        "bias",
    }


def test_a_packed_layer_works_in_four_threads():
    model = attention()
    model(some_input())
    packed = bb.convert(model)
    inputs = [some_input(seed) for seed in range(4)]
    expected = [packed(x) for x in inputs]
    packed = bb.convert(model)  # so that the first unpacking happens in the threads
    failures = []
    start = threading.Barrier(4)

    def work(which: int) -> None:
        start.wait()
        failures.extend(which for _ in range(25) if not torch.equal(packed(inputs[which]), expected[which]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inference_mode_from_the_start():
    layer = bb.prepare(nn.Linear(16, 4), bb.Recipe.bbq(2))
    x = torch.randn(3, 16)
    layer(x)
    with torch.inference_mode():
        packed = bb.convert(layer)
        out = packed(x)
        assert torch.equal(layer.eval()(x), out)
        fresh = bb.prepare(nn.Linear(16, 4), bb.Recipe.bbq(2)).eval()
        assert torch.equal(fresh(x), bb.convert(fresh)(x))


@pytest.mark.parametrize("bad", [torch.randn(3, 15), torch.ones(3, 16, dtype=torch.int64), torch.tensor(1.0)])
def test_a_wrong_input_of_a_packed_layer_is_refused(bad):
    layer = bb.prepare(nn.Linear(16, 4), bb.Recipe.bbq(2))
    layer(torch.randn(3, 16))
    with pytest.raises(BellboxError, match="16 inputs"):
        bb.convert(layer)(bad)


def test_recorded_codes_are_those_that_the_layers_use():
    model = attention()
    x = some_input()
    model(x)
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad(), record_activation_codes(model) as counts:
            model(x)
            model(x)
        assert set(counts) == {"q_proj", "o_proj"}
        expected = torch.bincount(
            model.q_proj.activation_quantizer.quantizer.codes(x).flatten().long(), minlength=4
        )
        assert torch.equal(counts["q_proj"], 2 * expected)
        assert int(counts["o_proj"].sum()) == 2 * x.numel()
        assert not any(layer.activation_quantizer.observers for _, layer in quantized_layers(model))


def bbq(levels: int, block: int, rows: int | None = None, **options: bool) -> BBQ:
    return BBQ(16, bb.QuantizerSpec(levels=levels, block=block, options=options), rows)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("block", [1, 16])
def test_one_side_alone_is_quantized_and_the_other_only_rotated(block, signs):
    plain = nn.Linear(16, 4)
    matrix = butterfly(torch.eye(16, dtype=torch.float64), block) * block**-0.5
    weight, activation = bbq(16, block, 4, signs=signs), bbq(16, block, signs=signs)
    turn = matrix * (weight.signs[:, None] if weight.signs is not None else 1)
    weight.initialize(plain.weight)
    layer = QuantizedLinear(plain, weight, None)
    x = torch.randn(64, 16, requires_grad=True)
    out = layer(x)
    expected = nn.functional.linear((x.double() @ turn).float(), weight(plain.weight), plain.bias)
    torch.testing.assert_close(out, expected)
    assert torch.equal(layer.eval()(x), layer.train()(x))
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    inputs = QuantizedLinear(plain, None, ActivationQuantizer(activation))
    turned = (plain.weight.double() @ turn).float()
    torch.testing.assert_close(inputs(x), nn.functional.linear(activation(x), turned, plain.bias))


def test_sides_that_are_rotated_differently_are_refused():
    plain, weight = nn.Linear(16, 4), bbq(16, 1, 4)
    with pytest.raises(BellboxError, match="rotated alike"):
        QuantizedLinear(plain, weight, ActivationQuantizer(bbq(16, 16)))
    with pytest.raises(BellboxError, match="both have random signs"):
        QuantizedLinear(plain, weight, ActivationQuantizer(bbq(16, 1, signs=True)))


@pytest.mark.parametrize("form", ["training", "evaluation", "packed"])
def test_compiled_layers_are_the_eager_function(form):
    torch._dynamo.reset()
    model = attention()
    x = some_input()
    model(x)
    if form == "packed":
        model = bb.convert(model)
        model(x)
    elif form == "evaluation":
        model.eval()
        with torch.no_grad():
            model(x)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
