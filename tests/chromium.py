"""Headless Chromium, driven by its own protocol over a pair of pipes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import waiting

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """A browser with one page.

    Args:
        profile: a folder for what it keeps.
    """

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # 3 and 4 are what it reads and writes; from where they cannot be in each other's way.
        theirs_in, theirs_out = (fcntl.fcntl(each, fcntl.F_DUPFD, 50) for each in (theirs_in, theirs_out))

        def place() -> None:
            os.dup2(theirs_in, 3)
            os.dup2(theirs_out, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            [BROWSER, *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (theirs_in, theirs_out):
            os.close(each)
        os.set_blocking(self._from, False)
        self._held, self._last, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> Any:
        """One command and its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        found: list[Any] = []

        def answered() -> bool:
            for answer in self._messages():
                if answer.get("id") == self._last:
                    assert "error" not in answer, answer
                    found.append(answer["result"])
            return bool(found)

        waiting.wait_for(answered, method, self.process.pid)
        return found[0]

    def _messages(self) -> list[Any]:
        try:
            self._held += os.read(self._from, 1 << 20)
        except BlockingIOError:
            return []
        *whole, self._held = self._held.split(b"\0")
        return [json.loads(each) for each in whole]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Of JavaScript on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, what: str) -> None:
        """Until an expression is true."""
        waiting.wait_for(lambda: bool(self.value(expression)), what, self.process.pid, pause=0.05)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)
