"""A page in headless Chromium: its picture, and what it complains about. Chromium is driven through two pipes."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 90.0
"""Seconds that an answer may take: a busy machine starts Chromium slowly."""
# Chromium reads commands at 3 and answers at 4. A child of `subprocess` cannot be given numbers without a fork's hooks.
_AS_3_AND_4 = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find_chromium() -> str | None:
    """Returns the program; None where none is installed."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


class OpenPage:
    """A page that Chromium shows."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._read, self._number = b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """Texts of the console, uncaught errors, and addresses that were asked for beside the page's own."""

    def open(self, path: Path | str, *, width: int, dark: bool, scale: float) -> None:
        """Shows a file, or the page at an address. Raises ValueError where that fails."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        shade = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=shade)
        size = {"width": width, "height": 900, "deviceScaleFactor": scale, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._address = path if isinstance(path, str) else path.resolve().as_uri()
        found = self._call("Page.navigate", url=self._address)
        if found.get("errorText"):
            raise ValueError(f"{path}: Chromium cannot show it: {found['errorText']}")
        self.evaluate(
            "new Promise(done => { const look = () => document.readyState === 'complete' ? "
            "done(true) : setTimeout(look, 20); look(); })"
        )

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, in JSON's types; a promise is waited for."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise ValueError(f"Chromium cannot evaluate {expression!r}: {found['exceptionDetails'].get('text')}")
        return found["result"].get("value")

    def picture(self, selector: str = "html") -> bytes:
        """Returns the PNG of the first element that a CSS selector finds."""
        box = self.evaluate(
            f"(b => ({{x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}}))"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        clip = {**box, "scale": 1}
        found = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        with contextlib.suppress(BrokenPipeError):  # an answer that does not come says it
            os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                break
            self._note(answer)
        if "error" in answer:
            raise ValueError(f"Chromium refuses {method}: {answer['error'].get('message')}")
        return answer["result"]

    def _next(self, deadline: float) -> dict[str, Any]:
        """Returns the next message. Raises ValueError where Chromium has ended, or says nothing."""
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(self._answers, 1 << 16) if ready else b""
            if not more:
                said = "has ended" if ready else f"says nothing for {PATIENCE:g} s"
                raise ValueError(f"Chromium {said}: see whether it starts from a shell, or leave out the pictures")
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keeps what an event complains about."""
        about = event.get("params", {})
        match event.get("method"):
            case "Log.entryAdded":
                self.complaints.append(about["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(" ".join(str(x.get("value")) for x in about["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(about["exceptionDetails"]["text"])
            case "Network.requestWillBeSent":
                address = about["request"]["url"]
                # A server's page may ask its own server.
                own = address == self._address or (self._address.endswith("/") and address.startswith(self._address))
                if not own and not address.startswith("data:"):
                    self.complaints.append(f"asked for {address}")


@contextlib.contextmanager
def open_page(path: Path | str, *, width: int = 1280, dark: bool = False, scale: float = 1.0) -> Iterator[OpenPage]:
    """Opens a page in a window of so many pixels, as a reader who prefers light or dark sees it.

    The page is a file, or the address of one; what an address that ends in `/` holds may be asked for too. Raises
    ValueError where Chromium is missing or fails.
    """
    program = find_chromium()
    if program is None:
        raise ValueError("pictures need Chromium, and none is installed: install it, or leave out the pictures")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _running(program, folder) as page:
        page.open(path, width=width, dark=dark, scale=scale)
        yield page


@contextlib.contextmanager
def _running(program: str, folder: str) -> Iterator[OpenPage]:
    """Runs Chromium with its own settings in `folder`."""
    theirs, ours = zip(os.pipe(), reversed(os.pipe()), strict=True)
    # Numbers of 10 and more, so that none is 3 or 4 already.
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in theirs]
    flags = [
        "--headless=new",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
        "--no-first-run",
        "--disable-gpu",
    ]
    flags += [
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--force-color-profile=srgb",
    ]
    if os.geteuid() == 0:  # Chromium has no sandbox for root, and the pages run nothing
        flags.append("--no-sandbox")
    command = [sys.executable, "-I", "-S", "-c", _AS_3_AND_4, *map(str, high), program, *flags]
    running = subprocess.Popen(
        command, pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for number in (*theirs, *high):
        os.close(number)
    try:
        yield OpenPage(*ours)
    finally:
        for number in ours:  # Chromium ends with its pipes
            os.close(number)
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
