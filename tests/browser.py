"""A real headless Chromium over its DevTools pipe: what a page says, asks for and looks like.

`python tests/browser.py PAGE.html SHOT.png` takes the picture of a report that the docs show.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
)
# A browser reads commands from descriptor 3 and answers on 4; both may be taken until then.
_START = """
import fcntl, os, sys
there, back, *command = sys.argv[1:]
high = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in (there, back)]
os.dup2(high[0], 3)
os.dup2(high[1], 4)
os.execv(command[0], command)
"""


class Tab:
    """One tab; `requests` are the URLs it asked for, `complaints` what it said of errors."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._waiting, self._count, self._session = b"", 0, None
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def open(self, page: Path) -> None:
        """Load a page and wait until its scripts have run."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=page.as_uri())
        self.value("new Promise(r => document.readyState == 'complete' ? r() : onload = r)")
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.value("new Promise(r => setTimeout(r, 500))")

    def look(self, width: int, *, dark: bool) -> None:
        """Give the window a width in pixels and the reader's light or dark setting."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.settle()

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def point(self, x: float, y: float) -> None:
        """Move the pointer there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def screenshot(self, path: Path, width: int, height: int) -> None:
        """The top of the page as PNG."""
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and return its answer; events before it are taken in."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _read(self) -> Any:
        while b"\0" not in self._waiting:
            more = os.read(self._answers, 1 << 16)
            assert more, "the browser is gone"
            self._waiting += more
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)

    def _note(self, message: Any) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.complaints.append(json.dumps(params["args"]))
            case "Log.entryAdded":
                self.complaints.append(json.dumps(params["entry"]))


def find_browser() -> str:
    """The program; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here")
    return found


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A browser of its own with an empty profile, gone afterwards."""
    program = find_browser()
    there, commands = os.pipe()
    answers, back = os.pipe()
    command = [sys.executable, "-c", _START, str(there), str(back)]
    command += [program, *_FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(there)
    os.close(back)
    try:
        yield Tab(commands, answers)
    finally:
        os.close(commands)
        process.terminate()
        process.wait(30)
        os.close(answers)


if __name__ == "__main__":
    with TemporaryDirectory() as folder, browser(Path(folder)) as opened:
        opened.open(Path(sys.argv[1]).resolve())
        opened.look(1200, dark=False)
        opened.screenshot(Path(sys.argv[2]), 1200, 1560)
