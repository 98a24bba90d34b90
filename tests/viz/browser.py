"""Headless Chromium for tests: opens a page from disk, clicks in it, and says what it asked for and complained about.

It speaks the DevTools protocol over the browser's debugging pipe: no port, no driver, no library.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CHROMIUM = shutil.which("chromium")
TIMEOUT_SECONDS = 60.0


class Browser:
    """A running Chromium; ``page`` opens tabs in it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to_browser, self._from_browser = to_browser, from_browser
        self._unread = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session_id: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one DevTools method; events that come meanwhile are kept."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session_id:
            message["sessionId"] = session_id
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to_browser, data) :]
        while True:
            answer = self._receive(method)
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, waiting_for: str) -> dict[str, Any]:
        until = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from_browser], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"Chromium did not answer {waiting_for} in {TIMEOUT_SECONDS:.0f} s")
            chunk = os.read(self._from_browser, 1 << 20)
            if not chunk:
                raise RuntimeError("Chromium has ended")
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    @contextmanager
    def page(self, path: Path, *, width_px: int = 1200, height_px: int = 900, dark: bool = False) -> "Iterator[Page]":
        """A tab that shows the file ``path``; it is open when the page's load event has passed."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.call(f"{domain}.enable")
            page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width_px,
                height=height_px,
                deviceScaleFactor=1,
                mobile=False,
            )
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            page.call("Emulation.setEmulatedMedia", features=[scheme])
            page.call("Page.navigate", url=path.resolve().as_uri())
            page.wait_for("location.protocol === 'file:' && document.readyState === 'complete'")
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session_id: str) -> None:
        self._browser, self._session_id = browser, session_id

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a DevTools method for this tab."""
        return self._browser.call(method, self._session_id, **params)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited.

        Raises:
            RuntimeError: the expression threw.
        """
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Return when a JavaScript expression has become true.

        Raises:
            TimeoutError: it did not in ``TIMEOUT_SECONDS``.
        """
        until = time.monotonic() + TIMEOUT_SECONDS
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > until:
                raise TimeoutError(f"never true in {TIMEOUT_SECONDS:.0f} s: {condition}; {self.complaints()}")
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of the first element that ``selector`` finds, as a reader would."""
        box = self.evaluate(
            f"(() => {{ const item = document.querySelector({json.dumps(selector)}); "
            "item.scrollIntoView({block: 'center', inline: 'center'}); const box = item.getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def texts(self, selector: str) -> list[str]:
        """What the elements that ``selector`` finds show, in the order of the page."""
        return self.evaluate(f"Array.from(document.querySelectorAll({json.dumps(selector)}), (x) => x.innerText)")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, refused loads, and errors that no script caught.

        Not what the software renderer says of its speed.
        """
        found = []
        for event in self._own_events():
            match event["method"], event["params"]:
                case "Runtime.exceptionThrown", params:
                    found.append(str(params["exceptionDetails"]))
                case "Runtime.consoleAPICalled", {"type": "error" | "warning" | "assert", "args": arguments}:
                    found.append(str(arguments))
                case "Log.entryAdded", {"entry": {"level": "error" | "warning", "source": source, "text": text}} if (
                    source != "rendering"
                ):
                    found.append(f"{source}: {text}")
        return found

    def requests(self) -> list[str]:
        """Every address that the page asked for, first its own."""
        return [
            event["params"]["request"]["url"]
            for event in self._own_events()
            if event["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path, *, height_px: int | None = None) -> None:
        """Save what the tab shows as a PNG, or the whole page down to ``height_px``."""
        options: dict[str, Any] = {}
        if height_px is not None:
            width_px = self.evaluate("document.documentElement.clientWidth")
            options = {
                "captureBeyondViewport": True,
                "clip": {"x": 0, "y": 0, "width": width_px, "height": height_px, "scale": 1},
            }
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"]))

    def _own_events(self) -> list[dict[str, Any]]:
        self.evaluate("0")  # whatever happened before has been reported when this is answered
        return [event for event in self._browser.events if event.get("sessionId") == self._session_id]


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A Chromium with a fresh profile, which is gone afterwards.

    Raises:
        FileNotFoundError: Chromium is not installed.
    """
    if CHROMIUM is None:
        raise FileNotFoundError("chromium: not installed")
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-unsafe-swiftshader",  # WebGL in software, for parallel coordinates
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        # Chromium reads its debugging pipe from descriptor 3 and answers on 4.
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", CHROMIUM, *options],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands)
        os.close(answers)
        try:
            yield Browser(to_browser, from_browser)
        finally:
            os.close(to_browser)  # Chromium ends with its pipe
            os.close(from_browser)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
