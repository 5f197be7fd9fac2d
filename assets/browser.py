"""A headless Chromium for pictures of pages and for tests, driven through a pipe by the standard library."""

import base64
import io
import itertools
import json
import os
import select
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), "")


class Browser:
    """A headless Chromium with one page; see https://chromedevtools.github.io/devtools-protocol/ for its methods."""

    def __init__(self, profile: Path) -> None:
        (their_input, self._out), (self._in, their_output) = os.pipe(), os.pipe()
        options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
        options += f" --disable-background-networking --user-data-dir='{profile}'"
        # The pipes have to be its files 3 and 4.
        command = f"exec '{CHROMIUM}' {options} about:blank 3<&{their_input} 4>&{their_output}"
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(their_input, their_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._rest, self._numbers = b"", itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], 60)[0], "the browser does not answer"
            found = os.read(self._in, 1 << 20)
            assert found, "the browser has ended"
            self._rest += found
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path | str, size: tuple[int, int], scheme: str = "light", whole: bool = False) -> None:
        """Loads a page with a window of `size`, in CSS pixels, or with `whole` as high as the page."""
        self.events.clear()
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._resize(*size)
        self("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        if whole:
            self._resize(size[0], self.js("document.documentElement.scrollHeight"))

    def _resize(self, width: int, height: int) -> None:
        mobile = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def js(self, expression: str) -> Any:
        return self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def complaints(self) -> list[dict[str, Any]]:
        """Errors, warnings and other messages on the page's console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def fetched(self) -> list[str]:
        """Every address that the page requested, except itself and embedded data."""
        urls = [event["params"]["request"]["url"] for event in self.events if _is_request(event)]
        return [url for url in urls if not url.startswith(("file:///", "data:image/svg+xml;base64,"))]

    def picture(self) -> np.ndarray:
        """A screenshot of shape (height, width, 3), RGB from 0 to 1."""
        png = base64.b64decode(self("Page.captureScreenshot", format="png")["data"])
        return imread(io.BytesIO(png))[..., :3]

    def close(self) -> None:
        self._session = None
        with suppress(AssertionError, OSError):
            self("Browser.close")
        for pipe in (self._out, self._in):
            os.close(pipe)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _is_request(event: dict[str, Any]) -> bool:
    return event.get("method") == "Network.requestWillBeSent"
