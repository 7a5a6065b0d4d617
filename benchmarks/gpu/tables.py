"""What was measured, as Markdown and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import bellbox as bb
from bellbox.benchmark.profile import CLASSES


def tables(out: Path) -> str:
    """The last lines of each part as Markdown."""
    rows: dict[str, dict[str, dict[str, object]]] = {}
    for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        part = row.pop("part")
        if part == "finished":
            continue
        named = {
            k: v for k, v in row.items() if not isinstance(v, float) and k not in ("peak_bytes", "different")
        }
        rows.setdefault(part, {})[json.dumps(named, sort_keys=True)] = row
    text = ""
    for part, found in rows.items():
        heads = list(dict.fromkeys(key for row in found.values() for key in row))
        text += f"\n## {part}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
        for row in found.values():
            cells = (
                f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.get(key, "") for key in heads)
            )
            text += f"| {' | '.join(cells)} |\n"
    return text.lstrip()


def pictures(out: Path) -> None:
    """Bars of prefill by class, where matplotlib is there."""
    try:
        from bellbox.report.profile import profile_picture
        from bellbox.report.sheet import standalone

        rows = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        models = dict.fromkeys(row["model"] for row in rows if row["part"] == "prefill")
        for model in models:
            bars = {
                row["name"]: [row[f"{each} (ms)"] for each in CLASSES]
                for row in rows
                if row["part"] == "prefill" and row["model"] == model
            }
            svg = standalone(profile_picture(bars, CLASSES, f"{model}: a prompt of 64 x 512 tokens"))
            (out / f"prefill-{model}.svg").write_text(svg, encoding="utf-8")
    except bb.BellboxError as error:
        print(f"no pictures: {error}")
