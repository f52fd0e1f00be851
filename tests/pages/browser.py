"""A headless Chromium, driven over its debugging pipe: no driver program, no port, no package."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_PIPES_ABOVE = 10
"""Chromium reads commands from descriptor 3 and answers on 4; ours are moved out of the way of these."""


class Browser:
    """One tab. Every call waits for its answer, `timeout_s` at most."""

    def __init__(self, commands: int, answers: int, *, timeout_s: float = 60) -> None:
        self._commands = commands
        self._answers = answers
        self._timeout_s = timeout_s
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        number = self._number
        answer = self._until(lambda said: said.get("id") == number)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def show(self, url: str, *, width: int, scheme: str) -> None:
        """Open a page in a window of that width, in `light` or `dark`; returns once it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.requests.clear()
        self.call("Page.navigate", url=url)
        self._until(lambda said: said.get("method") == "Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, a promise's outcome included."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> str:
        """The whole page as PNG, in base64."""
        return str(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])

    def _until(self, wanted: Any) -> dict[str, Any]:
        ends = time.monotonic() + self._timeout_s
        while True:
            while b"\0" in self._rest:
                line, _, self._rest = self._rest.partition(b"\0")
                said: dict[str, Any] = json.loads(line)
                if said.get("method") == "Network.requestWillBeSent":
                    self.requests.append(said["params"]["request"]["url"])
                if wanted(said):
                    return said
            ready, _, _ = select.select([self._answers], [], [], max(0.0, ends - time.monotonic()))
            assert ready, "Chromium did not answer in time"
            part = os.read(self._answers, 1 << 20)
            assert part, "Chromium ended"
            self._rest += part


@contextlib.contextmanager
def browsing(profile: str) -> Iterator[Browser]:
    """Start it with a profile folder of its own, and end it."""
    assert CHROMIUM is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _PIPES_ABOVE) for fd in (theirs_in, theirs_out)]

    def place() -> None:
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [CHROMIUM, *options, "--remote-debugging-pipe", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=place,
        pass_fds=(3, 4),
    )
    for fd in (theirs_in, theirs_out, *high):
        os.close(fd)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        for fd in (ours_out, ours_in):  # a Chromium whose pipe is closed ends
            os.close(fd)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
