"""The page at /try, in a browser: the library as WebAssembly writes what Python writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from serving import Server, get

import bellbox as bb
from bellbox.data.tokenizer import Tokenizer
from bellbox.formats.auto import open_model
from bellbox.inference.generation import generate_text
from bellbox.models import build, preset
from bellbox.serve.trial import is_built
from chromium import Chromium

RUN = Path(__file__).parents[2] / "build" / "runtime" / "bellbox-run"
needs_build = pytest.mark.skipif(not is_built(), reason="no WebAssembly beside the page: make web")
AXE = Path(__file__).parents[2] / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
PROMPT = "Once upon a time"


def shown(browser: Chromium, part: str) -> str:
    return browser.value(f"document.getElementById('{part}').textContent")


def opened(browser: Chromium, url: str) -> None:
    """The page, with the model of its server open or refused."""
    browser.open(url)
    browser.wait("document.readyState == 'complete' && document.getElementById('status') != null", "the page")
    ended("is open|Refused|no packed model", browser)


def ended(words: str, browser: Chromium) -> None:
    parts = "document.getElementById('status').textContent + document.getElementById('error').textContent"
    browser.wait(f"/{words}/.test({parts})", words)


def filled(browser: Chromium, **fields: object) -> None:
    for name, value in fields.items():
        browser.value(f"document.getElementById('{name}').value = {str(value)!r}")
    browser.value("document.getElementById('go').click()")


def expected(folder: Path, tokens: int, **how: float) -> str:
    """What Python writes; bellbox-run writes the same, where it is built."""
    packed = open_model(folder)
    words = packed.load_tokenizer()
    pieces = generate_text(packed.model, words.backend, PROMPT, tokens, stop_token=words.end_of_text, **how)  # type: ignore[arg-type]
    text = PROMPT + "".join(pieces)
    if RUN.is_file():
        flags = [part for key, value in how.items() for part in ("--" + key.replace("_", "-"), str(value))]
        command = [RUN, folder, "--prompt", PROMPT, "--max-new-tokens", str(tokens), *flags]
        assert subprocess.run(command, capture_output=True, check=True).stdout.decode() == text + "\n"
    return text


def give(browser: Chromium, field: str, *paths: Path) -> None:
    """As a person chooses files."""
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector=f"#{field}")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])


@needs_build
@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 7}]
)
def test_the_text_is_that_of_python(
    browser: Chromium, server: Server, folder: Path, how: dict[str, float]
) -> None:
    opened(browser, f"{server.url}/try/")
    assert "llama, 2 blocks of 64" in shown(browser, "facts")
    filled(browser, prompt=PROMPT, tokens=60, **how)
    ended("tokens are written", browser)
    assert shown(browser, "text") == expected(folder, 60, **how)
    assert "tokens a second" in shown(browser, "figures")


@needs_build
def test_damaged_folders_are_refused_and_whole_ones_are_opened(
    browser: Chromium, server: Server, folder: Path, tmp_path: Path
) -> None:
    opened(browser, f"{server.url}/try/")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    give(browser, "files", *sorted(damaged.iterdir()))
    ended("checksum does not match", browser)
    message = (
        "Refused: model.safetensors: damaged, its size or checksum does not match; save the model again."
    )
    assert shown(browser, "error") == message

    give(browser, "files", damaged / "model.safetensors")
    ended("no config.json", browser)

    (damaged / "config.json").write_text("{")
    give(browser, "folder", damaged)
    ended("is no JSON", browser)
    filled(browser, prompt=PROMPT, tokens=10_000)  # the model that was open before
    ended("exceed the model.s context of 512", browser)

    give(browser, "folder", folder)
    ended(f"{folder.name} is open", browser)
    assert shown(browser, "error") == ""
    filled(browser, prompt="<img src=x onerror=alert(1)>", tokens=400)
    browser.value("document.getElementById('halt').click()")
    ended("Stopped after|tokens are written", browser)
    assert browser.value("document.images.length") == 0


@needs_build
def test_what_is_no_model_of_text_is_one_line(
    browser: Chromium, server: Server, folder: Path, tmp_path: Path
) -> None:
    opened(browser, f"{server.url}/try/")
    mute = tmp_path / "mute"
    shutil.copytree(folder, mute)
    (mute / "tokenizer.json").unlink()
    give(browser, "files", *sorted(mute.iterdir()))
    ended("there is no tokenizer.json; give the whole folder", browser)

    pictures = tmp_path / "pictures"
    shutil.copytree(folder, pictures)
    described = json.loads((pictures / "config.json").read_text(encoding="utf-8"))
    described["quantization_config"]["model"]["architecture"] = "vit"
    (pictures / "config.json").write_text(json.dumps(described), encoding="utf-8")
    give(browser, "folder", pictures)
    ended("a vit names what is on a picture", browser)
    assert "undefined" not in shown(browser, "card")


@needs_build
def test_once_it_is_there_it_needs_no_network(
    browser: Chromium, server: Server, folder: Path, tmp_path: Path
) -> None:
    """A folder with embeddings of 4 bits, given and read without a server."""
    small = tmp_path / "small"
    words = Tokenizer.load(folder / "tokenizer.json")
    shape = preset("tiny", vocab_size=words.vocab_size, max_position_embeddings=512, hidden_size=64)
    model = bb.prepare(build(shape, seed=2), bb.Recipe.bbq(1, embedding_bits=4)).eval()
    bb.calibrate(model, [torch.arange(64).view(4, 16)])
    bb.save(bb.convert(model), small)
    words.save(small / "tokenizer.json")
    opened(browser, f"{server.url}/try/")
    away = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.call("Network.enable")
    browser.call("Network.emulateNetworkConditions", offline=True, **away)
    try:
        give(browser, "folder", small)
        ended("small is open", browser)
        assert "4 bits in groups of 64" in shown(browser, "facts")
        filled(browser, prompt=PROMPT, tokens=40, temperature=0.0)
        ended("tokens are written", browser)
        assert shown(browser, "text") == expected(small, 40, temperature=0.0)
    finally:
        browser.call("Network.emulateNetworkConditions", offline=False, **away)


@needs_build
def test_it_fits_a_phone_and_calls_nobody(browser: Chromium, server: Server) -> None:
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True
    )
    try:
        opened(browser, f"{server.url}/try/")
        filled(browser, prompt="x" * 200, tokens=5)
        ended("tokens are written", browser)
        assert browser.value("document.documentElement.scrollWidth") <= 360
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")
    names = "performance.getEntriesByType('resource').map((each) => each.name)"
    assert all(name.startswith(f"{server.url}/try/") for name in browser.value(names))


@needs_build
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Chromium, server: Server, scheme: str) -> None:
    """Contrast, labels, names of buttons."""
    if not AXE.is_file():
        pytest.skip("axe-core is not here: make axe")
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    opened(browser, f"{server.url}/try/")
    filled(browser, prompt=PROMPT, tokens=0)  # not valid, so nothing begins
    filled(browser, prompt=PROMPT, tokens=5)
    ended("tokens are written", browser)
    give(browser, "files", AXE)
    ended("no config.json", browser)
    browser.call("Runtime.evaluate", expression=AXE.read_text(encoding="utf-8"))
    ask = """axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'best-practice']}).then(found => found.violations.map(
        each => ({rule: each.id, where: each.nodes.map(node => node.html.slice(0, 200))})))"""
    answer = browser.call("Runtime.evaluate", expression=ask, awaitPromise=True, returnByValue=True)
    assert answer["result"]["value"] == []


@needs_build
def test_a_folder_is_dropped(browser: Chromium, server: Server, folder: Path) -> None:
    opened(browser, f"{server.url}/try/")
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.call("Input.dispatchDragEvent", type=kind, x=100, y=300, data=data)
    ended(f"{folder.name} is open", browser)


@needs_build
def test_what_is_served_at_try(server: Server, folder: Path) -> None:
    for name, kind in (
        ("", "text/html"),
        ("worker.js", "text/javascript"),
        ("bellbox.wasm", "application/wasm"),
    ):
        status, headers, _ = get(server, f"/try/{name}")
        assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe-eval" not in headers["content-security-policy"].replace("'wasm-unsafe-eval'", "")
    assert get(server, "/try")[0] == 307
    assert get(server, "/try/model/model.safetensors")[2] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "model/x",
        "model/..%2Fconfig.json",
        "model/../../../etc/passwd",
        "model/%2Fetc%2Fpasswd",
        "..%2Fapp.py",
        "trial.py",
    ],
)
def test_nothing_else_is_reached(server: Server, path: str) -> None:
    status, _, body = get(server, f"/try/{path}")
    assert status == 404
    assert b"no such" in body or b"there is no" in body or b"not built" in body


def test_a_key_covers_the_model_and_not_the_page(serve: Callable[..., Server], folder: Path) -> None:
    server = serve(folder, BELLBOX_API_KEY="12345678")
    assert get(server, "/try/model/config.json")[0] == 401
    status, _, body = get(server, "/try/model/config.json", authorization="Bearer 12345678")
    assert (status, body) == (200, (folder / "config.json").read_bytes())
    assert get(server, "/try/")[0] == (200 if is_built() else 404)
    line = next(line for line in server.said if "/try" in line)
    assert ("in the browser itself" in line) == is_built()
