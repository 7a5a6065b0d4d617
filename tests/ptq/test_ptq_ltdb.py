from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bellbox.errors import BellboxError
from bellbox.models import GPTConfig, LlamaConfig, build
from bellbox.ptq.ltdb import double_bell, fold, learn_scale, slope, start_scale


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator).add(0.2)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("columns", [8, 12, 20])
def test_loss_and_distance_are_those_of_the_definition(power, columns):
    w = weights(5, columns).double().numpy()
    loss, distance = [], []
    for row in w:
        for first in range(0, columns, 8):
            part = row[first : first + 8]
            mean = part.mean()
            apart = np.abs(part - mean).mean()
            for value in part:
                gaps = [abs(value - (mean + apart)), abs(value - (mean - apart))]
                nearer = [mean + apart, mean - apart][int(np.argmin(gaps))]
                loss.append(100 * min(gaps) ** power / abs(nearer) ** power)
                distance.append(min(gaps))
    found = double_bell(torch.from_numpy(w), power, block=8)
    np.testing.assert_allclose([float(one) for one in found], [np.mean(loss), np.mean(distance)], rtol=1e-10)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("columns", [8, 20])
def test_the_closed_form_is_autograd_of_the_definition(power, columns):
    w = weights(300, columns).double()
    scale = torch.linspace(-0.5, 2, columns, dtype=torch.float64).requires_grad_()
    loss, distance = double_bell(w * scale, power, columns)
    (wanted,) = torch.autograd.grad(loss, scale)
    found = slope(w, scale.detach(), power)
    np.testing.assert_allclose(found[:2], [float(loss.detach()), float(distance)], rtol=1e-12)
    torch.testing.assert_close(found[2], wanted, rtol=1e-10, atol=1e-12)


def test_gradients_reach_the_weight_through_the_centres_too():
    # Twice the weight is the same picture: no gradient along the scale itself. With fixed centres there were one.
    w, scale = weights(30, 16).double(), torch.linspace(0.5, 2, 16, dtype=torch.float64)
    gradient = slope(w, scale)[2]
    assert abs(float((gradient * scale).sum())) < 1e-9 < float(gradient.abs().max())


def test_the_start_is_the_formula():
    w, largest = weights(4, 6), torch.tensor([1.0, 2.0, 50.0, 0.0, 3.0, 0.5])
    s = start_scale(largest, w, 0.85)
    expected = [
        max(1e-5, max(1e-5, x) ** 0.85 / float(w[:, j].abs().max()) ** 0.15)
        for j, x in enumerate(largest.tolist())
    ]
    torch.testing.assert_close(s, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["released", "clean"])
def test_learning_stops_at_the_first_rise_and_keeps_the_lowest_loss(variant):
    w, largest = [weights(96, 256), weights(32, 256, 1)], torch.rand(256) + 0.5
    learned = learn_scale(w, largest, variant=variant)
    whole = learn_scale(w, largest, variant=variant, most_steps=3)
    assert 0 < learned.steps <= 200
    assert whole.steps == 3
    assert learned.loss[1] < learned.loss[0]
    assert bool((learned.scale != 0).all())


@pytest.mark.parametrize(("power", "seed"), [(1, 0), (1, 1), (1, 3), (1, 4), (2, 0), (2, 2), (2, 5)])
def test_learning_ends_with_the_step_before_dtmd_first_rises(power, seed):
    """Plain descent under autograd in float64, written out: how many steps, and the scale of the lowest loss."""
    w, largest = weights(24, 16, seed).double(), torch.linspace(0.5, 2, 16, dtype=torch.float64)
    learned = learn_scale([w], largest, power=power, lr=0.02)
    scale, seen = start_scale(largest, w, 0.5).requires_grad_(), []
    for _ in range(201):
        loss, distance = double_bell(w * scale, power, 16)
        seen.append((float(loss.detach()), float(distance), scale.detach().clone()))
        if len(seen) > 1 and seen[-1][1] > seen[-2][1]:
            break
        (slope_here,) = torch.autograd.grad(loss, scale)
        scale = (scale.detach() - 0.02 * slope_here).requires_grad_()
    assert 2 < len(seen) < 201  # it has risen
    assert learned.steps == len(seen) - 1
    best = min(seen, key=lambda one: one[0])
    torch.testing.assert_close(learned.scale, best[2], rtol=1e-9, atol=0)
    assert learned.loss == pytest.approx((seen[0][0], best[0]), rel=1e-9)


def test_released_takes_the_larger_scale_and_clean_one_for_all_rows():
    w, largest = [weights(16, 32), weights(16, 32, 1) * 3], torch.rand(32) + 0.5
    alone = [learn_scale([one], largest, variant="released").scale for one in w]
    merged = learn_scale(w, largest, variant="released").scale
    assert torch.equal(merged, torch.where(alone[0].abs() >= alone[1].abs(), alone[0], alone[1]))
    together = learn_scale(w, largest, variant="clean").scale
    assert torch.equal(together, learn_scale([torch.cat(w)], largest).scale)


@pytest.mark.parametrize("variant", ["released", "clean"])
def test_each_block_of_columns_learns_and_stops_by_itself(variant):
    w, largest = weights(48, 40), torch.rand(40, generator=torch.Generator().manual_seed(2)) + 0.5
    w[:, 16:32] *= torch.linspace(0.1, 3, 16)  # blocks that want unequal numbers of steps
    learned = learn_scale([w], largest, variant=variant, block=16)
    parts = zip(w.split(16, 1), largest.split(16), strict=True)
    alone = [learn_scale([part], x, variant=variant) for part, x in parts]
    torch.testing.assert_close(learned.scale, torch.cat([one.scale for one in alone]), rtol=1e-5, atol=1e-6)
    assert learned.steps == sum(one.steps for one in alone) / 3
    assert len({one.steps for one in alone}) > 1
    for at in (0, 1):
        wanted = sum(one.loss[at] * len(one.scale) for one in alone) / 40
        assert learned.loss[at] == pytest.approx(wanted, rel=1e-6)


def test_the_variants_start_from_exponents_of_their_own():
    w, largest = weights(16, 32), torch.rand(32) + 0.5
    for variant, exponent in (("released", 0.85), ("clean", 0.5)):
        start = learn_scale([w], largest, variant=variant, most_steps=0).scale
        torch.testing.assert_close(start, start_scale(largest, w, exponent), rtol=0, atol=0)
    start = learn_scale([w], largest, exponent=0.25, most_steps=0).scale
    torch.testing.assert_close(start, start_scale(largest, w, 0.25), rtol=0, atol=0)


CONFIGS = {
    "llama": LlamaConfig(61, 64, 96, 2, 4, 2, max_position_embeddings=40, initializer_range=0.2),
    "gpt": GPTConfig(61, 64, 96, 2, 4, max_position_embeddings=40, initializer_range=0.2),
    "opt": GPTConfig(61, 64, 96, 2, 4, max_position_embeddings=40, initializer_range=0.2, activation="relu"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folded_scale_leaves_the_logits_as_they_were(name):
    from bellbox.models.blocks import groups_of

    model = build(CONFIGS[name], seed=0).eval()
    for parameter in model.parameters():  # norms and biases too
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids)
        for index, block in enumerate(model.model.layers if name == "llama" else model.transformer.h):
            for group in groups_of(CONFIGS[name]):
                if group.norm is not None:
                    layers = [block.get_submodule(layer) for layer in group.layers]
                    largest = torch.rand(64, generator=torch.Generator().manual_seed(index)) * 8
                    scale = learn_scale([layer.weight for layer in layers], largest).scale
                    assert float(scale.abs().max() / scale.abs().min()) > 3
                    fold(block.get_submodule(group.norm), layers, scale)
        after = model(ids)
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
    assert float((after - before).abs().max()) > 0


def test_a_norm_that_cannot_take_the_scale_is_named():
    layer = nn.Linear(8, 4)
    with pytest.raises(BellboxError, match=r"ln: LayerNorm has no weight of 8 numbers.*use method billm"):
        fold(nn.LayerNorm(8, elementwise_affine=False), [layer], torch.ones(8), "ln")


def test_no_scale_of_channels_makes_two_bells_of_gaussian_ones():
    """100 (pi/2 mean s^2 / (mean s)^2 - 1) is at least 57.1, reached where all channels are alike."""
    w = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    alike = slope(w, torch.ones(128))[0]
    assert alike == pytest.approx(100 * (np.pi / 2 - 1), abs=2.5)  # a block of 128 guesses its d
    for seed in range(5):
        scale = torch.rand(128, generator=torch.Generator().manual_seed(seed)) + 0.1
        wanted = 100 * (np.pi / 2 * float(scale.square().mean() / scale.mean() ** 2) - 1)
        loss = slope(w, scale)[0]
        assert loss > alike
        assert loss == pytest.approx(wanted, rel=0.06)
