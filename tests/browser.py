"""A page opened from disk in headless Chromium, and what is wrong with it.

Chromium is driven through its DevTools protocol, over two pipes: json messages that end with NUL.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60  # that an answer may take

LOOK = """
(async () => {
  const loads = one => new Promise(done => {
    one.addEventListener("canplaythrough", () => done(true));
    one.addEventListener("error", () => done(false));
    setTimeout(() => done(false), 20000);
    one.preload = "auto";
    one.load();
  });
  const pictures = [...document.images], players = [...document.querySelectorAll("audio, video")];
  const name = one => one.alt || (one.src || "no source").slice(0, 60);
  const broken_pictures = [], broken_players = [];
  for (const one of pictures) {
    try { await one.decode(); } catch { broken_pictures.push(name(one)); continue; }
    if (!one.naturalWidth) broken_pictures.push(name(one));
  }
  for (const one of players) {
    const ok = one.src && await loads(one);
    if (!ok || one.error || !(one.duration > 0)) broken_players.push(name(one));
  }
  return {
    pictures: pictures.length, players: players.length, broken_pictures, broken_players,
    seconds: players.map(one => one.duration), text: document.body.innerText,
    alts: pictures.map(one => one.alt), title: document.title,
    scripts: document.scripts.length, background: getComputedStyle(document.body).backgroundColor,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    height: document.documentElement.scrollHeight,
  };
})()
"""


@dataclass
class Seen:
    """What a page holds, and what is wrong with it."""

    text: str  # as a reader sees it
    title: str
    pictures: int
    alts: list[str]
    players: int
    seconds: list[float]  # of each player
    scripts: int
    background: str
    overflow: int  # pixels that the page is wider than the screen
    height: int
    broken_pictures: list[str]
    broken_players: list[str]
    errors: list[str] = field(default_factory=list)  # of the console
    requests: list[str] = field(default_factory=list)  # that leave the file

    def faults(self):
        """All that no page may have; empty if it is right."""
        wide = [f"{self.overflow} pixels too wide"] if self.overflow > 0 else []
        return [
            *self.errors, *self.requests, *self.broken_pictures, *self.broken_players, *wide,
        ]  # fmt: skip


def look(path, *, dark=False, width=1200, picture=None):
    """The Seen of the page at `path`; with `picture`, a PNG of the whole page goes there.

    `width`: of the screen in pixels, 390 is a phone's. Skips the test without a Chromium.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if not program:
        pytest.skip(f"no Chromium is installed ({', '.join(NAMES)})")
    with _started(program) as browser:
        return _look(browser, Path(path).resolve().as_uri(), dark, width, picture)


def _look(browser, address, dark, width, picture):
    target = browser("Target.createTarget", url="about:blank")["targetId"]
    browser.session = browser("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        browser(f"{domain}.enable")
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser("Emulation.setEmulatedMedia", features=[scheme])
    size = {"deviceScaleFactor": 1, "mobile": width < 600}
    browser("Emulation.setDeviceMetricsOverride", width=width, height=900, **size)
    browser("Page.navigate", url=address)
    browser.wait("Page.loadEventFired")
    answer = browser("Runtime.evaluate", expression=LOOK, awaitPromise=True, returnByValue=True)
    seen = Seen(**answer["result"]["value"])
    if picture:
        clip = {"x": 0, "y": 0, "width": width, "height": min(seen.height, 16000), "scale": 1}
        shot = browser("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        Path(picture).write_bytes(base64.b64decode(shot["data"]))
    seen.errors, seen.requests = _events(browser.events, address)
    return seen


def _events(events, address):
    """(errors of the console, addresses asked for that are neither the page nor in it)."""
    errors, requests = [], []
    for event in events:
        details = event["params"]
        if event["method"] == "Runtime.exceptionThrown":
            errors.append(details["exceptionDetails"]["text"])
        elif event["method"] == "Runtime.consoleAPICalled" and details["type"] == "error":
            errors.append(str(details["args"]))
        elif event["method"] == "Log.entryAdded" and details["entry"]["level"] == "error":
            errors.append(details["entry"]["text"])
        elif event["method"] == "Page.javascriptDialogOpening":
            errors.append(f"a script opened a dialog: {details['message']}")
        elif event["method"] == "Network.requestWillBeSent":
            url = details["request"]["url"]
            if url != address and not url.startswith(("data:", "blob:")):
                requests.append(url)
    return errors, requests


@contextlib.contextmanager
def _started(program):
    """A _Browser of its own, with a folder of its own, ended after the block."""
    to_child, ours = os.pipe()
    from_child, theirs = os.pipe()
    folder = tempfile.mkdtemp()
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
        "--disable-dev-shm-usage", "--disable-background-networking", f"--user-data-dir={folder}",
    ]  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$0" "$@" 3<&{to_child} 4>&{theirs}', program, *options],
        pass_fds=(to_child, theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_child)
    os.close(theirs)
    browser = _Browser(from_child, ours)
    try:
        yield browser
        browser.session = None
        browser("Browser.close")
        process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(from_child)
        shutil.rmtree(folder, ignore_errors=True)


class _Browser:
    """Commands to a running Chromium; what it reports meanwhile is in `events`."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.session, self.count, self.rest, self.events = None, 0, b"", []

    def __call__(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, method):
        """Returns once an event of that name has come."""
        while all(event["method"] != method for event in self.events):
            self.events.append(self._receive())

    def _receive(self):
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.reader], [], [], deadline - time.monotonic())
            part = os.read(self.reader, 2**20) if ready else b""
            assert part, "Chromium has ended, or does not answer"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)
