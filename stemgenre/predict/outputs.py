"""Predictions -> rows on the console, a table in csv, json, and pictures of the genre over time."""

import csv
import functools
import io
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from stemgenre.cli import printable
from stemgenre.errors import UserError
from stemgenre.files import atomic_write, check_writable
from stemgenre.predict.prediction import Prediction

RUNNERS_UP = 3  # genres in a row after the top-1
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}  # names that are not UTF-8, escaped
COLUMNS = ("file", "genre", "label_id", "confidence")  # of the table, before the genres


def check_outputs(
    csv_path: Path | None, json_path: Path | None, *, pictures: Path | None, stems: Path | None
) -> None:
    """Creates the folders that are written to; `pictures` and `stems` are folders.

    Raises UserError if that fails, or if a table would replace a file that is not such a table.
    """
    if csv_path and json_path and os.path.realpath(csv_path) == os.path.realpath(json_path):
        raise UserError(f"--csv and --json are the same file, {csv_path}; name two files")
    for path in filter(None, (csv_path, json_path)):
        if path.is_file() or not path.exists():  # no device or pipe
            check_writable(path.parent)
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        if path.is_file() and not _is_table(path):
            raise UserError(
                f"{path} exists and is no table of predict.py's; name another file or remove it"
            )
        for folder, suffix in ((pictures, ".png"), (stems, ".npz")):
            if folder and path.suffix.lower() == suffix and _is_in(path, folder):
                raise UserError(f"{path} is where this run may write a {suffix}; name another file")
    for folder in filter(None, (pictures, stems)):
        check_writable(folder)


def _is_in(path, folder):
    return os.path.realpath(path.parent) == os.path.realpath(folder)


def _is_table(path):
    """Whether a file is empty or begins as write_csv and write_json write it."""
    try:
        with path.open("rb") as file:
            start = file.read(50)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return not start or start.startswith((",".join(COLUMNS).encode(), b'{\n  "label_ids"'))


class ConsoleTable:
    """Rows of text in columns, printed one by one above the progress bar."""

    def __init__(self, paths: list[Path], label_names: list[str]) -> None:
        self.file_width = max([len("file"), *(len(str(path)) for path in paths)])
        self.genre_width = max(len("genre"), *map(len, label_names))
        if paths:
            self._print("file", "genre", "confidence", "runners-up")

    def show(self, path: Path, prediction: Prediction, *, timeline: bool) -> None:
        """Prints a file's row and, for its timeline, one for each Segment."""
        runners_up = prediction.top_k(1 + RUNNERS_UP)[1:]
        others = ", ".join(f"{genre} {probability:.1%}" for genre, probability in runners_up)
        self._print(str(path), prediction.genre, f"{prediction.confidence:.1%}", others)
        for segment in prediction.timeline if timeline else ():
            when = f"    {format_time(segment.start)} - {format_time(segment.end)}"
            self._print(when, segment.genre, f"{segment.confidence:.1%}", "")

    def _print(self, file, genre, confidence, others):
        row = f"{file:<{self.file_width}}  {genre:<{self.genre_width}}  {confidence:>10}  {others}"
        tqdm.write(printable(row.rstrip()))


def format_time(seconds: float, _: object = None) -> str:
    """Seconds as minutes and seconds: 1:05.0. Takes a second argument, to be an axis' formatter."""
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths % 600 // 10:02}.{tenths % 10}"


def write_csv(
    path: Path, predictions: list[tuple[Path, Prediction]], label_ids: dict[str, int]
) -> None:
    """Writes file, genre, label_id, confidence and every genre's probability of each file."""
    with atomic_write(path, "w", newline="", **TEXT) as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *label_ids])
        for name, prediction in predictions:
            genre = prediction.genre
            probabilities = [f"{prediction.probabilities[label]:.6f}" for label in label_ids]
            confidence = f"{prediction.confidence:.6f}"
            writer.writerow([name, genre, label_ids[genre], confidence, *probabilities])


def write_json(
    path: Path,
    predictions: list[tuple[Path, Prediction]],
    failures: list[dict[str, str]],
    label_ids: dict[str, int],
) -> None:
    """Writes {"label_ids": ..., "files": [...], "failed": [...]}, times in seconds."""
    content = {
        "label_ids": label_ids,
        "files": [{"file": str(name), **asdict(prediction)} for name, prediction in predictions],
        "failed": failures,
    }
    with atomic_write(path, "w", **TEXT) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def draw_timeline(path: Path, title: str, prediction: Prediction) -> None:
    """Draws the genres' probabilities over time, stacked, as a PNG."""
    import matplotlib

    labels = [printable(text) for text in (title, *prediction.probabilities)]
    with (
        matplotlib.rc_context({"font.family": _fonts("".join(labels))}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box, where no font has it
        picture = _timeline(printable(title), prediction)
    with atomic_write(path) as file:
        file.write(picture)


def _fonts(text):
    """Names of the fonts to draw `text` in: matplotlib's own, and one that has what it lacks."""
    from matplotlib import font_manager

    own, boxes = "DejaVu Sans", "Last Resort"  # both come with matplotlib
    missing = set(map(ord, text)) - set(_characters(font_manager.findfont(own)))
    for font in font_manager.fontManager.ttflist if missing else ():
        if not font.name.startswith(boxes) and missing <= set(_characters(font.fname)):
            return [own, font.name]
    return [own]


@functools.cache
def _characters(font_path):
    from matplotlib.font_manager import get_font

    return get_font(font_path).get_charmap().keys()


def _timeline(title, prediction):
    """The PNG of draw_timeline()."""
    from matplotlib.figure import Figure

    segments = prediction.timeline
    centers = [(segment.start + segment.end) / 2 for segment in segments]
    times = [segments[0].start, *centers, segments[-1].end]
    genres = [genre for genre, _ in prediction.top_k()]
    rows = [
        [segment.probabilities[genre] for segment in (segments[0], *segments, segments[-1])]
        for genre in genres
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(times, rows, labels=[printable(genre) for genre in genres])
    axes.set_title(title, parse_math=False)  # $ is a letter
    axes.set(xlabel="minutes", ylabel="probability", ylim=(0, 1))
    axes.set_xlim(times[0], times[-1])
    axes.xaxis.set_major_formatter(format_time)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    for text in legend.get_texts():
        text.set_parse_math(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()
