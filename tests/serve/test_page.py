"""The page at /, in a browser."""

from __future__ import annotations

import re
from pathlib import Path

from serving import Server, get, metric

import waiting
from bellbox.formats.auto import open_model
from bellbox.inference.generation import generate_text
from chromium import Chromium


def test_it_loads_nothing_from_elsewhere(server: Server) -> None:
    status, headers, page = get(server, "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    script = get(server, "/page.js")
    assert script[1]["content-type"].startswith("text/javascript")
    for text in (page, script[2]):
        assert not re.search(rb"https?://|//[a-z]+\.", text)


def filled(browser: Chromium, server: Server, **fields: object) -> None:
    """The page, with values in its fields, and the button pressed."""
    browser.open(f"{server.url}/?{abs(hash(str(fields)))}")
    browser.wait(
        f"document.readyState == 'complete' && at('model').textContent == '{server.name}'", "the page"
    )
    for name, value in fields.items():
        browser.value(f"at('{name}').value = {str(value)!r}")
    browser.value("at('go').click()")


def test_a_text_streams_in(browser: Chromium, server: Server, folder: Path) -> None:
    opened = open_model(folder)
    tokenizer = opened.load_tokenizer()
    stop = tokenizer.end_of_text
    text = "".join(
        generate_text(opened.model, tokenizer.backend, "Once", 60, temperature=0.7, seed=4, stop_token=stop)
    )
    filled(browser, server, prompt="Once", max_tokens=60, temperature=0.7, seed=4)
    browser.wait("at('status').textContent.includes('ended by')", "the text")
    assert browser.value("at('text').textContent") == "Once" + text
    assert browser.value("at('error').textContent") == ""


def test_markup_in_a_text_stays_text(browser: Chromium, server: Server) -> None:
    prompt = "<img src=x onerror=alert(1)>"
    filled(browser, server, prompt=prompt, max_tokens=3)
    browser.wait("at('status').textContent.includes('ended by')", "the text")
    assert browser.value("at('text').textContent").startswith(prompt)
    assert browser.value("document.images.length") == 0


def test_what_is_refused_is_shown(browser: Chromium, server: Server) -> None:
    filled(browser, server, prompt="Once", max_tokens=100_000)
    browser.wait("at('error').textContent != ''", "the error")
    assert "are more than the 512 that are served" in browser.value("at('error').textContent")
    assert browser.value("at('go').disabled") is False


def test_a_text_can_be_stopped(browser: Chromium, server: Server) -> None:
    cancelled = metric(server, "bellbox_cancelled_total")
    filled(browser, server, prompt="Once", max_tokens=500)
    browser.value("at('halt').click()")
    browser.wait("at('status').textContent != ''", "the end")
    if browser.value("at('status').textContent") == "stopped":  # it may have been through
        free = "the slot to be free"
        waiting.wait_for(lambda: metric(server, "bellbox_running") == 0, free, server.process.pid)
        assert metric(server, "bellbox_cancelled_total") >= cancelled
