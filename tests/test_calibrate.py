"""Scales from chosen batches: in one process, and equally in several."""

from __future__ import annotations

import socket
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bellbox as bb
from bellbox.errors import BellboxError
from bellbox.quantizers.learned import LearnedQuantizer

RECIPES = {
    "bbq": bb.Recipe.bbq(bits=2),
    "integers": bb.Recipe.bbq(bits=2, integer_forward=True),
    "lsq": bb.Recipe.of("lsq", bits=2),
    "seq": bb.Recipe.of("seq", bits=2),
    "n2uq": bb.Recipe.of("n2uq", bits=2),
}
WRAPPERS = ("ddp", "fsdp", "nested")
X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 5, 32)[:, None]
BATCHES = [X, 2 * X]


def network(recipe: bb.Recipe, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    return bb.prepare(model, recipe)


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "nested":
        for layer in (model[0], model[2]):  # type: ignore[index]
            fully_shard(layer)
    return fully_shard(model)  # type: ignore[return-value]


def whole(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        value: Any = p.detach()
        found[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return found


def refusal(act: Any) -> str:
    with pytest.raises(BellboxError) as caught:
        act()
    return str(caught.value)


class Experts(nn.Module):
    """Each rank's data go through a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[dist.get_rank()](x)


def process(rank: int, port: int, folder: str) -> None:
    """What each of two processes does; what it found goes into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        for kind in WRAPPERS if name in ("bbq", "n2uq", "integers") else ("ddp",):
            model = network(recipe)
            run = wrapped(model, kind)
            bb.calibrate(run, [x[rank::2] for x in BATCHES])
            found[f"{name} {kind} start"] = whole(model)
            optimizer = torch.optim.SGD(run.parameters(), lr=0.05)
            for _ in range(3):
                optimizer.zero_grad()
                run(X[rank::2]).square().mean().backward()
                optimizer.step()
            found[f"{name} {kind} end"] = whole(model)
    deferred = network(bb.Recipe.bbq(2, weights_rotated=False), "meta")
    sharded = wrapped(deferred, "nested")
    sharded.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in deferred.named_parameters():
            if name.endswith(("weight", "bias")):
                p.fill_(0.1)
    bb.calibrate(sharded, [X[rank::2]])
    found["deferred"] = whole(deferred)
    found["refused"] = [refusal(partial(wrapped(network(RECIPES["bbq"]), kind), X)) for kind in WRAPPERS]
    found["experts"] = refusal(lambda: bb.calibrate(bb.prepare(Experts(), RECIPES["bbq"]), [X]))
    found["uneven"] = refusal(lambda: bb.calibrate(network(RECIPES["bbq"]), [X] * (rank + 1)))
    running = network(bb.Recipe.bbq_paper(2, granularity="ema"))
    bb.calibrate(running, [X[rank::2]])
    for part in range(3):
        running(X[rank + 2 * part :: 6])
    found["running"] = {name: b.clone() for name, b in running.named_buffers() if name.endswith("r_ema")}
    alone = dist.new_group([rank], use_local_synchronization=True)
    model = network(RECIPES["bbq"])
    bb.calibrate(model, BATCHES, group=alone)
    found["alone"] = whole(model)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn: Any = torch.multiprocessing.spawn  # pyright: ignore[reportPrivateImportUsage]
    spawn(process, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **bounds: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=bounds.get("rtol", 0), atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_process_has_the_scales_of_one_process_with_all_of_the_data(results, name):
    model = network(RECIPES[name])
    bb.calibrate(model, BATCHES)
    for found in results:
        for kind in WRAPPERS:
            if f"{name} {kind} start" in found:
                assert_same(found[f"{name} {kind} start"], whole(model), rtol=1e-6)


def test_every_process_has_the_same_parameters_after_training(results):
    ends = [key for key in results[0] if key.endswith("end")]
    assert len(ends) == 11
    for key in ends:
        assert_same(results[0][key], results[1][key])
    for name in ("bbq", "n2uq", "integers"):
        for kind in ("fsdp", "nested"):
            assert_same(results[0][f"{name} {kind} end"], results[0][f"{name} ddp end"], rtol=1e-5)


def test_weights_that_come_after_sharding_get_their_scales(results):
    assert_same(results[0]["deferred"], results[1]["deferred"])
    assert all(bool(t.isfinite().all()) for t in results[0]["deferred"].values())


def test_running_scales_are_those_of_the_batches_of_all_processes(results):
    assert len(results[0]["running"]) == 2
    assert_same(results[0]["running"], results[1]["running"])
    model = network(bb.Recipe.bbq_paper(2, granularity="ema"))
    bb.calibrate(model, [X])
    for part in range(3):
        model(torch.cat([X[rank + 2 * part :: 6] for rank in range(2)]))
    ours = {name: b for name, b in model.named_buffers() if name.endswith("r_ema")}
    first = next(iter(ours))  # deeper layers see what bf16 or another order of sums may change
    torch.testing.assert_close(ours[first], results[0]["running"][first], rtol=1e-6, atol=0)


def test_a_first_batch_of_several_processes_is_refused(results):
    for found in results:
        assert all(
            "0.input: its scale is not set" in text and "bb.calibrate" in text for text in found["refused"]
        )


def test_processes_that_run_different_layers_are_refused_and_do_not_wait_for_ever(results):
    for found in results:
        assert "do not run the same layers" in found["experts"]
        assert "different numbers of batches" in found["uneven"]


def test_a_group_of_its_own(results):
    model = network(RECIPES["bbq"])
    bb.calibrate(model, BATCHES)
    for found in results:
        assert_same(found["alone"], whole(model))


@pytest.mark.parametrize("name", RECIPES)
def test_one_batch_gives_what_the_first_batch_would(name):
    model, lazy = network(RECIPES[name]), network(RECIPES[name])
    bb.calibrate(model, [X])
    lazy(X)
    assert_same(whole(model), whole(lazy))
    bb.calibrate(model, [3 * X])  # set already
    assert_same(whole(model), whole(lazy))


@pytest.mark.parametrize("name", RECIPES)
def test_scales_are_set_anew_where_that_is_asked_for(name):
    model, fresh = network(RECIPES[name]), network(RECIPES[name])
    model(X)
    bb.calibrate(model, [3 * X], again=True)
    bb.calibrate(fresh, [3 * X])
    assert_same(whole(model), whole(fresh))
    assert all(q.collector is None for q in model.modules() if isinstance(q, LearnedQuantizer))


def test_several_batches_count_together():
    model, together = network(RECIPES["bbq"]), network(RECIPES["bbq"])
    bb.calibrate(model, [X, torch.full_like(X, torch.nan), 2 * X])
    bb.calibrate(together, [torch.cat((X, 2 * X))])
    ours, theirs = (
        next(q for q in m.modules() if isinstance(q, LearnedQuantizer) and q.rows is None)
        for m in (model, together)
    )
    torch.testing.assert_close(ours.learned("gamma"), theirs.learned("gamma"))


def test_batches_are_called_as_they_are_given():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 8)

        def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
            return self.inner(x * factor)

    states = []
    for batch, forward in (((X, 2.0), None), ({"x": X, "factor": 2.0}, None), (2 * X, None), (X, 2.0)):
        model: Any = bb.prepare(Two(), RECIPES["bbq"])
        torch.manual_seed(0)
        call = None if forward is None else lambda x, model=model: model(x, 2.0)
        bb.calibrate(model, [batch], forward=call)
        states.append(model.inner.activation_quantizer.gamma.item())
    assert len(set(states)) == 1


def test_a_compiled_model_is_calibrated():
    torch._dynamo.reset()
    model, plain = network(RECIPES["bbq"]), network(RECIPES["bbq"])
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    bb.calibrate(compiled, BATCHES)
    bb.calibrate(plain, BATCHES)
    assert_same(whole(model), whole(plain))
    assert torch.equal(compiled(X), plain(X))


def test_what_cannot_be_calibrated_is_said():
    with pytest.raises(BellboxError, match="call prepare first"):
        bb.calibrate(nn.Linear(4, 4), [X])
    with pytest.raises(BellboxError, match="a list of them"):
        bb.calibrate(network(RECIPES["bbq"]), X)
    with pytest.raises(BellboxError, match="no batch"):
        bb.calibrate(network(RECIPES["bbq"]), [])
    with pytest.raises(BellboxError, match=r"no batch has set the scale of 0\.input"):
        bb.calibrate(network(RECIPES["bbq"]), [torch.full_like(X, torch.nan)])
    half = bb.prepare(nn.ModuleDict({"used": nn.Linear(64, 8), "idle": nn.Linear(64, 8)}), RECIPES["bbq"])
    with pytest.warns(UserWarning, match=r"idle\.input"):
        bb.calibrate(half, [X], forward=lambda x: half["used"](x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bb.calibrate(bb.prepare(nn.Sequential(nn.Linear(64, 8)), bb.Recipe.of("rtn", bits=2)), [X])
