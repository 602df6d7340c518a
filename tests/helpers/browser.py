"""Chromium without a window, driven through the pipe of its DevTools protocol."""

import base64
import fcntl
import io
import json
import os
import select
import signal
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np

FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # as root there is none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--mute-audio",
    "--disable-extensions",
    "--disable-component-extensions-with-background-pages",
    "--disable-features=SpareRendererForSitePerProcess,Translate,OptimizationHints,MediaRouter",
    "--force-color-profile=srgb",
)
PATIENCE = 60  # seconds; a loaded machine is slow to start a browser
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowLeft": (37, ""), "ArrowUp": (38, ""),
        "ArrowRight": (39, ""), "ArrowDown": (40, ""), "End": (35, ""), "Home": (36, "")}  # fmt: skip


class Browser:
    """One process of Chromium. Messages are JSON with a zero byte behind, its file 3 to it, its file 4 from it."""

    def __init__(self, executable: str, profile: Path):
        to_browser, self._write = _high_pipe()
        self._read, from_browser = _high_pipe()
        log = str(profile.with_suffix(".log"))
        self._process = os.posix_spawn(  # no fork: JAX has threads
            executable,
            [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, to_browser, 3),
                (os.POSIX_SPAWN_DUP2, from_browser, 4),
            ],
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number = b"", 0
        self._tab: Page | None = None  # that is free
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command's result; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        _write_all(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def until(self, method: str, session: str, since: int) -> None:
        """Until this has happened in a tab; `since` is how many events there were before."""
        deadline = time.monotonic() + PATIENCE
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events[since:]):
            answer = self._receive(deadline, method)
            if "method" in answer:
                self.events.append(answer)

    def _receive(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"Chromium did not answer {waiting_for} in {PATIENCE} s"
            piece = os.read(self._read, 1 << 20)
            assert piece, f"Chromium ended before it answered {waiting_for}"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False, ready: str = "true") -> "Page":
        """A page from disk, once the expression `ready` is true in it; in the tab of a page that was closed, if any."""
        page, self._tab = self._tab or Page(self), None
        page.show(path, width, height, dark, ready)
        return page

    def keep(self, page: "Page") -> bool:
        """Whether the tab of a closed page is kept for the next one, which needs no process of its own then."""
        if self._tab is not None:
            return False
        self._tab = page
        self.events = [event for event in self.events if event.get("sessionId") != page.session]
        return True

    def close(self) -> None:
        os.close(self._write)  # Chromium ends when nobody is at the pipe
        for _ in range(100):
            if os.waitpid(self._process, os.WNOHANG)[0]:
                break
            time.sleep(0.05)
        else:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        os.close(self._read)


class Page:
    """A tab."""

    def __init__(self, browser: Browser):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def show(self, path: Path, width: int, height: int, dark: bool, ready: str) -> None:
        """Loads a page from disk, and waits until the expression `ready` is true in it."""
        self.theme(dark)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        self.call("Page.bringToFront")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
        before = len(self.browser.events)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.browser.until("Page.loadEventFired", self.session, before)
        self.wait(ready)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"never true: {condition}"
            time.sleep(0.02)

    def theme(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """x, y, width and height of an element that is scrolled into view."""
        return tuple(
            self.evaluate(
                f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
                "e.scrollIntoView({block: 'center', inline: 'center'}); const b = e.getBoundingClientRect();"
                "return [b.x, b.y, b.width, b.height]; })()"
            )
        )

    def hover(self, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        """Moves the mouse over an element, to a place in it."""
        x, y, width, height = self.box(selector)
        x, y = x + across * width, y + down * height
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        x, y = self.hover(selector, across, down)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, *keys: str) -> None:
        for key in keys:
            code, text = KEYS[key]
            about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def download(self, selector: str, folder: Path) -> Path:
        """Clicks what saves a file; the file, once it is whole."""
        before = set(folder.iterdir())
        self.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.click(selector)
        deadline = time.monotonic() + PATIENCE
        while True:
            found = [path for path in folder.iterdir() if path not in before]
            if found and not any(path.name.endswith(".crdownload") or path.name.startswith(".") for path in found):
                (file,) = found
                return file
            assert time.monotonic() < deadline, f"nothing was saved by {selector}"
            time.sleep(0.02)

    def screenshot(self, path: Path | None = None) -> np.ndarray:
        """What is in the window, as 8-bit colours [y, x, 3]."""
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        if path is not None:
            path.write_bytes(png)
        return np.rint(matplotlib.image.imread(io.BytesIO(png))[..., :3] * 255).astype(int)

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, and exceptions."""
        self.evaluate("0")
        texts = []
        for event in self._events():
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                texts.append(parameters["exceptionDetails"].get("exception", {}).get("description", "exception"))
            elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                texts.append(str(parameters["args"]))
            elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                texts.append(parameters["entry"]["text"])
        return texts

    def requests(self) -> list[str]:
        """What the page asked for, but for data inside it."""
        sent = [event for event in self._events() if event["method"] == "Network.requestWillBeSent"]
        addresses = [event["params"]["request"]["url"] for event in sent]
        return [address for address in addresses if not address.startswith(("data:", "blob:"))]

    def _events(self) -> list[dict[str, Any]]:
        return [event for event in self.browser.events if event.get("sessionId") == self.session]

    def close(self) -> None:
        if not self.browser.keep(self):
            self.browser.call("Target.closeTarget", targetId=self.target)


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are above the files that the browser gets."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
