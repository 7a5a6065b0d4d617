"""Training on Triton's kernels under what people put around a model: checkpointing, frozen parts, wrappers, fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bellbox as bb
from bellbox.core.grid import Levels
from bellbox.ops.encode import normaliser, row_rms
from bellbox.ops.fake_quantize import bbq_backward, bbq_forward

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lru_cache"),
    pytest.mark.parametrize("on_integers", [True, False], ids=["integers", "floats"]),
]


def made(on_integers: bool) -> tuple[nn.Sequential, Tensor]:
    """Two layers whose scales are set, and an input."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))
    model = bb.prepare(plain, bb.Recipe.bbq(4, integer_forward=on_integers)).train()
    x = torch.randn(3, 32)
    model(x)
    return model, x  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, and the gradients of parameters and of the input, in fp32."""
    model.zero_grad()
    given = x.clone().requires_grad_()
    y = run(given)
    y.square().sum().backward()
    return [
        y.detach(),
        *(each.grad.clone() for each in (given, *model.parameters()) if each.grad is not None),
    ]


def near(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 5
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max() + 1))


@pytest.fixture
def expected(on_integers: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the reference finds; the test then runs on Triton's kernels."""
    monkeypatch.setenv("BELLBOX_BACKEND", "reference")
    model, x = made(on_integers)
    found = step(model, model, x)
    monkeypatch.setenv("BELLBOX_BACKEND", "triton")
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_computed_again_give_the_same_gradients(
    on_integers: bool, reentrant: bool, expected: list[Tensor]
) -> None:
    model, x = made(on_integers)
    near(step(model, lambda x: checkpoint(model, x, use_reentrant=reentrant), x), expected)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("frozen", ["weight", "bias", "all"])
def test_frozen_parts_get_no_gradient_and_change_no_other(
    on_integers: bool, frozen: str, expected: list[Tensor]
) -> None:
    model, x = made(on_integers)
    names = [name for name, _ in model.named_parameters()]
    for name, each in model.named_parameters():
        each.requires_grad_(frozen != "all" and not name.endswith(frozen))
    found = step(model, model, x)
    left = [i for i, name in enumerate(names) if frozen != "all" and not name.endswith(frozen)]
    assert len(found) == 2 + len(left)
    # A closed-form product may be summed otherwise where a weight needs no gradient: still its rounding alone.
    wanted = [*expected[:2], *(expected[2 + i] for i in left)]
    for mine, other in zip(found, wanted, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max() + 1))


def test_without_gradients_the_output_is_the_same(on_integers: bool, expected: list[Tensor]) -> None:
    model, x = made(on_integers)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(model(x), expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_to_16_bits_is_that_of_the_reference(
    on_integers: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("BELLBOX_BACKEND", backend)
        model, x = made(on_integers)

        def run(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", dtype):
                return model(x).float()

        outs.append(step(model, run, x))
    assert len(outs[0]) == len(outs[1])
    for mine, other in zip(outs[1], outs[0], strict=True):
        assert torch.allclose(mine, other, rtol=0.03, atol=0.02 * float(other.abs().max()))


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_ddp_and_fsdp2_find_the_same_gradients(on_integers: bool, expected: list[Tensor]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model, x = made(on_integers)
    wrapped = DistributedDataParallel(model)
    near(step(model, wrapped, x), expected)
    model, x = made(on_integers)
    mesh = init_device_mesh("cpu", (1,))
    for each in model:
        if list(each.parameters()):
            fully_shard(each, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.zero_grad()
    given = x.clone().requires_grad_()
    y = model(given)
    y.square().sum().backward()
    shards: list[Any] = [each.grad for each in model.parameters() if each.grad is not None]
    assert given.grad is not None
    near([y.detach(), given.grad, *(each.to_local() for each in shards)], expected)


def test_the_closed_form_agrees_with_fp64(on_integers: bool) -> None:
    """Of the operation itself, on rows of 16 and 32 bits, against the formula in doubles."""
    del on_integers
    levels, block = Levels.gaussian(8), 32
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)):
        x, grad = (torch.randn(4, 96).to(dtype) for _ in range(2))
        r = normaliser(row_rms.reference(x), block)
        scale, gamma, free = torch.rand(4, 1), torch.rand(4, 1), torch.tensor([[1.0], [0.0], [1.0], [1.0]])
        x_hat, v = bbq_forward(x, r.float(), scale, levels.thresholds, levels.offset, block, dtype)
        found = bbq_backward(grad, v, x_hat, r.float(), gamma, free, block, False)
        wide = (grad.double(), v.double(), x_hat.double(), r.double(), gamma.double(), free.double())
        wanted = bbq_backward.reference(*wide, block, False)
        for mine, other in zip(found, wanted, strict=True):
            assert torch.allclose(
                mine.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max())
            )
