"""Tests work on small tensors: waking a second thread for them costs more than it brings, and where the machine
has other work, many times more. Processes that tests start decide for themselves.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chromium import BROWSER, Chromium

torch.set_num_threads(1)

# Who starts the tests in the background may have them ignore Ctrl-C, and the processes that they start with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Folders whose files take long go first (`--no-loadscope-reorder` keeps the order), or one worker ends alone with them.
LONG = ("distributed", "reliability", "comparison", "interop", "site", "training", "data", "ptq", "cli", "nn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; tests that are marked slow run where they are asked for (`make test-slow`)."""
    place = {name: number for number, name in enumerate(LONG)}
    root = Path(__file__).parent
    items.sort(key=lambda item: place.get(os.path.relpath(item.path, root).split(os.sep)[0], len(LONG)))
    if os.environ.get("BELLBOX_SLOW") != "1":
        skip = pytest.mark.skip(reason="slow: make test-slow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A headless Chromium for the tests of one file."""
    if BROWSER is None:
        pytest.skip("Chromium is not installed")
    opened = Chromium(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
