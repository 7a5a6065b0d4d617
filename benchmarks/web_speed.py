"""Tokens a second of a packed folder in headless Chromium, beside bellbox-run on the same machine, in turns.

python benchmarks/web_speed.py demo/packed
python benchmarks/web_speed.py demo/packed --rounds 9 --tokens 200

It needs `make web`, a Chromium, and for the rows beside it `make runtime`.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import re
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import native_run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from chromium import BROWSER, Chromium  # noqa: E402  (of the tests)

PROMPT = "Once upon a time"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


def page_of(folder: Path, place: Path) -> None:
    """The page with the model beside it, as any server of files may have it."""
    page = ROOT / "build" / "web" / "page"
    if not (page / "bellbox.wasm").is_file():
        raise SystemExit(f"no {page}: make web")
    if BROWSER is None:
        raise SystemExit("no Chromium on the path")
    shutil.copytree(page, place)
    shutil.copytree(folder, place / "model")


def in_browser(browser: Chromium, tokens: int, seed: int) -> dict[str, float]:
    """One text: tokens a second of its decoding, milliseconds to its first token, megabytes."""
    for name, value in (("prompt", PROMPT), ("tokens", tokens), ("temperature", 1), ("seed", seed)):
        browser.value(f"document.getElementById('{name}').value = {str(value)!r}")
    browser.value("document.getElementById('go').click()")
    said = "document.getElementById('status').textContent + document.getElementById('error').textContent"
    browser.wait(f"!document.getElementById('go').disabled && /written|Refused/.test({said})", "a text")
    if "Refused" in browser.value(said):
        raise SystemExit(browser.value(said))
    figures = browser.value("document.getElementById('figures').textContent")
    found = {name: re.search(f"{name}([0-9.,]+)", figures) for name in ("first token after", "memory")}
    numbers = {name: float(match[1].replace(",", "")) for name, match in found.items() if match}
    return {"decode": float(browser.value("document.getElementById('figures').dataset.rate")), **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=200)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        page_of(asked.folder, Path(place, "page"))
        handler = functools.partial(Quiet, directory=str(Path(place, "page")))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = Chromium(Path(place, "profile"))
        try:
            browser.open(f"http://127.0.0.1:{server.server_port}/index.html")
            browser.wait("document.getElementById('go')?.disabled === false", "the model")
            kernels = browser.value(
                "/kernels(\\w+)checked/.exec(document.getElementById('facts').textContent)[1]"
            )
            compare(asked, functools.partial(in_browser, browser), kernels)
        finally:
            browser.close()
            server.shutdown()


def compare(asked: argparse.Namespace, browse: Callable[[int, int], dict[str, float]], kernels: str) -> None:
    native = ("portable", "") if native_run.PROGRAM.is_file() else ()
    texts: list[dict[str, float]] = []
    rates: dict[str, list[float]] = {each: [] for each in native}
    browse(asked.tokens, 0)  # the compiler of the browser has seen it all
    for seed in range(asked.rounds):
        texts.append(browse(asked.tokens, seed))
        for each in native:
            run = native_run.bench(asked.folder, PROMPT, asked.tokens, seed=seed, kernels=each)
            rates[each].append(float(run["decode_tokens_per_second"]))

    def row(name: str, values: list[float], unit: str) -> float:
        middle = statistics.median(values)
        print(f"{name:<44} {middle:10.1f} {unit}  ({min(values):.1f} to {max(values):.1f})")
        return middle

    print(f"{asked.rounds} texts of at most {asked.tokens} tokens, medians; from the least to the most")
    here = row(f"Chromium, {kernels} kernels, decoding", [each["decode"] for each in texts], "tokens/s")
    row("Chromium, first token after", [each["first token after"] for each in texts], "ms")
    row("Chromium, memory of the library", [each["memory"] for each in texts], "MB")
    for each in native:
        rate = row(f"bellbox-run, {each or 'best'} kernels, decoding", rates[each], "tokens/s")
        print(f"{'  of which the browser has':<44} {here / rate:10.2f}")


if __name__ == "__main__":
    main()
