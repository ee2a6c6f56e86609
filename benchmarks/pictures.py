"""The pictures of README.md, made from the demo's outputs.

    python train.py --demo && python eda.py --demo && python benchmarks/pictures.py

Writes docs/pictures/channels.webp, confusion.webp, eda.webp, app_train.webp and app_form.webp. All
but the first two need Chromium and what is in requirements-dev.txt.
"""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from sklearn.metrics import confusion_matrix

from stemgenre.features.augmentation import NO_AUGMENT
from stemgenre.features.log_mel import Frontend
from stemgenre.files import atomic_write
from stemgenre.html import charts
from stemgenre.separation.cache import StemCache
from stemgenre.training.inference import load_models

ROOT = Path(__file__).parents[1]
DATA, RUN, PICTURES = ROOT / "data" / "demo", ROOT / "runs" / "demo", ROOT / "docs" / "pictures"
CLIP = "train_1"
IMG_SIZE = 256  # pixels: the demo's own 64 are too few to look at
EDA_SECTION = "One clip of each genre"  # of eda.py's page; the picture is of its first genre
PAGE_WIDTH = 1100  # pixels of the browser's window
WEBP = {"format": "webp", "quality": 85}  # a third of a PNG's size, letters still sharp


def main() -> None:
    draw(PICTURES / "channels.webp", channels, width=10, height=2.7)
    draw(PICTURES / "confusion.webp", confusion, width=7, height=5.6)
    save("eda.webp", eda_example())
    train, form = app_train_tab()
    save("app_train.webp", train)
    save("app_form.webp", form)


def save(name: str, screenshot: bytes) -> None:
    """Writes a screenshot to docs/pictures."""
    with atomic_write(PICTURES / name) as file:
        Image.open(io.BytesIO(screenshot)).convert("RGB").save(file, **WEBP)


def draw(path: Path, chart: Callable[[Figure], None], *, width: float, height: float) -> None:
    """Writes what `chart(figure)` draws on a white Figure of that size, in inches, to `path`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    chart(figure)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=100)
    with atomic_write(path) as file:
        Image.open(stream).convert("RGB").save(file, **WEBP)


def channels(figure: Figure) -> None:
    """Draws the image of CLIP as the demo's model gets it, but of IMG_SIZE."""
    frontend = load_models(RUN / "best_model.pth", device=torch.device("cpu"))[0].frontend
    features = frontend.features.model_copy(update={"img_size": IMG_SIZE})
    frontend = Frontend(features, device=torch.device("cpu"), channel_stats=frontend.channel_stats)
    cache = StemCache(DATA / "separated", model="synthesised", sample_rate=features.sr)
    stems = torch.from_numpy(cache.read_file(cache.path(CLIP))[0])  # (4, samples)
    image = frontend([stems], [NO_AUGMENT])[0].numpy()  # (4, S, S)
    charts.image(figure, image, features.channel_names, limits=charts.colour_limits([image]))


def confusion(figure: Figure) -> None:
    """Draws the confusion matrix of the demo's validation clips."""
    clips = pd.read_csv(RUN / "valid_predictions.csv")
    genres = list(clips.columns[3:])  # after file_name, label, predicted
    matrix = confusion_matrix(clips["label"], clips["predicted"], labels=genres)
    charts.confusion(figure, matrix, genres)


@contextlib.contextmanager
def open_page(address: str) -> Iterator[Page]:
    """The page at an address in Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": PAGE_WIDTH, "height": 900})
        page.goto(address)
        yield page
        browser.close()


def eda_example() -> bytes:
    """The first genre of EDA_SECTION on the page about the demo's data, as a browser shows it."""
    with open_page((RUN / "eda" / "index.html").resolve().as_uri()) as page:
        section = page.locator("section", has=page.get_by_role("heading", name=EDA_SECTION))
        return section.locator(".card").first.screenshot()


def app_train_tab() -> tuple[bytes, bytes]:
    """The upper part of app.py's page, and of its form with a changed and a wrong value."""
    command = [sys.executable, "app.py", "--port", "0"]
    app = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://\S+", app.stdout.readline())[0]
        with open_page(address) as page:
            page.locator("#curves img").first.wait_for()
            whole = {"x": 0, "y": 0, "width": PAGE_WIDTH, "height": 560}
            train = page.screenshot(clip=whole)
            for setting, value in (("LR", "1e-3"), ("BATCH_SIZE", "many")):
                box = page.locator(f"#set-{setting}").locator("input, textarea")
                box.fill(value)
                box.blur()
            page.locator("#note-LR .changed").wait_for()
            page.locator("#note-BATCH_SIZE .wrong").wait_for()
            top = page.locator("#set-EPOCHS").bounding_box()["y"] - 50
            bottom = page.locator("#set-LABEL_SMOOTHING").bounding_box()["y"]
            scrolled = page.evaluate("window.scrollY")
            part = {"x": 0, "y": top + scrolled, "width": PAGE_WIDTH, "height": bottom - top}
            form = page.screenshot(full_page=True, clip=part)
    finally:
        app.terminate()
    return train, form


if __name__ == "__main__":
    main()
