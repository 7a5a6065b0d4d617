"""What quantization adds to a training step: two transformer layers of the 95M shape, 2,048 tokens, eager.

    python benchmarks/step_time.py                    # 2 bits, the precision that is fast here, 2 threads
    python benchmarks/step_time.py --bits 4 --json step.json
    python benchmarks/step_time.py --accumulation 4   # the same tokens in 4 micro-batches
    python benchmarks/step_time.py --preset 300M      # layers of another shape

Contenders take turns in one process, so that a drift of the machine's speed meets all of them: the plain layers;
Bellbox with its forward on integers and on floats; and the textbook formula under autograd (rotation as a matrix
product, erf, straight-through by detach). Medians and quartiles over the rounds; a step is forward, backward and
AdamW. What a forward keeps for its backward is counted too (`saved_tensors_hooks`), parameters aside.

With several micro-batches in a step there is a contender more: the weights quantized once for all of them, as the
trainer does it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import bellbox as bb
from bellbox.core.grid import Levels
from bellbox.core.hadamard import block_size, hadamard_matrix
from bellbox.models import build, preset
from bellbox.nn import weights_quantized_once
from bellbox.utils.memory import Saved
from bellbox.utils.processor import fast_bf16

TOKENS, CONTEXT = 2048, 512


class PlainBBQ(nn.Module):
    """The formula of the method, written as one would read it."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        self.weight = layer.weight
        self.block = block_size(layer.in_features)
        self.levels = Levels.gaussian(2**bits)
        self.gamma_w = nn.Parameter(torch.full((layer.out_features, 1), 1.694 * layer.weight.std().item()))
        self.gamma_x = nn.Parameter(torch.tensor(1.694))
        self.register_buffer("matrix", hadamard_matrix(self.block) * self.block**-0.5)

    def quantize(self, x: Tensor, gamma: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = x.float()
            v = (x.unflatten(-1, (-1, self.block)) @ self.matrix).flatten(-2)
            v = v / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)
            u = self.levels.n * 0.5 * (1 + torch.erf(v * 0.5**0.5))
            code = u + (u.floor().clamp(0, self.levels.n - 1) - u).detach()
            scaled = gamma * x.numel() ** -0.5
            gamma = scaled + (gamma - scaled).detach()
            return gamma / (self.levels.n / 2) * (code - self.levels.offset)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.quantize(x, self.gamma_x), self.quantize(self.weight, self.gamma_w))


class Blocks(nn.Module):
    """Two layers of a preset, without embedding and head."""

    def __init__(self, name: str = "95M") -> None:
        super().__init__()
        self.whole = build(preset(name, num_hidden_layers=2, vocab_size=8), seed=0)
        self.config = self.whole.config

    def forward(self, x: Tensor) -> Tensor:
        body = self.whole.model
        for index, layer in enumerate(body.layers):
            x = layer(x, body.rotary_emb, None, index, False)
        return x


def plain(model: nn.Module, bits: int) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, PlainBBQ(child, bits))
    return model


def stepper(model: nn.Module, accumulation: int, once: bool) -> Callable[[], None]:
    width = model.config.hidden_size
    x = torch.randn(TOKENS // CONTEXT, CONTEXT, width, generator=torch.Generator().manual_seed(1))
    parts = x.chunk(accumulation)
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "layers" in n], lr=1e-6)

    def step() -> None:
        with weights_quantized_once(model) if once else nullcontext():
            for part in parts:
                with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
                    y = model(part)
                (y.float().square().mean() / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(model: nn.Module) -> int:
    """Of tensors that a forward keeps for its backward; parameters and the input aside."""
    x = torch.randn(TOKENS // CONTEXT, CONTEXT, model.config.hidden_size)
    own = (*model.parameters(), *model.buffers(), x)
    with Saved(own) as saved, torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        model(x)
    return saved.nbytes


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        return {k.strip(): v.strip() for k, v in lines.items()}.get("model name", platform.processor())
    except OSError:
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--preset", default="95M", help="whose layers (bellbox.models.preset)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--accumulation", type=int, default=1, choices=(1, 2, 4), help="micro-batches in a step"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of the process, for a machine that has other work; with --threads 1",
    )
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter

    def low_bit(integers: bool) -> nn.Module:
        return bb.prepare(Blocks(args.preset), bb.Recipe.bbq(args.bits, integer_forward=integers))

    models = {
        "no quantization": Blocks(args.preset),
        "Bellbox, on integers": low_bit(True),
        "Bellbox, on floats": low_bit(False),
        "plain formula, autograd": plain(Blocks(args.preset), args.bits),
    }
    once = "Bellbox, weights once"
    if args.accumulation > 1:
        models[once] = low_bit(True)
    steps = {name: stepper(model, args.accumulation, name == once) for name, model in models.items()}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(clock() - start)

    kept = {name: saved_bytes(model) / TOKENS / 2 for name, model in models.items()}

    print(
        f"{cpu_name()}, torch {torch.__version__}, {args.threads} threads, {args.bits} bits, {args.rounds} rounds, "
        f"{args.accumulation} micro-batches a step"
    )
    print(f"{'':28}{'median':>9} {'quartiles':>17} {'ratio':>6}   kept a token and layer")
    rows = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratio = statistics.median(t / b for t, b in zip(values, times["no quantization"], strict=True))
        share = kept[name] / kept["no quantization"]
        rows[name] = {
            "median_s": middle,
            "quartiles_s": [low, high],
            "ratio": ratio,
            "kept_bytes": kept[name],
        }
        spread = f"{low * 1e3:6.0f} to {high * 1e3:4.0f} ms"
        print(
            f"{name:28}{middle * 1e3:6.0f} ms {spread} {ratio:6.2f}   {kept[name] / 1e3:5.1f} kB, {share:.2f}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"cpu": cpu_name(), "bits": args.bits, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
