"""A headless Chromium driven over its DevTools protocol, through a pipe: real clicks, keys and screenshots."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_KEYS = {" ": ("Space", 32), "ArrowLeft": ("ArrowLeft", 37), "ArrowDown": ("ArrowDown", 40)}
_KEYS |= {
    "ArrowRight": ("ArrowRight", 39),
    "Backspace": ("Backspace", 8),
    "Tab": ("Tab", 9),
    "Enter": ("Enter", 13),
}
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--mute-audio",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--autoplay-policy=no-user-gesture-required",
    "--remote-debugging-pipe",
)
_PATIENCE = 60.0  # seconds


def find_browser() -> str | None:
    """Return the path of an installed Chromium or Chrome, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own, with an empty profile in `folder`; files that it saves go there too."""

    def __init__(
        self, program: str, folder: Path, *, width: int = 1280, height: int = 800, phone: bool = False
    ) -> None:
        self.folder, self._numbers = folder, itertools.count(1)
        self._events: list[dict[str, Any]] = []
        command_read, self._commands = os.pipe()
        self._replies, reply_write = os.pipe()
        self._rest = b""
        flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]

        def place() -> None:  # the protocol's pipes are 3 and 4
            first, second = os.dup(command_read), os.dup(reply_write)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self._process = subprocess.Popen(
            [program, *flags, "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(reply_write)
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._replies)

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Call a method of the protocol and return its result. RuntimeError: the browser says no, or nothing."""
        number = next(self._numbers)
        message: dict[str, object] = {"id": number, "method": method, "params": params}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            reply = self._read()
            if reply.get("id") != number:
                self._events.append(reply)
                continue
            if "error" in reply:
                raise RuntimeError(f"{method}: {reply['error']}")
            result: dict[str, Any] = reply["result"]
            return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._replies, 1 << 20)
            if not more:
                raise RuntimeError("the browser has ended")
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message

    @property
    def complaints(self) -> list[str]:
        """Return exceptions and errors that the page has logged so far."""
        self.evaluate("0")
        thrown = [
            e["params"]["exceptionDetails"]
            for e in self._events
            if e.get("method") == "Runtime.exceptionThrown"
        ]
        logged = [e["params"]["entry"] for e in self._events if e.get("method") == "Log.entryAdded"]
        return [str(e) for e in thrown] + [str(e) for e in logged if e["level"] == "error"]

    def open(self, url: str) -> None:
        """Load an address anew, also if only its fragment differs from the present one."""
        for place in ("about:blank", url):
            self.evaluate("window.leaving = true")
            self.call("Page.navigate", url=place)
            self.wait("document.readyState === 'complete' && !window.leaving")

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression; promises are waited for."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(f"{script}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def wait(self, condition: str, seconds: float = _PATIENCE) -> None:
        """Wait until an expression is true. TimeoutError: it is not."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} is not true after {seconds:g} s")
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click the middle of an element, as a mouse does, when it is visible and enabled."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{found}?.checkVisibility() && !{found}.disabled")
        self.evaluate(f"{found}.scrollIntoView({{block: 'nearest'}})")
        box = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key."""
        code, number = _KEYS.get(key, (key, ord(key[0])))
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=code,
                windowsVirtualKeyCode=number,
                text=text,
            )

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))
