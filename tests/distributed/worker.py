"""One of several processes that do what tests ask for; started once, since a process takes seconds to import torch.

    python worker.py RANK        reads lines of JSON from stdin: {"job", "size", "store", ...}; answers `ok RESULT`, or
                                 `error CLASS MESSAGE` with a traceback on standard error

A job of `size` processes is one process group of the first `size` workers.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import bellbox as bb
from bellbox.core.sharded import local, whole
from bellbox.nn import quantized_layers
from bellbox.runs.config_file import config_from_dict
from bellbox.training import Trainer
from bellbox.training.distributed.parallel import bytes_held

JOBS: dict[str, Callable[..., Any]] = {}


def job(function: Callable[..., Any]) -> Callable[..., Any]:
    JOBS[function.__name__] = function
    return function


@job
def train(config: dict[str, Any], crash_after: int | None = None) -> dict[str, Any]:
    """A run, and what a process holds of it; with `crash_after`, left after so many steps as a kill would leave it."""
    trainer = Trainer(config_from_dict(config), show=False)
    if crash_after is not None:
        step = trainer._train_step

        def one() -> None:
            if trainer.state.step == crash_after:
                raise KeyboardInterrupt
            step()

        trainer._train_step = one
        try:
            trainer.run()
        except KeyboardInterrupt:
            return {}
    result = trainer.run()
    states = (t for part in trainer.optimizer.parts for s in part.state.values() for t in s.values())
    parameters = list(trainer.model.parameters())
    return {
        "step": result.step,
        "bytes": bytes_held(iter([*parameters, *states]))
        + sum(local(p).numel() * p.element_size() for p in parameters),  # and as much of gradients
        "synchronised": _largest_difference(trainer.model),
    }


@job
def own_ddp(calibrated: bool) -> dict[str, Any]:
    """A user's own loop under DDP, each process with data of its own."""
    torch.manual_seed(0)
    model = bb.prepare(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)), bb.Recipe.bbq(bits=2))
    torch.manual_seed(1)
    x = (torch.randn(64, 64) * torch.linspace(0.2, 5, 64)[:, None])[dist.get_rank() :: dist.get_world_size()]
    if calibrated:
        bb.calibrate(model, [x])
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    return {"synchronised": _largest_difference(model)}


@job
def own_fsdp(method: str, options: dict[str, Any], ball: bool) -> dict[str, Any]:
    """A user's own loop under FSDP2 over layers of 10 and 20 rows: codes, and whether processes agree."""
    model, data = small(method, options)
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = data[rank::size]
    bb.calibrate(model, [data[rank::size]])
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    run(model, mine, ball)
    return {"codes": codes_of(model), "synchronised": _largest_difference(model)}


@job
def same_batch(config: dict[str, Any]) -> list[list[int]]:
    """The tokens of this process in each of three steps."""
    trainer = Trainer(config_from_dict(config), show=False)
    return [
        torch.cat([x for x, _ in trainer.task.micro_batches(step)]).flatten().tolist() for step in range(3)
    ]


@job
def titan(method: str, options: dict[str, Any], tensor_parallel: int = 1) -> dict[str, Any]:
    """torchtitan's debug model, built and filled as its trainer does it, and sharded as its `apply_fsdp` does."""
    from torch.distributed.fsdp import fully_shard
    from torchtitan.models.llama3 import model_registry  # pyright: ignore[reportMissingImports]

    from bellbox.interop.torchtitan import LowBitConverter

    wanted = LowBitConverter.Config(method=method, bits=2, options=options)
    config = model_registry("debugmodel", converters=[wanted]).model
    if tensor_parallel > 1:
        config.update_from_config(config=SimpleNamespace(parallelism=SimpleNamespace(
            tensor_parallel_degree=tensor_parallel)))  # fmt: skip
    with torch.device("meta"):
        model = config.build()
    model.verify_module_protocol()
    for block in model.layers.values():
        block.attention.inner_attention = _Attention()
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))
    tokens = torch.randint(0, 1000, (2, 33), generator=torch.Generator().manual_seed(dist.get_rank()))
    positions = torch.arange(32)[None].expand(2, -1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(4):
        logits = model(tokens[:, :-1], positions=positions)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    _, layer = next(iter(quantized_layers(model)))
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    codes = quantizer.codes(whole(layer.stored_weight.detach()))
    used = codes.flatten().bincount(minlength=4).double() / codes.numel()
    return {
        "quantized": len(list(quantized_layers(model))),
        "losses": losses,
        "synchronised": _largest_difference(model),
        "alike": bool((used - 0.25).abs().max() < 0.05),
    }


class _Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        heads = (each.transpose(1, 2) for each in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2)


def small(method: str, options: dict[str, Any]) -> tuple[nn.Sequential, torch.Tensor]:
    """A prepared network whose layers have 10 and 20 rows, and data for it."""
    torch.manual_seed(0)
    layers = nn.Linear(16, 10), nn.GELU(), nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 10)
    model = bb.prepare(nn.Sequential(*layers), bb.Recipe.of(method, **options))
    return model, torch.randn(36, 16, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: torch.Tensor, ball: bool) -> None:
    """Five steps of a loop as users write it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if ball:
        optimizer = bb.optim.hyperball(optimizer, model, lr=0.02, every=2)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        bb.optim.refit_codebooks(model)


def codes_of(model: nn.Module) -> dict[str, list[int]]:
    """Codes of all weights, of whole tensors wherever they lie."""
    found: dict[str, list[int]] = {}
    plain = {name: whole(p.detach()) for name, p in model.named_parameters()}
    for name, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        alone = copy.deepcopy(quantizer) if not any(True for _ in quantizer.parameters()) else None
        weight = plain[f"{name}.weight"]
        if alone is None:
            alone = type(quantizer)(quantizer.features, quantizer.spec, quantizer.rows)
            own = alone.own_scales()  # pyright: ignore[reportAttributeAccessIssue]
            given = {**dict(quantizer.named_parameters()), **dict(quantizer.named_buffers())}
            with torch.no_grad():
                for key, scale in own.items():
                    scale.copy_(whole(given[key].detach()))
        found[name] = alone.codes(weight).flatten().tolist()
    return found


def _largest_difference(model: nn.Module) -> float:
    """Between the parameters and buffers of this process and those of the first."""
    worst = 0.0
    for tensor in (*model.parameters(), *model.buffers()):
        mine = whole(tensor.detach()).double().clone()
        first = mine.clone()
        dist.broadcast(first, 0)
        worst = max(worst, float((mine - first).abs().nan_to_num(9.0).max()) if mine.numel() else 0.0)
    return worst


def main() -> None:
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        order = json.loads(line)
        name, size, store = order.pop("job"), order.pop("size"), order.pop("store")
        os.environ["LOCAL_WORLD_SIZE"] = str(order.pop("per_node", size))
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        try:
            print("ok", json.dumps(JOBS[name](**order)), flush=True)
        except Exception as error:
            traceback.print_exc()
            print("error", type(error).__name__, error, flush=True)
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
