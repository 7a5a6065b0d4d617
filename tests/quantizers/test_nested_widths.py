"""Nested codes: exact at every width and tie, gradients of each width against float64, states, what is refused."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bellbox as bb
from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.nn import nested_widths, using_bits
from bellbox.quantizers import QuantizerSpec, build_quantizer

ALL = (7, 6, 5, 4, 3, 2, 1)


def quantizer(
    widths: tuple[int, ...] = (4, 3, 2, 1), rows: int | None = None, features: int = 64, **more: object
):
    options = {"nested": ",".join(map(str, widths)), **more}
    made = build_quantizer(QuantizerSpec("bbq", 2 ** widths[0], options=options), features, rows, "here")  # type: ignore[arg-type]
    made.initialize(torch.randn(6, features, generator=torch.Generator().manual_seed(1)))
    return made


def at(made, bits: int):
    made.use_bits(bits)
    return made


def test_thresholds_are_every_second_one_of_the_next_width_to_the_last_bit():
    for bits in range(1, 8):
        assert Levels.gaussian(2**bits).thresholds == Levels.gaussian(2 ** (bits + 1)).thresholds[1::2]


@pytest.mark.parametrize("wide", range(2, 8))
def test_codes_nest_for_all_widths_at_ties_and_beside_them(wide: int):
    edges = torch.tensor(Levels.gaussian(2**wide).thresholds)
    near = [torch.nextafter(edges, torch.full_like(edges, side)) for side in (-math.inf, math.inf)]
    values = torch.cat(
        [edges, *near, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 40.0, -40.0]), torch.randn(10_000)]
    )
    for narrow in range(1, wide):
        wider, narrower = Levels.gaussian(2**wide).encode(values), Levels.gaussian(2**narrow).encode(values)
        assert torch.equal(wider >> (wide - narrow), narrower)


@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("block", [1, None])
def test_a_quantizers_codes_nest_whatever_its_rotation(rows: int | None, block: int | None):
    spec = QuantizerSpec("bbq", 128, block=block, options={"nested": ",".join(map(str, ALL))})
    made = build_quantizer(spec, 64, rows, "here").eval()
    x = torch.randn(6, 64)
    made.initialize(x)
    codes = {bits: at(made, bits).codes(x) for bits in ALL}
    for wide, narrow in itertools.combinations(ALL, 2):
        assert torch.equal(codes[wide] >> (wide - narrow), codes[narrow])
        assert codes[narrow].max() == 2**narrow - 1


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
@pytest.mark.parametrize("rows", [None, 6])
def test_each_width_is_bbq_of_its_levels_alone(bits: int, rows: int | None):
    """Value, gradient of the input and of the scale, those of a quantizer that has this width only."""
    made = at(quantizer(rows=rows), bits)
    alone = build_quantizer(QuantizerSpec("bbq", 2**bits, -0.5), 64, rows, "alone")
    alone.initialize(torch.randn(6, 64, generator=torch.Generator().manual_seed(1)))
    name = "gamma" if bits == 4 else f"gamma_{bits}"
    with torch.no_grad():
        getattr(made, name).mul_(0.7)
        alone.gamma.mul_(0.7)  # type: ignore[operator, union-attr]
    x, g = torch.randn(6, 64), torch.randn(6, 64)
    found = []
    for one in (made, alone):
        leaf = x.clone().requires_grad_()
        out = one(leaf)
        (out * g).sum().backward()
        found.append((out, leaf.grad, one.scale()))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(getattr(made, name).grad, alone.gamma.grad)  # type: ignore[union-attr]
    others = [p for other, p in made.named_parameters() if other != name]
    assert len(others) == 3
    assert all(
        p.grad is not None and not p.grad.any() for p in others
    )  # all processes exchange the same ones


def test_gradients_of_every_width_are_those_of_the_definition_in_float64():
    made = quantizer(rows=6).double()
    x = torch.randn(6, 64, dtype=torch.float64)
    g = torch.randn(6, 64, dtype=torch.float64)
    for bits in (4, 3, 2, 1):
        at(made, bits)
        gamma = getattr(made, "gamma" if bits == 4 else f"gamma_{bits}")
        made.zero_grad()
        leaf = x.clone().requires_grad_()
        (made(leaf) * g).sum().backward()
        n, other = 2**bits, x.clone().requires_grad_()
        v = _rotated(other) / other.square().mean(1, keepdim=True).sqrt()
        u = n * torch.distributions.Normal(0.0, 1.0).cdf(v)
        q = u + (u.detach().floor().clamp(0, n - 1) - u.detach()) - n / 2 + 0.5  # mid-rise at every width
        (gamma.detach() / (n / 2) * q * g).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-12)
        own = (q.detach() / (n / 2) * g).sum(1, keepdim=True) / math.sqrt(x.numel())
        torch.testing.assert_close(gamma.grad, own, rtol=1e-9, atol=1e-12)


def _rotated(x: torch.Tensor) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < x.shape[1]:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ matrix.T / math.sqrt(x.shape[1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def test_one_tensor_gives_each_width_its_own_result_where_layers_share_it():
    """The cache of an input that several layers read must not serve another width's codes."""

    class Pair(nn.Module):
        input_groups = (("a", "b"),)

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
            return self.a(x) + self.b(x) if both else self.a(x)

    torch.manual_seed(0)
    model = bb.prepare(Pair(), bb.Recipe.bbq(nested=(4, 1)))
    x = torch.randn(3, 16)
    for training in (True, False):
        model.train(training)
        bb.set_bits(model, 4)
        wide = model(x)
        model(x, both=False)  # leaves a result behind that the other layer did not fetch
        bb.set_bits(model, 1)
        assert not torch.equal(model(x), wide)
        fresh = copy.deepcopy(model)
        assert torch.equal(model(x), fresh(x))
    with pytest.raises(BellboxError, match="the same width"):
        bb.set_bits(model, {"a": 4})
    assert {layer.weight_quantizer.levels.n for layer in (model.a, model.b)} == {2}  # nothing was changed
    bb.set_bits(model, {"a": 4, "b": 4})
    assert torch.equal(model(x), fresh(x)) is False


def test_evaluation_codes_the_weight_anew_at_another_width():
    model = bb.prepare(network(), bb.Recipe.bbq(nested=(4, 3, 2, 1)))
    x = torch.randn(5, 32)
    model(x)
    model.eval()
    by_width = {}
    with torch.no_grad():
        for bits in (4, 3, 2, 1):
            with using_bits(model, bits):
                by_width[bits] = model(x)
        for bits in (1, 3, 2, 4):
            bb.set_bits(model, bits)
            assert torch.equal(model(x), by_width[bits])
            assert torch.equal(copy.deepcopy(model)(x), by_width[bits])


def test_the_state_is_of_all_widths_and_of_the_same_ones_only():
    recipe = bb.Recipe.bbq(nested=(4, 2))
    model, x = bb.prepare(network(), recipe), torch.randn(5, 32)
    model(x)
    model.eval()
    bb.set_bits(model, 2)
    fresh = bb.prepare(network(), recipe).eval()
    fresh.load_state_dict(model.state_dict())  # saved at 2 bits, loaded where 4 are used
    assert nested_widths(fresh) == (4, 2)
    bb.set_bits(fresh, 2)
    assert torch.equal(fresh(x), model(x))
    for other in (bb.Recipe.bbq(nested=(4, 3, 2)), bb.Recipe.bbq(bits=4, zero_point=-0.5)):
        with pytest.raises(BellboxError, match="another recipe"):
            bb.prepare(network(), other).load_state_dict(model.state_dict())


def test_a_record_of_a_plain_layer_is_what_it_was_before_widths_were_known():
    """CRC-32 of the options as version 0.1 wrote them: states of then are states of now."""
    import json
    import zlib

    options = {"rms": True, "zeta": None}
    from bellbox.nn.record import Side

    side = Side.of(build_quantizer(QuantizerSpec("bbq", 4), 64, 6, "here"))
    assert side.options == zlib.crc32(json.dumps(options, sort_keys=True).encode())


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"nested": (4,)}, "must be at least two"),
        ({"nested": (2, 4)}, "the widest first"),
        ({"nested": (8, 4)}, "from 1 to 7"),
        ({"nested": (4, 2), "bits": 4}, "bits is 4 and nested is given"),
        ({"nested": (4, 2), "levels": 3}, "levels is 3 and nested is given"),
        ({"nested": (4, 2), "weight_only": "float"}, "leave weight_only out"),
    ],
)
def test_a_recipe_that_says_widths_twice_is_refused(choices: dict[str, object], said: str):
    with pytest.raises(BellboxError, match=said):
        bb.Recipe.bbq(**choices)  # type: ignore[arg-type]


def test_a_model_of_one_width_has_no_other():
    model = bb.prepare(network(), bb.Recipe.bbq(bits=2))
    assert nested_widths(model) == ()
    with pytest.raises(BellboxError, match="the model has one width; train one with several"):
        bb.set_bits(model, 2)
    nested = bb.Recipe.bbq(nested=(4, 2)).rules[-1].activations
    inputs_alone = bb.Recipe(rules=(bb.Rule("*", bb.QuantizerSpec("bbq", 16), nested),))
    with pytest.raises(BellboxError, match="nested inputs need a weight"):
        bb.prepare(network(), inputs_alone)


def test_the_programs_of_the_page_run_and_print_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = (Path(__file__).resolve().parents[2] / "docs" / "nested.md").read_text(encoding="utf-8")
    train, pack = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    printed = re.findall(r"```\n(.*?)```", page[page.index(pack) + len(pack) + 3 :], re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(train + pack, "docs/nested.md", "exec"), scope)
    assert capsys.readouterr().out == printed
    assert (tmp_path / "nested" / "bits-4.safetensors").is_file()
