"""The loss of next tokens: torch's, from logits as they come, with the same bits on every path."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from bellbox.errors import BellboxError
from bellbox.ops import native
from bellbox.ops.cross_entropy import backward, cross_entropy, forward

SETS = native.instruction_sets()
CLASSES = [1, 2, 15, 16, 17, 31, 255, 256, 257, 300, 4099]
DTYPES = [torch.float32, torch.bfloat16]


def drawn(
    rows: int, classes: int, dtype: torch.dtype, scale: float = 4.0
) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows * classes)
    logits = (torch.randn(rows, classes, generator=draw) * scale).to(dtype)
    return logits, torch.randint(classes, (rows,), generator=draw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_loss_and_gradient_are_those_of_float64(classes, dtype):
    logits, targets = drawn(5, classes, dtype)
    wide = logits.double().requires_grad_()
    F.cross_entropy(wide, targets).backward()
    narrow = logits.clone().requires_grad_()
    loss = cross_entropy(narrow, targets)
    (3 * loss).backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), F.cross_entropy(wide, targets).detach(), atol=2e-7, rtol=3e-7)
    assert narrow.grad is not None
    assert wide.grad is not None
    assert narrow.grad.dtype == dtype
    error = {"atol": 1e-6, "rtol": 2e-6 if dtype == torch.float32 else 5e-3}
    torch.testing.assert_close(narrow.grad.double(), 3 * wide.grad, **error)


@pytest.mark.skipif(not SETS, reason="the compiled kernels were not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_every_path_gives_the_bits_of_the_reference(classes, dtype):
    for rows, scale in ((1, 1.0), (7, 30.0)):
        logits, targets = drawn(rows, classes, dtype, scale)
        grads = torch.rand(rows, generator=torch.Generator().manual_seed(1)) - 0.5
        expected = forward.reference(logits, targets)
        gradient = backward.reference(logits, targets, expected[1], grads)
        strided = torch.stack((logits, -logits), 1)[:, 0]
        for isa in SETS:
            with native.use(isa):
                for given in (logits, strided):
                    assert all(map(torch.equal, forward.direct(given, targets), expected)), isa
                    assert torch.equal(backward.direct(given, targets, expected[1], grads), gradient), isa


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_loss(bad):
    logits, targets = drawn(3, 40, torch.float32)
    logits[1, 7] = bad
    for isa in SETS or [None]:
        with native.use(isa or ""):
            assert not cross_entropy(logits, targets).isfinite()


def test_a_class_that_is_ruled_out_has_no_share():
    logits = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.0, 0.5]]))


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([-1, 0])),
        (torch.zeros(2, 3), torch.tensor([0])),
        (torch.zeros(6), torch.tensor([0])),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_what_does_not_belong_together_is_refused(logits, targets):
    with pytest.raises(BellboxError, match=r"cross_entropy|classes"):
        cross_entropy(logits, targets)


def test_elsewhere_it_is_torch_s():
    logits, targets = drawn(4, 20, torch.float64)
    assert torch.equal(cross_entropy(logits, targets), F.cross_entropy(logits, targets))
    half = logits.half()
    assert torch.equal(cross_entropy(half, targets), F.cross_entropy(half.float(), targets))
    single = torch.func.vmap(cross_entropy)(logits.float()[:, None], targets[:, None])
    torch.testing.assert_close(single, F.cross_entropy(logits.float(), targets, reduction="none"))
