"""The pictures of README.md, from what the demo has put out.

    python train.py --demo && python eda.py --demo && python benchmarks/pictures.py

Writes docs/pictures/channels.webp, confusion.webp and eda.webp. The last needs Chromium and pytest.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave
from sklearn.metrics import confusion_matrix

from stemgenre import charts
from stemgenre.augmentation import PLAIN
from stemgenre.cache import StemCache
from stemgenre.files import replacing
from stemgenre.frontend import FrontEnd
from stemgenre.inference import load_best
from tests.browser import look

ROOT = Path(__file__).parents[1]
DATA, RUN, PICTURES = ROOT / "data" / "demo", ROOT / "runs" / "demo", ROOT / "docs" / "pictures"
CLIP = "train_1"
IMG_SIZE = 256  # pixels: the demo's own 72 are few to look at
PAGE_FROM = "<h2>One clip of each genre</h2>"  # of eda.py's page; what is before is left out
PAGE_WIDTH = 1100  # pixels of the screen
PAGE_ROWS = slice(40, 840)  # pixels of the part: the first genre's card
FORM = {"format": "webp", "pil_kwargs": {"quality": 85}}  # a third of a PNG, letters still sharp


def main():
    draw(PICTURES / "channels.webp", channels, width=10, height=2.7)
    draw(PICTURES / "confusion.webp", confusion, width=7, height=5.6)
    with replacing(PICTURES / "eda.webp") as file:
        imsave(file, page(), **FORM)


def draw(path, chart, *, width, height):
    """Writes what `chart(figure)` puts on a white Figure of that size, in inches, to `path`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    chart(figure)
    with replacing(path) as file:
        figure.savefig(file, dpi=100, **FORM)


def channels(figure):
    """The image of CLIP as the demo's model gets it, but of IMG_SIZE."""
    frontend = load_best(RUN / "best_model.pth", torch.device("cpu")).frontend
    features = dataclasses.replace(frontend.features, img_size=IMG_SIZE)
    frontend = FrontEnd(features, device=torch.device("cpu"), channels=frontend.channels)
    cache = StemCache(DATA / "separated", model="synthesised", sample_rate=features.sr)
    stems = torch.from_numpy(cache.read_file(cache.path(CLIP))[0])  # (4, samples)
    image = frontend([stems], [PLAIN])[0].numpy()
    charts.image(figure, image, features.channel_names, limits=charts.colour_limits([image]))


def confusion(figure):
    """The confusion matrix of the demo's validation clips."""
    clips = pd.read_csv(RUN / "valid_predictions.csv")
    genres = list(clips.columns[3:])  # after file_name, label, predicted
    matrix = confusion_matrix(clips["label"], clips["predicted"], labels=genres)
    charts.confusion(figure, matrix, genres)


def page():
    """A part of the page about the demo's data, as pixels (rows, columns, RGB)."""
    text = (RUN / "eda" / "index.html").read_text(encoding="utf-8")
    part = text[: text.index("<h1>")] + text[text.index(PAGE_FROM) :]
    with tempfile.TemporaryDirectory() as folder:
        html, png = Path(folder, "part.html"), Path(folder, "part.png")
        html.write_text(part, encoding="utf-8")
        look(html, width=PAGE_WIDTH, picture=png)
        return imread(png)[PAGE_ROWS, :, :3]


if __name__ == "__main__":
    main()
