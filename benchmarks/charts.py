"""The peers' figures as Markdown tables and bar charts: benchmarks/peers/results/*.json -> docs/peers-*.svg.

python benchmarks/charts.py            # prints the tables, writes the pictures
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

plt.rcParams["svg.fonttype"] = "none"  # text stays text
plt.rcParams["svg.hashsalt"] = "bellbox"  # the same figures give the same bytes

ROOT = Path(__file__).resolve().parent.parent
OURS, BASE, OTHERS = "#0072b2", "#7f7f7f", "#e69f00"

Key = tuple[int, int, int, int]


def read(pattern: str) -> list[dict[str, Any]]:
    paths = sorted((ROOT / "benchmarks/peers/results").glob(pattern))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def layers() -> dict[Key, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """(outputs, inputs, rows, threads) -> results and machine."""
    found: dict[Key, tuple[list[dict[str, Any]], dict[str, Any]]] = {}
    for run in read("layers-*.json"):
        for result in run["results"]:
            key = result["outputs"], result["inputs"], result["rows"], run["machine"]["threads"]
            found.setdefault(key, ([], run["machine"]))[0].append(result)
    return found


def colour(name: str) -> str:
    if name.startswith(("Bellbox", "1 bit", "2 bits", "3 bits", "4 bits")):
        return OURS
    return BASE if name in ("fp32", "bf16", "torch fp32", "torch bf16") else OTHERS


def bars(target: Path, panels: list[tuple[str, list[tuple[str, float, float, float]]]], label: str) -> None:
    """Horizontal bars with quartiles, one panel a table: (name, value, low, high)."""
    heights = [len(rows) for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(8, 0.24 * sum(heights) + 0.9 * len(panels)),
        height_ratios=heights,
        squeeze=False,
    )
    for (title, rows), axis in zip(panels, axes[:, 0], strict=True):
        rows = sorted(rows, key=lambda row: row[1])
        names, values = [row[0] for row in rows], [row[1] for row in rows]
        errors = [[row[1] - row[2] for row in rows], [row[3] - row[1] for row in rows]]
        axis.barh(
            names, values, xerr=errors, color=[colour(name) for name in names], error_kw={"linewidth": 0.8}
        )
        axis.set_title(title, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        for place, row in enumerate(rows):
            axis.annotate(f" {row[1]:.3g}", (row[3], place), va="center", fontsize=7, annotation_clip=False)
    axes[-1, 0].set_xlabel(label, fontsize=8)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def layer_table(key: Key, results: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    outputs, inputs, rows, threads = key
    base = next(r["seconds"]["median"] for r in results if r["name"] == "torch bf16")
    print(
        f"\n{outputs} x {inputs}, {rows} rows, {threads} threads; reads {machine['read_bandwidth'] / 1e9:.0f} GB/s"
    )
    print("| | us (quartiles) | x bf16 | of reading | of integers |\n|---|---|---|---|---|")
    for r in sorted(results, key=lambda r: r["seconds"]["median"]):
        s = r["seconds"]
        print(
            f"| {r['name']} | {s['median'] * 1e6:,.0f} ({s['low'] * 1e6:,.0f} to {s['high'] * 1e6:,.0f}) | "
            f"{base / s['median']:.2f} | {r['read_fraction']:.0%} | {r['integer_fraction'] or 0:.0%} |"
        )


def main() -> None:
    panels = []
    for key, (results, machine) in sorted(layers().items()):
        layer_table(key, results, machine)
        base = next(r["seconds"]["median"] for r in results if r["name"] == "torch bf16")
        if key[3] == 1 and key[:2] in ((4096, 4096), (640, 640)) and key[2] in (1, 256):
            rows = [
                (r["name"], *(base / r["seconds"][at] for at in ("median", "high", "low"))) for r in results
            ]
            panels.append((f"{key[0]} x {key[1]}, {key[2]} row{'s' if key[2] > 1 else ''}, one thread", rows))
    bars(ROOT / "docs/peers-layers.svg", panels, "times torch bf16 (longer is faster; lines: quartiles)")
    panels = []
    for run in read("models-*.json"):
        threads, name = run["machine"]["threads"], run["preset"]
        print(f"\n{name}, {threads} threads; reads {run['machine']['read_bandwidth'] / 1e9:.0f} GB/s")
        print("| | decode, tokens/s (quartiles) | prefill, tokens/s (quartiles) |\n|---|---|---|")
        rows = []
        for r in sorted(run["results"], key=lambda r: r["decode"]["median"]):
            d, p, prompt = r["decode"], r["prefill"], r["prompt"]
            print(
                f"| {r['name']} | {1 / d['median']:.0f} ({1 / d['high']:.0f} to {1 / d['low']:.0f}) | "
                f"{prompt / p['median']:,.0f} ({prompt / p['high']:,.0f} to {prompt / p['low']:,.0f}) |"
            )
            rows.append((r["name"], 1 / d["median"], 1 / d["high"], 1 / d["low"]))
        if threads == 1:
            panels.append((f"LLaMA {name}, decode, one thread", rows))
    bars(ROOT / "docs/peers-models.svg", panels, "tokens a second (lines: quartiles)")


if __name__ == "__main__":
    main()
