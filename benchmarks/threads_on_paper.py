"""How one decode step is split among threads, on paper: regions, teams, and the share of the busiest thread.

python benchmarks/threads_on_paper.py

The rules are those of native/layers/layer.h and block.h, whose constants are read from there. A region ends where its
slowest thread does, so *busy* is the work of a region over its team times the largest share: 100 % where nobody waits.
It says nothing of what starting a region costs, nor of memory that all of them read from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bellbox.models import LlamaConfig, preset

LAYERS = Path(__file__).parents[1] / "native" / "layers" / "layer.h"
TILE = 16  # rows of a weight that one thread takes at least


def constant(name: str) -> int:
    """A power of two of the header.

    Raises:
        LookupError: it is not there.
    """
    found = re.search(rf"constexpr int64_t {name} = 1 << (\d+);", LAYERS.read_text(encoding="utf-8"))
    if found is None:
        raise LookupError(f"{LAYERS}: no {name}")
    return 1 << int(found[1])


@dataclass(frozen=True)
class Region:
    """One parallel region of a step."""

    name: str
    team: int
    work: float
    """Multiply-adds."""
    parts: int
    """Pieces that threads take whole."""

    @property
    def time(self) -> float:
        """Multiply-adds of the busiest thread."""
        return self.work * -(-self.parts // self.team) / self.parts


def regions(config: LlamaConfig, threads: int, tokens: int) -> list[Region]:
    """Of one token after so many, through a LLaMA of packed layers and a rounded head."""
    grain, attend = constant("kLinearGrain"), constant("kAttendGrain")
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_size
    keys = config.key_value_heads * head

    def linear(name: str, outputs: int, inputs: int, matrices: int = 1) -> Region:
        work = outputs * inputs * matrices
        parts = -(-outputs // TILE) * matrices
        return Region(name, max(1, min(threads, work // grain, parts)), work, parts)

    cached = config.num_attention_heads * head * tokens
    heads = config.key_value_heads
    block = [
        linear("q, k, v", hidden + 2 * keys, hidden),
        Region("attention", max(1, min(threads, heads, cached // attend)), 2 * cached, heads),
        linear("output", hidden, hidden),
        linear("gate, up", inner, hidden, 2),
        linear("down", hidden, inner),
    ]
    work, rows = config.vocab_size * hidden, config.vocab_size
    return block * config.num_hidden_layers + [
        Region("head", max(1, min(threads, work // grain)), work, rows)
    ]


def models() -> dict[str, LlamaConfig]:
    """Those of the table."""
    seven = LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=8192,
    )
    named = {name: preset(name, vocab_size=32_000) for name in ("95M", "300M")}
    return {**{name: each for name, each in named.items() if isinstance(each, LlamaConfig)}, "7B": seven}


def gain(config: LlamaConfig, threads: int, tokens: int = 512) -> float:
    """How many times as fast a step is as on one thread, were memory no limit and regions free."""
    alone, together = (sum(each.time for each in regions(config, n, tokens)) for n in (1, threads))
    return alone / together


def main() -> None:
    """Print the table."""
    print(
        "| | threads | regions a token | largest team | of one thread's work | busy |\n|---|---|---|---|---|---|"
    )
    for name, config in models().items():
        for threads in (2, 8, 64):
            found = regions(config, threads, 512)
            busy = sum(each.work for each in found) / sum(each.time * each.team for each in found)
            shared = sum(each.team > 1 for each in found)
            print(
                f"| {name} | {threads} | {shared} of {len(found)} | {max(each.team for each in found)} | "
                f"1/{gain(config, threads):.1f} | {busy:.0%} |"
            )


if __name__ == "__main__":
    main()
