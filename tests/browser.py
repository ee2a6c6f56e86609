"""A page opened from disk in the system's Chromium (Playwright), and what is wrong with it."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers import give_up

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

INSPECT = """
async () => {
  const loads = player => new Promise(resolve => {
    player.addEventListener("canplaythrough", () => resolve(true));
    player.addEventListener("error", () => resolve(false));
    setTimeout(() => resolve(false), 20000);
    player.preload = "auto";
    player.load();
  });
  const decodes = image => image.decode().then(() => image.naturalWidth > 0, () => false);
  const images = [...document.images], players = [...document.querySelectorAll("audio")];
  const broken = [];
  for (const image of images)
    if (!await decodes(image)) broken.push(`image ${image.alt}`);
  for (const player of players)
    if (!(player.src && await loads(player) && player.duration > 0))
      broken.push(`player ${player.src.slice(0, 60)}`);
  return {
    broken, alts: images.map(image => image.alt), durations: players.map(p => p.duration),
    text: document.body.innerText, title: document.title, scripts: document.scripts.length,
    background: getComputedStyle(document.body).backgroundColor,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
}
"""


@dataclass
class OpenedPage:
    """What a page holds, and what is wrong with it."""

    text: str  # as a reader sees it
    title: str
    alts: list[str]  # of each image
    durations: list[float]  # s, of each audio player
    scripts: int
    background: str
    overflow: int  # pixels that the page is wider than the screen
    broken: list[str]  # images and players that cannot be decoded
    errors: list[str] = field(default_factory=list)  # of the console
    requests: list[str] = field(default_factory=list)  # for anything outside the file

    def problems(self):
        """Everything that no page may have; empty if the page is right."""
        too_wide = [f"{self.overflow} pixels too wide"] if self.overflow > 0 else []
        return self.errors + self.requests + self.broken + too_wide


@pytest.fixture(scope="session")
def browser():
    """One headless Chromium for all tests. Skips without one, but fails with CI=true."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if not program:
        give_up(f"no Chromium is installed ({', '.join(PROGRAMS)})")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        give_up("playwright is not installed; see requirements-dev.txt")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield chromium
        chromium.close()


def open_page(browser, path, *, dark=False, width=1200, screenshot=None):
    """The OpenedPage of the file at `path`; with `screenshot`, a PNG of the page goes there.

    `width`: of the screen in pixels, 390 is a phone's.
    """
    address = Path(path).resolve().as_uri()
    errors, requests = [], []
    with browser.new_context(
        color_scheme="dark" if dark else "light",
        viewport={"width": width, "height": 900},
        is_mobile=width < 600,
    ) as context:
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(f"uncaught: {error}"))
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        found = page.evaluate(INSPECT)
        if screenshot:
            page.screenshot(path=screenshot, full_page=True)
    inside = ("data:", "blob:")
    outside = [url for url in requests if url != address and not url.startswith(inside)]
    return OpenedPage(**found, errors=errors, requests=outside)
