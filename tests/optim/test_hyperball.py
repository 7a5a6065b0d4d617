"""The hyperball around an optimizer of one's own: any optimizer, scheduler, checkpoint, wrapper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.nn import quantized_layers
from bellbox.optim import CEWT, constrained_weights, hyperball, normal_scores, parameter_groups
from bellbox.optim import project_weights as project

STEPS = 6
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1, fused=True),
    "one by one": partial(torch.optim.AdamW, lr=1e-3, foreach=False),
    "adam, decay in the gradient": partial(torch.optim.Adam, lr=1e-3, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "nadam": partial(torch.optim.NAdam, lr=1e-3),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Embedding(20, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 20)]
    model = bb.prepare(nn.Sequential(*layers), bb.Recipe.bbq(2, keep=("4",)))
    with torch.no_grad():
        model(tokens(-1))
    return model


def tokens(step: int) -> Tensor:
    return torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(step + 100))


def learn(model: nn.Module, optimizer: Any, start: int = 0, stop: int = STEPS, scheduler: Any = None) -> None:
    for step in range(start, stop):
        optimizer.zero_grad()
        logits = model(tokens(step))
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(step)[:, 1:].flatten()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def bodies(model: nn.Module) -> list[Tensor]:
    return [layer.stored_weight for _, layer in quantized_layers(model)]


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_move_by_a_share_of_their_norm_which_they_keep(name: str) -> None:
    model = network()
    optimizer = hyperball(OPTIMIZERS[name](model.parameters()), model, lr=0.02, every=0)
    before = [weight.detach().clone() for weight in bodies(model)]
    learn(model, optimizer, stop=1)
    for was, now in zip(before, bodies(model), strict=True):
        assert float((now - was).detach().norm() / was.norm()) == pytest.approx(0.02, rel=0.02)
        assert float(now.detach().norm()) == pytest.approx(float(was.norm()), rel=1e-5)
    learn(model, optimizer, 1)
    for was, now in zip(before, bodies(model), strict=True):
        assert float(now.detach().norm()) == pytest.approx(float(was.norm()), rel=1e-5)


def test_it_is_the_step_that_the_trainer_makes() -> None:
    """`CEWT.step` with groups of the same rates: bit for bit."""
    ours, theirs = network(), network()
    wrapped = hyperball(OPTIMIZERS["adamw"](parameter_groups(ours, lr=1e-3)), ours, lr=0.02, every=2)
    weights = set(bodies(theirs))
    groups = parameter_groups(theirs, lr=1e-3)
    rest = [{**group, "params": [p for p in group["params"] if p not in weights]} for group in groups]
    plain = OPTIMIZERS["adamw"](
        [*(group for group in rest if group["params"]), {"params": bodies(theirs), "lr": 0.02}]
    )
    cewt = CEWT([plain], constrained_weights(theirs), at_once=False)
    for step in range(STEPS):
        learn(ours, wrapped, step, step + 1)
        plain.zero_grad()
        logits = theirs(tokens(step))
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens(step)[:, 1:].flatten()).backward()
        cewt.step(0.02, project=(step + 1) % 2 == 0)
    assert same(ours, theirs)


def test_projections_come_every_so_many_steps_and_when_asked_for() -> None:
    def gaussian(model: nn.Module) -> bool:
        return all(
            torch.allclose(w.detach().flatten().sort().values / w.detach().std(), scores(w), atol=2e-2)
            for w in bodies(model)
        )

    def scores(weight: Tensor) -> Tensor:
        return normal_scores(weight.numel(), weight.device)

    model = network()
    optimizer = hyperball(torch.optim.AdamW(model.parameters()), model, every=3)
    seen = []
    for step in range(STEPS):
        learn(model, optimizer, step, step + 1)
        seen.append(gaussian(model))
    assert seen == [False, False, True] * 2
    learn(model, optimizer, 6, 7)
    assert not gaussian(model)
    project(optimizer)
    assert gaussian(model)
    assert torch.equal(bb.convert(model)(tokens(0)), model.eval()(tokens(0)).detach())


def test_rates_lie_in_groups_which_a_scheduler_scales() -> None:
    model = network()
    optimizer = hyperball(
        torch.optim.AdamW(parameter_groups(model, lr=1e-3, weight_decay=0.1)), model, lr=0.02, every=0
    )
    (ball,) = [group for group in optimizer.param_groups if "hyperball_norms" in group]
    assert (ball["lr"], ball["weight_decay"], len(ball["params"])) == (0.02, 0.0, 2)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    learn(model, optimizer, stop=1, scheduler=scheduler)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 0.01, 5e-5}
    before = [weight.detach().clone() for weight in bodies(model)]
    learn(model, optimizer, 1, 2, scheduler)
    for was, now in zip(before, bodies(model), strict=True):
        assert float((now - was).detach().norm() / was.norm()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("name", ["adamw", "sgd", "fused"])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_run_in_pieces_is_a_run_in_one(name: str, cut: int, tmp_path: Any) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = network()
        optimizer = hyperball(OPTIMIZERS[name](model.named_parameters()), model, every=3)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    whole, optimizer, scheduler = begin()
    learn(whole, optimizer, scheduler=scheduler)
    first, optimizer, scheduler = begin()
    learn(first, optimizer, stop=cut, scheduler=scheduler)
    torch.save([first.state_dict(), optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state")
    second, optimizer, scheduler = begin()
    learn(second, optimizer, 90, 92)  # what it did before is of no account
    states = torch.load(tmp_path / "state", weights_only=True)
    for each, state in zip((second, optimizer, scheduler), states, strict=True):
        each.load_state_dict(state)
    learn(second, optimizer, cut, scheduler=scheduler)
    assert same(second, whole)


def test_a_state_without_its_norms_is_refused_before_anything_changes() -> None:
    model = network()
    optimizer = hyperball(torch.optim.AdamW(parameter_groups(model, lr=1e-3)), model)
    other = network()
    plain = torch.optim.AdamW(parameter_groups(other, lr=1e-3))
    learn(other, plain, stop=1)
    with pytest.raises(bb.BellboxError, match="another hyperball, or none"):
        optimizer.load_state_dict(plain.state_dict())
    assert not optimizer.state
    learn(model, optimizer, stop=1)


def test_a_closure_sees_the_weights() -> None:
    ours, theirs = network(), network()
    one, two = (hyperball(torch.optim.AdamW(m.parameters()), m, every=2) for m in (ours, theirs))
    learn(ours, one)
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            two.zero_grad()
            logits = theirs(tokens(step))[:, :-1].flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, tokens(step)[:, 1:].flatten())
            loss.backward()
            return loss

        assert two.step(closure).item() > 0  # type: ignore[arg-type]
    assert same(ours, theirs)


class Failing(torch.optim.SGD):
    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise ZeroDivisionError
        return super().step(closure)


def test_a_step_that_fails_loses_no_weight() -> None:
    model = network()
    plain = Failing(model.parameters(), lr=0.1)
    optimizer = hyperball(plain, model, every=0)
    learn(model, optimizer, stop=1)
    before = [weight.detach().clone() for weight in bodies(model)]
    plain.fails = True
    with pytest.raises(ZeroDivisionError):
        learn(model, optimizer, 1, 2)
    plain.fails = False
    optimizer.zero_grad()
    optimizer.step()
    for was, now in zip(before, bodies(model), strict=True):
        assert torch.equal(now, was)
    cewt = CEWT([plain], bodies(model), at_once=False)
    learn(model, optimizer, 1, 2)
    before = [weight.detach().clone() for weight in bodies(model)]
    plain.fails = True
    with pytest.raises(ZeroDivisionError):
        cewt.step(0.02)
    for was, now in zip(before, bodies(model), strict=True):
        assert torch.equal(now, was)


def test_two_optimizers_have_one_each() -> None:
    model = network()
    first, second = bodies(model)
    rest = [p for p in model.parameters() if p is not first]
    muon = hyperball(torch.optim.Muon([first], lr=1e-3), model, every=0)
    adamw = hyperball(torch.optim.AdamW(rest), model, every=0)
    before = [weight.detach().clone() for weight in (first, second)]
    learn(model, muon, stop=1)
    assert not torch.equal(first, before[0])
    assert torch.equal(second, before[1])
    learn(model, adamw, stop=1)
    assert not torch.equal(second, before[1])


def test_the_published_rule_has_the_head_on_the_hyperball() -> None:
    model = network()
    head = model[4].weight  # type: ignore[index]
    optimizer = hyperball(torch.optim.AdamW(model.parameters()), model, lr=0.01, every=1, norms_only=[head])
    before = head.detach().clone()
    learn(model, optimizer)
    assert float(head.detach().norm()) == pytest.approx(float(before.norm()), rel=1e-5)
    scores = normal_scores(head.numel(), head.device)
    assert not torch.allclose(head.detach().flatten().sort().values / head.detach().std(), scores, atol=0.02)


def test_it_runs_inside_of_accelerate(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, model = network(), network()
    alone = hyperball(torch.optim.AdamW(plain.parameters()), plain, every=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(alone, lambda step: 0.9**step)
    learn(plain, alone, scheduler=schedule)
    optimizer = hyperball(torch.optim.AdamW(model.parameters()), model, every=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    accelerator = accelerate.Accelerator(cpu=True)
    ready, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    learn(ready, optimizer, scheduler=schedule)
    assert same(model, plain)
    accelerator.save_state(str(tmp_path / "state"))
    learn(ready, optimizer, scheduler=schedule)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator.load_state(str(tmp_path / "state"))
    assert same(model, plain)
    learn(ready, optimizer, scheduler=schedule)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    project(optimizer)
    late = torch.optim.AdamW(network(3).parameters())
    wrapped = accelerator.prepare(late)
    with pytest.raises(bb.BellboxError, match="none of the optimizer's parameters"):
        hyperball(wrapped, network(4))


def test_a_bf16_step_needs_no_scaler_and_a_scaled_one_may_be_skipped() -> None:
    model = network()
    optimizer = hyperball(torch.optim.AdamW(model.parameters(), fused=True), model, every=0)
    before = [weight.detach().clone() for weight in bodies(model)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(0)).square().mean()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (scaler.scale(loss) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    for was, now in zip(before, bodies(model), strict=True):
        torch.testing.assert_close(now.detach(), was, rtol=1e-6, atol=0)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(0)).square().mean().backward()
    optimizer.step()
    for was, now in zip(before, bodies(model), strict=True):
        assert float((now - was).detach().norm() / was.norm()) == pytest.approx(0.02, rel=0.02)


def _scheduled(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model: hyperball(torch.optim.AdamW(model.parameters()), model), "has a hyperball already"),
        (lambda model: torch.optim.LBFGS(model.parameters()), "L-BFGS"),
        (_scheduled, "make the scheduler"),
        (lambda model: torch.optim.AdamW(network(1).parameters()), "none of the optimizer's parameters"),
        (
            lambda model: torch.optim.AdamW(model.to(torch.bfloat16).parameters()),
            "keep master weights in fp32",
        ),
    ],
)
def test_what_it_cannot_be_put_around_is_one_line(make: Callable[[nn.Module], Any], says: str) -> None:
    model = network()
    optimizer = make(model)
    groups = len(optimizer.param_groups)
    with pytest.raises(bb.BellboxError, match=says):
        hyperball(optimizer, model)
    assert len(optimizer.param_groups) == groups


def test_a_weight_of_zeros_stays_with_the_optimizer() -> None:
    model = network()
    first, second = bodies(model)
    with torch.no_grad():
        first.zero_()
    optimizer = hyperball(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    (ball,) = [group for group in optimizer.param_groups if "hyperball_norms" in group]
    assert [id(p) for p in ball["params"]] == [id(second)]


def test_without_a_hyperball_there_is_nothing_to_project() -> None:
    with pytest.raises(bb.BellboxError, match="has no hyperball"):
        project(torch.optim.SGD(network().parameters()))


def test_parts_are_there_by_name() -> None:
    assert bb.optim.hyperball is hyperball
    with pytest.raises(AttributeError, match="nothing"):
        _ = bb.nothing
