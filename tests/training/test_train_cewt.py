from __future__ import annotations

import copy
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest
import torch
from pieces import Cut, records
from torch import nn

from bellbox.convert import convert, prepare
from bellbox.core.entropy import code_counts
from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.nn import quantized_layers
from bellbox.optim import bin_means
from bellbox.optim.cewt import CEWT, constrained_weights, head_weights, normal_scores, project_
from bellbox.quantizers import build_quantizer
from bellbox.recipe import QuantizerSpec, Recipe, Rule
from bellbox.runs.config import CewtSection, OptimizerSection, PhasesSection, PullSection, QuantizationSection
from bellbox.training import TrainConfig, Trainer, load_run, train

Tiny = Callable[..., TrainConfig]


def skewed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Far from Gaussian: heavy tails, rows of different size, not centred."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw)
    return x.abs().pow(3) * x.sign() * torch.rand(rows, 1, generator=draw).exp() - 0.1


def test_projection_keeps_the_order_and_makes_the_values_the_quantiles_of_a_gaussian() -> None:
    weight = skewed(7, 9)
    order = weight.flatten().argsort()
    projected = project_(weight.clone(), 2.5).flatten()
    normal = NormalDist()
    expected = torch.tensor([normal.inv_cdf((r + 0.5) / 63) for r in range(63)], dtype=torch.float64)
    expected *= 2.5 / expected.norm()
    assert torch.allclose(projected[order].double(), expected, rtol=1e-6, atol=1e-7)
    assert float(projected.double().norm()) == pytest.approx(2.5, rel=1e-6)
    assert torch.equal(projected.argsort(), order)


def test_projection_again_changes_nothing() -> None:
    once = project_(skewed(16, 32), 3.0)
    assert torch.equal(project_(once.clone(), 3.0), once)


def test_equal_values_are_ranked_by_position_and_negative_zero_below_zero() -> None:
    assert torch.equal(project_(torch.ones(2, 4), 1.0).flatten(), project_(torch.arange(8.0), 1.0))
    scores = project_(torch.tensor([0.0, -0.0, 1.0, -1.0]), 1.0)
    assert scores.argsort().tolist() == [3, 1, 0, 2]


def test_scores_are_odd_and_of_unit_size() -> None:
    scores = normal_scores(4097, torch.device("cpu"))
    assert torch.equal(scores, -scores.flip(0))
    assert float(scores.double().square().mean()) == pytest.approx(1, abs=1e-7)


def test_what_cannot_be_sorted_is_refused() -> None:
    for bad in (torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(4, 4)[:, ::2], torch.ones(1)):
        with pytest.raises(BellboxError, match="contiguous fp32"):
            project_(bad, 1.0)


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_codes_of_a_projected_matrix_are_used_exactly_equally(n: int, seed: int) -> None:
    weight = project_(skewed(96, 128, seed), 7.0)  # 12,288 entries: a multiple of every n
    quantizer = build_quantizer(QuantizerSpec("bbq", n, None, "tensor", 1), 128, 96, "weight")
    quantizer.initialize(weight)
    counts = code_counts(quantizer.codes(weight), n)
    assert counts.tolist() == [12288 // n] * n


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("weight_only", [None, "float"])
def test_weights_learned_unrotated_are_projected_in_the_domain_of_their_codes(
    signs: bool, weight_only: str | None
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Conv2d(32, 48, 3, bias=False))
    recipe = Recipe.of(
        "bbq", 4, weight_granularity="tensor", weight_only=weight_only, options={"signs": signs}, keep=()
    )
    with torch.no_grad():
        for layer in network:
            layer.weight.add_(0.1 * torch.rand_like(layer.weight))
    model = prepare(network, recipe)
    norms = [layer.weight.detach().double().norm() for layer in model]
    cewt = CEWT([torch.optim.AdamW(model.parameters(), lr=1e-2)], constrained_weights(model))
    for layer in model:
        layer.weight.grad = torch.randn_like(layer.weight)
    before = [layer.weight.detach().clone() for layer in model]
    cewt.step(lr=0.02)
    for layer, norm, old in zip(model, norms, before, strict=True):
        turned = layer.weight_quantizer.rotate(layer.weight_rows().detach()).flatten().double().sort().values
        scores = torch.special.ndtri(
            (torch.arange(turned.numel(), dtype=torch.float64) + 0.5) / turned.numel()
        )
        assert torch.allclose(turned, scores * norm / scores.norm(), rtol=1e-4, atol=1e-6)
        counts = code_counts(layer.weight_codes(), 16)
        assert (
            counts.min() >= turned.numel() / 16 * 0.99
        )  # values at a threshold may fall to either side by rounding
        assert (
            float((layer.weight.detach() - old).double().norm() / norm) < 0.2
        )  # rotated back: near where it was


def test_adamw_moves_a_weight_along_its_update_by_a_share_of_the_norm() -> None:
    torch.manual_seed(0)
    weight, other = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(5))
    alone = nn.Parameter(other.detach().clone())
    optimizer = torch.optim.AdamW([weight, other], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    reference = torch.optim.AdamW([alone], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)
    norm = weight.detach().double().norm()
    cewt = CEWT([optimizer], [weight])
    m = v = torch.zeros(12, 8, dtype=torch.float64)
    for step in range(1, 4):
        w, g = weight.detach().double().clone(), torch.randn(12, 8)
        m = 0.9 * m + 0.1 * g.double()
        v = 0.95 * v + 0.05 * g.double().square()
        update = -(m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        moved = w + 0.02 * norm * update / update.norm()
        scores = torch.special.ndtri((torch.arange(96, dtype=torch.float64) + 0.5) / 96)
        expected = torch.empty(96, dtype=torch.float64)
        expected[moved.flatten().argsort()] = scores * norm / scores.norm()
        weight.grad, other.grad, alone.grad = g, torch.ones(5), torch.ones(5)
        cewt.step(lr=0.02)
        reference.step()
        assert torch.allclose(weight.detach().double().flatten(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(other, alone)  # what is not constrained is stepped as without


def test_muon_is_wrapped_alike_and_without_sorting_only_the_norm_is_kept() -> None:
    torch.manual_seed(0)
    weight, gradient = nn.Parameter(torch.randn(16, 8)), torch.randn(16, 8)
    lone = nn.Parameter(torch.zeros(16, 8))
    cewt = CEWT([torch.optim.Muon([weight], lr=0.1)], [weight])
    before, norm = weight.detach().clone(), cewt.norms[weight]
    weight.grad, lone.grad = gradient.clone(), gradient.clone()
    torch.optim.Muon([lone], lr=0.1).step()
    cewt.step(lr=0.05, project=False)
    moved = before.double() + 0.05 * norm * lone.detach().double() / lone.detach().double().norm()
    assert torch.allclose(weight.detach().double(), moved * norm / moved.norm(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(weight.detach().flatten().sort().values, before.flatten().sort().values)


def test_without_hyperball_the_update_and_its_decay_are_the_optimizers() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 8))
    cewt = CEWT([torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)], [weight], hyperball=False)
    lone = nn.Parameter(weight.detach().clone())
    weight.grad = lone.grad = torch.randn(12, 8)
    cewt.step(lr=1.0)
    torch.optim.AdamW([lone], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight, project_(lone.detach().clone(), cewt.norms[weight]))


def test_a_weight_without_gradient_and_an_update_of_zero_stay() -> None:
    first, second = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
    cewt = CEWT([torch.optim.AdamW([first, second], lr=0.1)], [first, second])
    before = first.detach().clone(), second.detach().clone()
    second.grad = torch.zeros(4, 8)
    cewt.step(lr=0.1)
    assert torch.equal(first, before[0])
    assert torch.equal(second, before[1])


def section(kind: Any = "adamw", **choices: Any) -> OptimizerSection:
    return OptimizerSection(kind=kind, lr=1e-2, cewt=CewtSection(**{"every": 1, **choices}))


SPEC = QuantizerSpec("cewt", 4)
TENSOR = QuantizationSection(weight_granularity="tensor")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_keeps_full_entropy_and_every_norm_and_learns(tiny: Tiny, kind: str) -> None:
    config = tiny(steps=30, eval_every=10, optimizer=section(kind), quantization=TENSOR, log_every=100)
    trainer = Trainer(config, show=False)
    norms = {
        name: float(layer.weight.detach().double().norm()) for name, layer in quantized_layers(trainer.model)
    }
    result = trainer.run()
    evals = [record for record in records(config) if record["kind"] == "eval"]
    assert evals[-1]["loss"] < evals[0]["loss"] < math.log(270) + 0.3
    assert result.validation is not None
    assert set(result.validation["weight_entropy"]["layers"].values()) == {2.0}
    run = load_run(config.folder)
    assert run.config.quantization.weights_rotated is True
    for name, layer in quantized_layers(run.model):
        assert float(layer.weight.detach().double().norm()) == pytest.approx(norms[name], rel=1e-5)
        assert layer.weights_rotated


def test_a_run_is_packed_code_for_code(tiny: Tiny) -> None:
    config = tiny(steps=3, optimizer=section(), quantization=TENSOR)
    train(config, show=False)
    model = load_run(config.folder).model
    packed = convert(model)
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(packed(tokens), model(tokens))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_in_pieces_equals_a_run_in_one(tiny: Tiny, kind: str, every: int) -> None:
    settings = {
        "steps": 9,
        "eval_every": 3,
        "optimizer": section(kind, every=every),
        "phases": PhasesSection(quantized=0.7, bits_before=[3]),
    }
    whole, pieces = tiny("whole", **settings), tiny("pieces", **settings)
    train(whole, show=False)
    while not Cut(pieces, show=False).run().finished:
        pass
    assert records(whole) == records(pieces)
    ours, theirs = load_run(whole.folder).model.state_dict(), load_run(pieces.folder).model.state_dict()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_run_in_pieces_whose_projections_stop_and_whose_hyperball_comes_to_rest(tiny: Tiny) -> None:
    settings = {
        "steps": 9,
        "eval_every": 3,
        "optimizer": section(every=2, until=0.6, end_factor=0.0, warmup=0.3),
    }
    whole, pieces = tiny("whole", **settings), tiny("pieces", **settings)
    trainer = Trainer(whole, show=False)
    step, moved = trainer._train_step, []
    weight = trainer.model.get_parameter("model.layers.0.mlp.up_proj.rotated_weight")

    def watch() -> None:
        before = weight.detach().clone()
        step()
        scores = normal_scores(weight.numel(), weight.device) * weight.detach().square().mean().sqrt()
        gaussian = torch.allclose(weight.detach().flatten().sort().values, scores, atol=1e-6)
        moved.append((float((weight.detach() - before).norm()), gaussian))

    trainer._train_step = watch  # type: ignore[method-assign]
    trainer.run()
    while not Cut(pieces, show=False).run().finished:
        pass
    assert records(whole) == records(pieces)
    assert [number for number, (_, gaussian) in enumerate(moved, 1) if gaussian] == [2, 4]
    assert moved[-1][0] < 1e-5 < moved[-2][0]


@pytest.mark.parametrize("hyperball", [True, False])
def test_a_run_in_pieces_whose_weights_are_pulled_to_their_codes(tiny: Tiny, hyperball: bool) -> None:
    pull = PullSection(weight=5.0, last=0.6)
    with_pull = section(every=4, until=0.4, pull=pull, hyperball=hyperball)
    whole, pieces = (tiny(name, steps=8, eval_every=8, optimizer=with_pull) for name in ("whole", "pieces"))
    free = tiny("free", steps=8, eval_every=8, optimizer=section(every=4, until=0.4, hyperball=hyperball))
    for config in (whole, free):
        train(config, show=False)
    while not Cut(pieces, show=False).run().finished:
        pass
    assert records(whole) == records(pieces)

    def distance(config: TrainConfig) -> float:
        layer = load_run(config.folder).model.get_submodule("model.layers.0.mlp.up_proj")
        rows: torch.Tensor = layer.stored_weight.detach()  # pyright: ignore[reportAssignmentType, reportCallIssue, reportAttributeAccessIssue]
        v = rows / rows.square().mean(1, keepdim=True).sqrt()
        values = torch.tensor(bin_means(Levels.gaussian(4)))[layer.weight_codes().long()]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        return float((v - values).square().mean())

    assert distance(whole) < distance(free)


def test_when_weights_go_over_into_the_rotated_domain_their_moments_start_anew(tiny: Tiny) -> None:
    phases = PhasesSection(quantized=0.5, bits_before=[3])
    config = tiny(steps=8, log_every=100, optimizer=section(), phases=phases)
    trainer = Trainer(config, show=False)
    trainer.signals.received = 15
    trainer.run()
    for _ in range(4):
        trainer._train_step()
    weight = trainer.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    embedding = trainer.model.get_parameter("model.embed_tokens.weight")
    trainer._enter(trainer.phases[1])
    assert set(trainer.optimizer.state_of(weight)) == {"cewt_norm"}
    assert int(trainer.optimizer.state_of(embedding)["step"]) == 4
    trainer._train_step()
    trainer._enter(trainer.phases[2])  # rotated before and after
    assert int(trainer.optimizer.state_of(weight)["step"]) == 1


def test_constraining_what_is_not_quantized_is_refused(tiny: Tiny) -> None:
    config = tiny(optimizer=section(), quantization=QuantizationSection(method="none"))
    with pytest.raises(BellboxError, match=r"quantization\.method is none; leave it out"):
        Trainer(config, show=False)


@pytest.mark.parametrize("project", [False, True])
def test_a_weight_of_zeros_is_left_to_the_optimizer(project: bool) -> None:
    torch.manual_seed(0)  # how far AdamW takes a weight depends on the other layer's
    model = prepare(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), Recipe.bbq(bits=2))
    last = model[1].weight
    nn.init.zeros_(last)
    cewt = CEWT([torch.optim.AdamW(model.parameters(), lr=1e-2)], constrained_weights(model))
    for _ in range(3):
        model.zero_grad()
        (model(torch.randn(5, 16, generator=torch.Generator().manual_seed(0))) - 1).square().mean().backward()
        cewt.step(0.02, project)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert 0 < float(last.detach().abs().max()) <= 0.05


def test_codebooks_are_fitted_to_the_weights_as_they_are_projected(tiny: Tiny) -> None:
    section = QuantizationSection(method="kmeans", weight_only="float", weights_rotated=False)
    trainer = Trainer(
        tiny(quantization=section, optimizer=OptimizerSection(cewt=CewtSection(every=1))), show=False
    )
    for _, layer in quantized_layers(trainer.model):
        assert layer.weight_quantizer is not None
        found = copy.deepcopy(layer.weight_quantizer)
        found.initialize(layer.weight_rows())
        assert torch.equal(found.state_dict()["centroids"], layer.weight_quantizer.state_dict()["centroids"])


def test_a_published_run_has_the_published_optimizer_and_first_weights(tiny: Tiny) -> None:
    config = tiny(steps=3, quantization=QuantizationSection(method="cewt"), log_every=100)
    trainer = Trainer(config, show=False)
    cewt = trainer.config.optimizer.cewt
    assert (cewt.rule, cewt.every, cewt.lr, cewt.hyperball) == ("published", 1, 0.01, True)
    constraint = trainer.optimizer.cewt
    assert constraint is not None
    head = trainer.model.get_parameter("lm_head.weight")
    inside = {layer.stored_weight for _, layer in quantized_layers(trainer.model)}
    assert set(constraint.norms) == {head, *inside}
    for weight in constraint.norms:  # LeCun's, and not yet projected
        assert float(weight.detach().std()) * weight.shape[1] ** 0.5 == pytest.approx(1, abs=0.08)
        assert not torch.equal(project_(weight.detach().clone(), constraint.norms[weight]), weight)
    embedding = trainer.model.get_parameter("model.embed_tokens.weight")
    assert float(embedding.detach().std()) == pytest.approx(0.02, rel=0.05)
    before = {weight: weight.detach().clone() for weight in constraint.norms}
    norms = {weight: norm.clone() for weight, norm in constraint.norms.items()}
    trainer.run()
    for weight, norm in norms.items():
        assert float(weight.detach().double().norm()) == pytest.approx(float(norm), rel=1e-5)
        scores = normal_scores(weight.numel(), weight.device)
        gaussian = torch.allclose(
            weight.detach().flatten().sort().values,
            scores * (norm / weight.numel() ** 0.5).float(),
            atol=1e-6,
        )
        assert gaussian == (weight in inside)
        assert not torch.equal(weight, before[weight])


def test_a_published_step_is_the_authors_on_the_head_and_inside() -> None:
    """Hyperball of AdamW's first update; the projection of the matrix, the norm of the head."""
    torch.manual_seed(0)
    inner, head = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(6, 8))
    optimizer = torch.optim.AdamW([inner, head], lr=1e-3, weight_decay=0.1)
    starts = [weight.detach().double().clone() for weight in (inner, head)]
    cewt = CEWT([optimizer], [inner], norms_only=[head], at_once=False)
    assert torch.equal(inner.detach().double(), starts[0])
    inner.grad, head.grad = torch.randn(12, 8), torch.randn(6, 8)
    moved = []
    for start, weight in zip(starts, (inner, head), strict=True):
        assert weight.grad is not None
        update = -weight.grad.double() / (weight.grad.double().abs() + 1e-8)
        moved.append(start + 0.01 * start.norm() * update / update.norm())
    cewt.step(lr=0.01)
    scores = torch.special.ndtri((torch.arange(96, dtype=torch.float64) + 0.5) / 96)
    expected = torch.empty(96, dtype=torch.float64)
    expected[moved[0].flatten().argsort()] = scores * starts[0].norm() / scores.norm()
    assert torch.allclose(inner.detach().double().flatten(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(
        head.detach().double(), moved[1] * starts[1].norm() / moved[1].norm(), rtol=1e-5, atol=1e-6
    )


def test_a_head_that_is_tied_quantized_or_frozen_is_not_on_the_hyperball_by_itself() -> None:
    def model(tied: bool = False) -> nn.Module:
        net = nn.ModuleDict(
            {
                "embed": nn.Embedding(32, 16),
                "body": nn.Linear(16, 16),
                "lm_head": nn.Linear(16, 32, bias=False),
            }
        )
        if tied:
            net["lm_head"].weight = net["embed"].weight
        return net

    plain = model()
    assert head_weights(plain) == [plain["lm_head"].weight]  # type: ignore[index]
    assert head_weights(model(tied=True)) == []
    assert (
        head_weights(prepare(model(), Recipe.cewt(2, keep_ends=False, rules=(Rule("lm_head", SPEC, SPEC),))))
        == []
    )
    plain["lm_head"].weight.requires_grad = False  # type: ignore[index]
    assert head_weights(plain) == []


def test_a_head_is_known_by_its_place_not_its_name() -> None:
    net = nn.ModuleDict(
        {
            "tokens": nn.Embedding(32, 16),
            "blocks": nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))),
            "words": nn.Linear(16, 32, bias=False),
        }
    )
    assert head_weights(net) == [net["words"].weight]  # type: ignore[index]
    inner = nn.Sequential(nn.Linear(16, 16))
    net["blocks"] = nn.Sequential(*(nn.ModuleDict({"head": nn.Linear(16, 16)}) for _ in range(2)), inner)
    assert head_weights(net) == [net["words"].weight]  # type: ignore[index]


def test_a_published_run_in_pieces_equals_a_run_in_one_and_packs(tiny: Tiny) -> None:
    settings = {"steps": 5, "eval_every": 5, "quantization": QuantizationSection(method="cewt", bits=3)}
    whole, pieces = tiny("whole", **settings), tiny("pieces", **settings)
    train(whole, show=False)
    while not Cut(pieces, show=False).run().finished:
        pass
    model = load_run(whole.folder).model
    ours, theirs = model.state_dict(), load_run(pieces.folder).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        assert torch.equal(convert(model)(tokens), model(tokens))
