"""What holds for every method: one function in all of its forms, state, compilation, why some are not packed."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bellbox as bb
from bellbox.core.entropy import code_counts, entropy_bits
from bellbox.errors import BellboxError
from bellbox.nn import PackedLinear
from bellbox.ops import native
from bellbox.quantizers import METHODS, Quantizer, build_quantizer
from bellbox.recipe import QuantizerSpec, Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*no factor of two")
NUMBERS = {"ternary_support": (3,), "ternary_mass": (3,), "nf": (2, 4, 8, 16), "kmeans": (2, 3, 4, 16)}
OFF_GRID = ("nf", "kmeans")
OPTIONS = {
    "bbq": (
        {},
        {"signs": True},
        {"zeta": 1.694},
        {"rms": False},
        {"gamma_init": "optimal", "gamma": "frozen"},
    ),
    "quest": ({}, {"rule": "clip"}),
    "lsq": ({}, {"classic": True}, {"unsigned": True}, {"classic": True, "unsigned": True}),
    "pact": ({}, {"signed": True}),
    "n2uq": ({}, {"released_gradient": False, "masked": True}),
    "nf": ({}, {"group": 8}),
    "seq": ({}, {"rule": "paretoq"}),
}


def variants() -> Iterator[tuple[str, dict[str, bool | float | str]]]:
    for method in METHODS:
        for options in OPTIONS.get(method, ({},)):
            yield method, options


def specs(roles: tuple[str, ...] = ("weight", "input")) -> Iterator[tuple[QuantizerSpec, int | None]]:
    """Every method, option, number of levels, role and granularity."""
    for (method, options), role in itertools.product(variants(), roles):
        kind = METHODS[method]
        granularities = kind.weight_granularities if role == "weight" else kind.activation_granularities
        for granularity, n in itertools.product(granularities, NUMBERS.get(method, (2, 3, 4, 16))):
            same = options.get("rule") == "paretoq" and n <= 4  # the function of the other rule
            if not (granularity == "ema" and "zeta" in options) and not same:
                yield (
                    QuantizerSpec(method, n, None, granularity, None, options),
                    6 if role == "weight" else None,
                )


EVERY = list(specs())
NAMES = [
    f"{s.method}-{s.levels}-{s.granularity}-{'weight' if rows else 'input'}-{s.options}" for s, rows in EVERY
]
every_quantizer = pytest.mark.parametrize(("spec", "rows"), EVERY, ids=NAMES)
four_levels = pytest.mark.parametrize(
    ("spec", "rows"), [(s, rows) for s, rows in EVERY if s.levels == NUMBERS.get(s.method, (4,))[-1]]
)


def some_input(features: int = 64, seed: int = 0, rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator) * torch.linspace(0.5, 2, rows)[:, None]


def ready(spec: QuantizerSpec, rows: int | None, features: int = 64) -> Quantizer:
    q = build_quantizer(spec, features, rows, "here")
    q.initialize(some_input(features, seed=3))
    return q


@every_quantizer
def test_training_and_evaluation_use_the_same_codes(spec, rows):
    q, x = ready(spec, rows), some_input()
    if spec.granularity == "ema":  # in training it uses the batch's own
        q.eval()
    codes, row_scales = q.encode(x)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < spec.levels
    with torch.no_grad():
        out = q(x)
    table = q.table()
    if table is None:
        decoded = q.levels.decode(codes) * q.scale() * row_scales
    else:
        scales = q.packed_scales(x, row_scales).reshape(len(x), -1)
        decoded = table.float()[codes.long()] * scales.repeat_interleave(64 // scales.shape[1], 1)
    torch.testing.assert_close(out, decoded, rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(q(x), out.to(torch.bfloat16))


@every_quantizer
def test_the_state_dict_is_the_whole_state(spec, rows):
    q, x = ready(spec, rows), some_input()
    fresh = build_quantizer(spec, 64, rows, "other")
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh(x), q(x))
    assert torch.equal(copy.deepcopy(q).eval()(x), q.eval()(x))
    assert fresh.levels == q.levels


def compiled_specs() -> Iterator[tuple[QuantizerSpec, int | None]]:
    """One of a kind of code: each method, and BBQ's and N2UQ's sides and options that differ in more than numbers."""
    for method in METHODS:
        roles = (None, 6) if method in ("bbq", "n2uq") else (6,)
        for rows in roles:
            yield QuantizerSpec(method, METHODS[method].own_levels), rows
    for granularity, options in (
        ("ema", {}),
        ("tensor", {}),
        ("token", {"zeta": 1.694}),
        ("token", {"signs": True}),
    ):
        yield QuantizerSpec(granularity=granularity, options=options), None  # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "rows"), list(compiled_specs()))
def test_compiled_training_is_the_eager_function(spec, rows):
    torch._dynamo.reset()
    eager, x = ready(spec, rows), some_input().requires_grad_()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    results = []
    for q, run in ((eager, eager), (other, compiled)):
        out = run(x)
        learned = [p for p in q.parameters() if p.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *learned])])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(compiled.eval()(x), eager.eval()(x))


@pytest.mark.parametrize(
    "method", [m for m in METHODS if METHODS[m].on_grid and METHODS[m].activation_granularities]
)
def test_a_compiled_layer_evaluates_with_what_it_learned_since(method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = bb.prepare(
        nn.Linear(64, 8, bias=False), Recipe.of(method, granularity="token" if method == "bbq" else None)
    )
    x, optimizer = some_input(), torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    layer.eval()
    compiled = torch.compile(
        copy.deepcopy(layer), fullgraph=True, backend="aot_eager"
    )  # before any eager evaluation
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("spec", [s for s, rows in EVERY if rows is None], ids=str)
def test_nothing_has_no_codes(spec):
    codes, row_scales = ready(spec, None).encode(torch.zeros(2, 0, 64))
    assert codes.shape == (2, 0, 64)
    assert row_scales.shape == (2, 0, 1)


@four_levels
def test_gradients_under_bf16_autocast_are_those_of_fp32_but_for_values_at_an_edge(spec, rows):
    q, x = ready(spec, rows, 256), some_input(256).requires_grad_()
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (exact,) = torch.autograd.grad(q(x), x, g.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = q(x)
    (low,) = torch.autograd.grad(out, x, g)
    # v is kept in bf16: a value at the edge of the clip_range may count as inside or outside
    assert (low - exact).norm() <= 0.1 * exact.norm()


@settings(max_examples=150, deadline=None)
@given(
    variant=st.sampled_from(list(variants())),
    weight=st.booleans(),
    rows=st.integers(1, 5),
    leading=st.integers(1, 3),
    features=st.integers(1, 70),
    n=st.sampled_from([2, 3, 4, 8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    size=st.sampled_from([1e-12, 1e-3, 1.0, 1e4]),
)
def test_any_shape_dtype_and_size_gives_finite_values_and_gradients(
    variant, weight, rows, leading, features, n, dtype, size
):
    method, options = variant
    n = n if n in NUMBERS.get(method, (n,)) else NUMBERS[method][0]
    if method == "kmeans" or (weight and method != "kmeans"):
        weight, leading = True, 1
    if "group" in options:
        features *= 8
    q = build_quantizer(QuantizerSpec(method, n, options=options), features, rows if weight else None, "")
    x = (torch.randn(leading, rows, features, generator=torch.Generator().manual_seed(n)) * size).to(dtype)
    x = x[0] if weight else x
    q.initialize(x)
    leaf = x.clone().requires_grad_()
    out = q(leaf)
    out.float().square().sum().backward()
    assert (out.shape, out.dtype) == (x.shape, dtype)
    assert out.isfinite().all()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    codes, row_scales = q.encode(x)
    assert (codes.shape, row_scales.shape) == (x.shape, (*x.shape[:-1], 1))
    assert int(codes.max()) < n
    assert row_scales.isfinite().all()


@every_quantizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_row_that_is_not_finite_is_nan_and_never_coded(spec, rows, bad):
    q, x = ready(spec, rows).eval(), some_input()
    x[2] = bad if bad == 3e38 else x[2]
    x[2, 5] = bad
    out, row_scales = q(x), q.encode(x)[1]
    group = getattr(q, "group", 64)
    assert out[2, :group].isnan().all()
    assert row_scales[2].isnan()
    others = torch.arange(6) != 2
    if q.normalise != "tensor":
        assert out[others].isfinite().all()
        assert row_scales[others].isfinite().all()


class Two(nn.Module):
    """Two siblings and one on its own, of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = (
            nn.Linear(96, 37),
            nn.Linear(96, 37),
            nn.Linear(37, 19, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) - torch.tanh(self.k_proj(x)))


def convertible() -> Iterator[tuple[str, dict[str, bool | float | str], int, str]]:
    for spec, _ in specs(("input",)):
        if METHODS[spec.method].on_grid and spec.granularity != "tensor":
            assert spec.granularity is not None
            yield spec.method, spec.options, spec.levels, spec.granularity


PATHS = ["reference", *(native.instruction_sets() if native.available() else [])]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("method", "options", "n", "granularity"), list(convertible()))
def test_the_packed_layer_is_the_trained_one_code_for_code(
    method, options, n, granularity, path, monkeypatch
):
    if path == "reference":
        monkeypatch.setattr(native, "available", lambda: False)
    torch.manual_seed(n)
    model = bb.prepare(
        Two(), Recipe.of(method, levels=n, granularity=granularity, options=options, keep_ends=False)
    )
    x = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))
    model(3 * x)
    with torch.no_grad():
        for p in model.parameters():  # as if trained
            p.mul_(1 + 0.2 * torch.rand(p.shape))
    packed = bb.convert(model.eval())
    assert_one_function(model, packed, x, path)


def assert_one_function(model: nn.Module, packed: nn.Module, x: Tensor, path: str) -> None:
    kept: dict[str, Tensor] = {}
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear):
            twin = model.get_submodule(name)
            assert torch.equal(layer.weight_codes(), twin.weight_codes())  # type: ignore[operator]
            layer.register_forward_pre_hook(lambda _, args, name=name: kept.update({name: args[0]}))
    with torch.no_grad():
        if path == "reference":
            assert torch.equal(packed(x), model(x))
        else:
            with native.use(path):
                assert torch.equal(packed(x), model(x))
        assert len(kept) == 3
        for name, seen in kept.items():
            quantizer = model.get_submodule(name).activation_quantizer.quantizer  # type: ignore[union-attr]
            codes = quantizer.codes(seen).reshape(-1, seen.shape[-1])  # type: ignore[operator]
            assert torch.equal(packed.get_submodule(name).input_codes(seen), codes)  # type: ignore[operator]


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].on_grid])
def test_weights_alone_with_8_bit_inputs_are_packed_too(method, tmp_path):
    recipe = Recipe.of(method, weight_only="int8", keep_ends=False)
    model = bb.prepare(Two(), recipe)
    x = torch.randn(3, 5, 96)
    before = model(x)
    (before.sum()).backward()
    packed = bb.convert(model.eval())
    assert_one_function(model, packed, x, "reference")
    bb.save(packed, tmp_path / "m")
    assert torch.equal(bb.load(tmp_path / "m", into=Two())(x), packed(x))
    alone = bb.prepare(Two(), Recipe.of(method, weight_only="float", keep_ends=False))
    state = model.state_dict()
    with pytest.raises(BellboxError, match=r"q_proj: the state is of another recipe: input: .* there"):
        alone.load_state_dict(state, strict=False)
    # Its tensors alone, as states were before they had records.
    old = {
        name: t
        for name, t in state.items()
        if "_extra_state" not in name and "activation_quantizer" not in name
    }
    alone.load_state_dict(old, strict=False)
    assert (alone(x) - before).norm() < 0.05 * before.norm()


@pytest.mark.parametrize("method", OFF_GRID)
def test_methods_off_the_integer_grid_are_not_packed_and_say_why(method):
    model = bb.prepare(Two(), Recipe.of(method, weight_only="int8", keep_ends=False))
    model(torch.randn(2, 96))
    with pytest.raises(
        BellboxError, match=rf"q_proj.*{method} needs a float product: its levels are not evenly"
    ):
        bb.convert(model)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (lambda: Recipe.of("magic"), "no quantization method 'magic'; there are: bbq, "),
        (lambda: Recipe.of("quest", options={"gamma": 1.0}), "option 'gamma' of quest.*options: rule"),
        (lambda: Recipe.of("rtn", options={"gamma": 1.0}), "options: none"),
        (lambda: Recipe.of("kmeans"), "kmeans quantizes weights only"),
        (lambda: Recipe.of("nf", levels=3), "power of two"),
        (lambda: Recipe.of("nf", options={"group": 7}), "group 7 of nf does not divide 96"),
        (lambda: Recipe.of("ternary_mass", 2), "3 levels"),
        (lambda: Recipe.of("seq", zero_point=0.0), "symmetric"),
        (lambda: Recipe.of("seq", levels=256), "2 to 128 levels"),
        (lambda: Recipe.of("n2uq", block=8), "block=1"),
        (lambda: Recipe.of("rtn", block=8), "block=1"),
        (
            lambda: Recipe.of("lsq", granularity="token"),
            "granularity 'token' does not fit activations of lsq: learned",
        ),
        (lambda: Recipe.of("pact", zero_point=0.0), "pact has a zero point of its own"),
        (lambda: Recipe.of("bbq", options={"zeta": 2.0}, granularity="ema"), "zeta"),
        (lambda: Recipe.of("bbq", options={"zeta": -1.0}), "zeta -1.0: must be a finite number above 0"),
        (lambda: Recipe.of("bbq", weight_only="int8", options={"signs": True}), "both have random signs"),
    ],
)
def test_what_a_method_does_not_have_is_refused_in_one_line(recipe, says):
    with pytest.raises(BellboxError, match=says) as error:
        bb.prepare(Two(), recipe())
    assert "\n" not in str(error.value)


def test_the_standard_recipes():
    assert Recipe.of("none") == Recipe.none()
    assert Recipe.of("ternary_support").rules[-1].weights == QuantizerSpec("ternary_support", 3)
    ours = Recipe.bbq(3).rules[-1]
    assert ours.weights == QuantizerSpec("bbq", 8, block=1, options={"gamma_lr": 0.1})
    assert ours.activations == QuantizerSpec("bbq", 8, options={"gamma_lr": 0.1})
    assert ours.weights_rotated
    assert not Recipe.bbq(3, weight_only="float").rules[-1].weights_rotated
    paper = Recipe.bbq_paper(4).rules[-1]
    assert paper.weights == QuantizerSpec("bbq", 16)
    assert not paper.weights_rotated
    assert paper.activations == QuantizerSpec("bbq", 16, granularity="tensor")
    assert Recipe.of("lsq", 4, weight_only="int8").rules[-1].activations == QuantizerSpec("rtn", 255)
    assert Recipe.of("bbq", 1, weight_only="int8").rules[-1].activations == QuantizerSpec(
        "quest", 255, block=128
    )
    assert Recipe.of("bbq", 1, weight_only="float").rules[-1].activations is None


ENTROPY = [("quest", 4, 1.904), ("quest", 8, 2.761), ("quest", 16, 3.602), ("ternary_mass", 3, math.log2(3))]
ERROR = [
    *(("quest", n, error) for n, error in ((2, 0.3634), (4, 0.1188), (8, 0.03744), (16, 0.01154))),
    *(("kmeans", n, error) for n, error in ((2, 0.358), (4, 0.116), (8, 0.0316), (16, 0.0076))),
]


@pytest.mark.parametrize(
    ("method", "n", "bits"), [*ENTROPY, *(("bbq", n, math.log2(n)) for n in (2, 3, 4, 8, 16))]
)
def test_entropy_of_gaussian_weights_is_that_of_theory(method, n, bits):
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(n))
    q = build_quantizer(QuantizerSpec(method, n, block=1), 1024, 2048, "")
    assert entropy_bits(code_counts(q.codes(weight), n)) == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize(("method", "n", "error"), ERROR)
def test_squared_error_of_gaussian_weights_is_the_known_one(method, n, error):
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(n))
    q = build_quantizer(QuantizerSpec(method, n, block=1), 1024, 1024, "")
    q.initialize(weight)
    with torch.no_grad():
        assert float((q(weight) - weight).square().mean()) == pytest.approx(error, rel=0.01)
