"""Learned scales: their shapes, and that whether they are set is told by the state, however that arrived."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.quantizers import METHODS, Quantizer, QuantizerSpec, build_quantizer
from bellbox.quantizers.learned import LearnedQuantizer
from bellbox.runs.average import Average
from bellbox.runs.config import AverageSection, CewtSection

LEARNED = [name for name, kind in METHODS.items() if issubclass(kind, LearnedQuantizer)]
ON_INPUTS = [name for name in LEARNED if METHODS[name].activation_granularities]
RECIPES = {
    **{name: bb.Recipe.of(name, bits=2) for name in ON_INPUTS},
    "bbq": bb.Recipe.bbq(bits=2),
    "ema": bb.Recipe.bbq(bits=2, granularity="ema", weights_rotated=False),
    "signs": bb.Recipe.bbq(bits=2, weights_rotated=False, options={"signs": True}),
}
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))


def network(name: str = "bbq") -> nn.Module:
    return bb.prepare(plain(), RECIPES[name])


def inputs(model: nn.Module) -> list[LearnedQuantizer]:
    return [m for m in model.modules() if isinstance(m, LearnedQuantizer) and m.rows is None]


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "quantizer" in name}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def activation(method: str) -> Quantizer:
    return build_quantizer(bb.QuantizerSpec(method, 4), 64, None, "here")


@pytest.mark.parametrize(
    ("method", "rows"),
    [*((name, None) for name in ON_INPUTS), *((name, rows) for name in LEARNED for rows in (1, 6))],
)
def test_no_number_is_0d_and_none_is_set_before_the_first_tensor(method, rows):
    q = build_quantizer(bb.QuantizerSpec(method, 4), 64, rows, "here")
    assert isinstance(q, LearnedQuantizer)
    assert all(t.dim() > 0 and bool(t.isnan().all()) for t in q.own_scales().values())
    assert q.is_set == (not q.own_scales())
    q.initialize(X[: rows or 6])
    assert q.is_set
    assert q.scale().dim() == (0 if rows is None else q.scale().dim())


def by_copy(new: nn.Module, old: nn.Module) -> None:
    with torch.no_grad():
        for ours, theirs in zip(
            [*new.parameters(), *new.buffers()], [*old.parameters(), *old.buffers()], strict=True
        ):
            ours.copy_(theirs)


def by_data(new: nn.Module, old: nn.Module) -> None:
    for ours, theirs in zip(
        [*new.parameters(), *new.buffers()], [*old.parameters(), *old.buffers()], strict=True
    ):
        ours.data = theirs.data.clone()


def by_vector(new: nn.Module, old: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(old.parameters()), new.parameters())


def by_file(new: nn.Module, old: nn.Module) -> None:
    new.load_state_dict(load(save(old.state_dict())))


def by_assignment(new: nn.Module, old: nn.Module) -> None:
    new.load_state_dict(old.state_dict(), assign=True)


def by_average(new: nn.Module, old: nn.Module) -> None:
    average = AveragedModel(new)
    average.update_parameters(old)
    by_copy(new, average.module)


@pytest.mark.parametrize("way", [by_copy, by_data, by_vector, by_file, by_assignment, by_average])
@pytest.mark.parametrize("method", ["bbq", "n2uq"])
def test_scales_that_arrive_are_not_set_again(method, way):
    old, new = network(method), network(method)
    old(X)
    way(new, old)
    expected = scales(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            out = new.eval()(100 * X)
    assert same(scales(new), expected)
    assert torch.equal(out, old.eval()(100 * X))


@pytest.mark.parametrize("method", LEARNED)
def test_scales_that_are_taken_away_are_set_by_the_next_tensor(method):
    rows = None if method in ON_INPUTS else 6
    q, x = build_quantizer(bb.QuantizerSpec(method, 4), 64, rows, "here"), X[:6]
    q(x)
    first = copy.deepcopy(q.state_dict())
    with torch.no_grad():
        for t in (*q.parameters(), *q.buffers()):
            t.fill_(math.nan)
    assert not q.is_set
    q(x)
    assert same(q.state_dict(), first)


@pytest.mark.parametrize("method", ON_INPUTS)
def test_zeros_before_the_first_batch_give_finite_outputs_and_set_nothing(method):
    model = network(method)
    for mode in (True, False):
        model.train(mode)
        assert bool(model(torch.zeros(2, 64)).isfinite().all())
        with torch.no_grad():
            assert bool(model(torch.zeros(2, 64)).isfinite().all())
    assert not inputs(model)[0].is_set
    model.train()(X)
    assert all(q.is_set for q in inputs(model))
    expected = network(method)
    expected(torch.zeros(2, 64))  # sets the second layer's scale from the bias of the first
    expected(X)
    assert same(scales(model), scales(expected))


def test_scales_set_in_evaluation_are_announced_once():
    model = network().eval()
    with pytest.warns(UserWarning, match=r"bb\.calibrate") as seen:
        model(X)
    model(2 * X)
    assert len({str(w.message) for w in seen}) == 1


def former(state: dict[str, Tensor], initialized: bool) -> dict[str, Tensor]:
    """The state as earlier versions had it: 0-d scales of whole tensors, ones where unset, and a flag."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        quantizer, _, leaf = name.rpartition(".")
        if quantizer.endswith(("weight_quantizer", "activation_quantizer.quantizer")):
            found[f"{quantizer}.initialized"] = torch.tensor(initialized)
            value = value.reshape(()) if value.shape == (1,) else value
            value = value if initialized or leaf == "signs" else torch.ones_like(value)
        found[name] = value
    return found


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_states_of_earlier_versions_are_read(name):
    old, new = network(name), network(name)
    old(X)
    new.load_state_dict(former(old.state_dict(), True))
    assert same(new.state_dict(), old.state_dict())
    given = former(network(name).state_dict(), False)
    new.load_state_dict(given)
    assert any("initialized" in key for key in given)  # the caller's stays as it was
    assert not any(q.is_set for q in inputs(new))
    new(X)
    assert same(scales(new), scales(old))


def test_an_average_that_is_made_before_the_first_batch_keeps_what_was_learned():
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    before = scales(average.module)
    with torch.no_grad():
        average.eval()(100 * X)
    assert all(bool(t.isfinite().all()) for t in before.values())
    assert same(scales(average.module), before)


def test_an_average_begins_scales_that_are_set_late_with_their_first_value():
    model = network()
    average = Average(model, AverageSection(last=1, decay=0.5), CewtSection(every=0), steps=2)
    average.update(0)  # as of an expert that no data has reached yet
    model(X)
    average.update(1)
    assert same(scales(average.model), scales(model))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_model_that_is_prepared_without_memory_sets_its_scales_when_the_weights_are_there(name):
    with torch.device("meta"):
        deferred = network(name)
        assert deferred(torch.empty(4, 64)).shape == (4, 8)
    deferred.to_empty(device="cpu")
    assert all(
        bool(q.get_parameter(n).isnan().all()) for q in inputs(deferred) for n, _ in q.named_parameters()
    )
    deferred.load_state_dict(plain().state_dict(), strict=False)
    direct = network(name)
    torch.testing.assert_close(
        deferred(X), direct(X), rtol=1e-5, atol=1e-6
    )  # rotated in the forward, or before it
    assert bool(torch.stack([t.isfinite().all() for t in scales(deferred).values()]).all())
    with torch.no_grad():
        torch.testing.assert_close(deferred.eval()(X), direct.eval()(X), rtol=1e-5, atol=1e-6)


def test_a_plain_state_that_is_assigned_to_a_model_without_memory():
    with torch.device("meta"):
        deferred = network("lsq")
    deferred.load_state_dict(plain().state_dict(), strict=False, assign=True)
    assert torch.equal(deferred(X), network("lsq")(X))


def three_steps(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(3):
        optimizer.zero_grad()
        # two forwards before one backward: what the first keeps is not changed by the second
        loss = run(X).square().mean() + run(2 * X).square().mean()
        loss.backward()
        assert all(p.grad is None or p.grad.data_ptr() != p.data_ptr() for p in model.parameters())
        optimizer.step()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("name", ["bbq", "ema", "n2uq"])
def test_a_model_that_is_compiled_before_its_first_batch_trains_to_the_same_bits(name):
    torch._dynamo.reset()
    eager, model = network(name), network(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(three_steps(model, compiled), three_steps(eager, eager), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_is_compiled_in_evaluation_before_its_first_batch():
    torch._dynamo.reset()
    eager, model = network().eval(), network().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bool(compiled(torch.zeros(2, 64)).isfinite().all())
        eager(torch.zeros(2, 64))
        assert torch.equal(compiled(X), eager(X))
        assert torch.equal(compiled(2 * X), eager(2 * X))
    assert same(scales(model), scales(eager))


def test_of_several_processes_none_takes_an_input_scale_from_its_own_batch(monkeypatch):
    monkeypatch.setattr("bellbox.quantizers.learned.processes", lambda group=None: 2)
    q = build_quantizer(QuantizerSpec("lsq", 4), 8, None, "here")
    with pytest.raises(BellboxError, match="here: its scale is not set, and each of 2 processes"):
        q(torch.ones(2, 8))
    assert not q.is_set
    weight = build_quantizer(QuantizerSpec("lsq", 4), 8, 2, "there")  # the same in all of them
    weight(torch.ones(2, 8))
    assert weight.is_set


def test_an_input_without_a_scale_is_not_packed_and_a_weight_needs_none():
    unset = build_quantizer(QuantizerSpec("lsq", 4), 8, None, "")
    assert "its scale is not set yet" in str(unset.why_not_packed())
    assert build_quantizer(QuantizerSpec("lsq", 4), 8, 2, "").why_not_packed() is None
    unset(torch.ones(2, 8))
    assert unset.why_not_packed() is None


@pytest.mark.parametrize("method", ["bbq", "quest", "rtn", "lsq"])
def test_a_packed_row_has_one_scale(method):
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    q = build_quantizer(QuantizerSpec(method, 4, block=1), 8, 3, "")
    q.initialize(rows)
    codes, row_scales = q.encode(rows)
    scales = q.packed_scales(rows, row_scales)
    assert scales.shape == (3,)
    assert scales.dtype == torch.float32
    values = scales[:, None] * (codes.float() - q.levels.offset)
    torch.testing.assert_close(values, q.eval()(rows))
