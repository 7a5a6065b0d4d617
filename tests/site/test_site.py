"""The documentation site: built strictly, without dead links, and looked at in a browser by axe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from chromium import Chromium

ROOT = Path(__file__).resolve().parents[2]
AXE = ROOT / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
WIDTHS = {"phone": 390, "desk": 1440}
PAGES = (
    "index.html",
    "playground.html",
    "glossary.html",
    "explanation/bbq.html",
    "tutorials/train.html",
    "reference/library.html",
    "performance.html",
)

for package in ("sphinx", "furo", "myst_parser"):
    pytest.importorskip(package, reason="the extra docs: pip install 'bellbox[docs]'")


class Page(HTMLParser):
    """What a page of HTML refers to, and what may be referred to on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value for key, value in attrs if value is not None}
        self.names.update(given[key] for key in ("id", "name") if key in given)
        self.targets += [given[key] for key in ("href", "src") if key in given]
        if tag in ("script", "img", "link"):
            self.loaded += [given[key] for key in ("href", "src") if key in given]


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    words = ["-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(source), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site; building it without a warning is a test by itself."""
    out = tmp_path_factory.mktemp("site")
    built = build(ROOT / "docs", out)
    assert built.returncode == 0, built.stderr
    return out


def dead_links(folder: Path) -> list[str]:
    """Links within a site that lead nowhere."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in folder.rglob("*.html")}
    dead = []
    for file, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            where = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            there = where in pages or where.exists()
            if not there or (parts.fragment and where in pages and parts.fragment not in pages[where].names):
                dead.append(f"{file.relative_to(folder)}: {target}")
    return dead


def test_no_link_is_dead(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 20
    # Furo's own search and index pages name a place of the page that they do not have.
    assert [
        each for each in dead_links(site) if not each.startswith(("genindex", "py-modindex", "search"))
    ] == []


def test_a_dead_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<a href='b.html#there'>b</a><a href='c.html'>c</a><a href='b.html#no'>b</a>"
    )
    (tmp_path / "b.html").write_text("<p id='there'></p>")
    assert dead_links(tmp_path) == ["a.html: c.html", "a.html: b.html#no"]


def test_a_page_that_is_not_there_fails_the_build(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    (source / "_static").mkdir()
    (source / "index.md").write_text("# A page\n\n[nowhere](nowhere.md)\n")
    built = build(source, tmp_path / "out")
    assert built.returncode != 0
    assert "nowhere" in built.stderr


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        for target in Page(file.read_text(encoding="utf-8")).loaded:
            assert not urlsplit(target).netloc, f"{file.name}: {target}"


def test_the_pictures_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import explain

    explain.main(tmp_path)
    for made in tmp_path.glob("*.svg"):
        kept = (ROOT / "docs" / "figures" / made.name).read_text(encoding="utf-8")
        words = re.findall(r"<text[^>]*>(.*?)</text>", made.read_text(encoding="utf-8"))
        assert words == re.findall(r"<text[^>]*>(.*?)</text>", kept), made.name
        assert len(words) > 5
    assert len(list(tmp_path.glob("*.svg"))) == len(list((ROOT / "docs" / "figures").glob("*.svg")))


def show(browser: Chromium, page: Path, width: int) -> None:
    """A page of the site, whole."""
    mobile = width < 600
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile
    )
    browser.open(page.as_uri())
    browser.wait(
        f"document.readyState == 'complete' && location.href == {json.dumps(page.as_uri())}", str(page)
    )


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_pages_fit_their_width(browser: Chromium, site: Path, width: int) -> None:
    for name in PAGES:
        show(browser, site / name, width)
        wide = browser.value("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} wide on {width}"


@pytest.mark.parametrize(("width", "scheme"), [("phone", "light"), ("desk", "dark")])
def test_axe_finds_nothing(browser: Chromium, site: Path, width: str, scheme: str) -> None:
    """Contrast, alternative text, labels, names of links."""
    if not AXE.is_file():
        pytest.skip("axe-core is not here: make axe")
    source = AXE.read_text(encoding="utf-8")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for name in PAGES:
        show(browser, site / name, WIDTHS[width])
        browser.call("Runtime.evaluate", expression=source)
        found = violations(browser)
        assert found == [], f"{name}, {width}, {scheme}"


def violations(browser: Chromium) -> list[dict[str, Any]]:
    """What axe says against the page, in short."""
    ask = """axe.run(document, {runOnly: ['wcag2a', 'wcag2aa']}).then(found => found.violations.map(each =>
        ({rule: each.id, where: each.nodes.slice(0, 3).map(node => node.html.slice(0, 200))})))"""
    answer = browser.call("Runtime.evaluate", expression=ask, awaitPromise=True, returnByValue=True)
    return answer["result"]["value"]


def test_axe_would_find_a_picture_without_text(browser: Chromium, site: Path) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not here: make axe")
    show(browser, site / "index.html", WIDTHS["desk"])
    browser.value("document.querySelector('article').append(new Image(10, 10))")
    browser.call("Runtime.evaluate", expression=AXE.read_text(encoding="utf-8"))
    assert "image-alt" in [each["rule"] for each in violations(browser)]


def test_the_playground_plays(browser: Chromium, site: Path) -> None:
    show(browser, site / "playground.html", WIDTHS["phone"])

    def after(**fields: object) -> str:
        for name, value in fields.items():
            browser.value(f"at('play-{name}').value = {json.dumps(value)}")
        browser.value("draw()")
        return browser.value("at('play-says').textContent")

    assert after().startswith("A code carries 2.000 of 2.000 bits.")
    assert after(method="grid").startswith("A code carries 1.90")
    assert after(n=16, method="bbq").startswith("A code carries 4.000 of 4.000 bits.")
    alike = float(after(n=4, spread=15, scale="token").split()[3])
    apart = float(after(scale="tensor").split()[3])
    assert alike == 2
    assert apart < 1.95
    assert browser.value("at('play-bell').querySelectorAll('line').length") == 3
