"""The genres of any audio files, with best_model.pth alone.

    python predict.py song.mp3                          one file
    python predict.py album/ "demos/*.wav" song.mp3     folders and patterns too
    python predict.py album/ --csv genres.csv           a table of every genre's probability
    python predict.py mix.flac --timeline               the genre over time, and a picture of it
    python predict.py album/ --stems stems/             keeps the stems for the next time
    python predict.py album/ --model runs/demo/best_model.pth SEPARATION_REPO=data/models

What is longer than the model's clips is heard in windows of their length, half overlapping. A file
that cannot be read is named and the others go on; the exit code is then 2.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py

import contextlib
import csv
import glob
import io
import json
import logging
import math
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

import config
from stemgenre import audio, command_line, runtime
from stemgenre.classifier import Classifier, clip_names
from stemgenre.errors import UserError
from stemgenre.files import replacing
from stemgenre.finding import find_audio, natural_key
from stemgenre.settings import FeatureSettings, load_settings

log = logging.getLogger("stemgenre.predict")

RUNNERS_UP = 3  # genres shown after the likeliest
WINDOWS_AT_ONCE = 8  # through the network; more gains nothing beside the separation


def main():
    parser = command_line.parser(__doc__, config)
    parser.add_argument("files", nargs="*", help="files, folders, patterns; also KEY=VALUE knobs")
    parser.add_argument("--model", type=Path, help="default: BEST_MODEL_FILE below OUTPUT_DIR")
    parser.add_argument("--csv", type=Path, help="write a table of every genre's probability")
    parser.add_argument("--json", type=Path, help="the same as json, with the genre over time")
    parser.add_argument("--timeline", action="store_true", help="show and draw genre over time")
    parser.add_argument("--out", type=Path, default=Path("timeline"), help="folder of the pictures")
    parser.add_argument("--stems", type=Path, help="folder that keeps the separated stems")
    arguments = parser.parse_intermixed_args()
    overrides, words = command_line.split_overrides(arguments.files)
    settings = load_settings(config, overrides)
    check_knobs(overrides)
    check_outputs(arguments.csv, arguments.json, arguments.timeline and arguments.out / "picture")
    paths, failures = find_files(words)
    with runtime.start(settings.machine) as run:
        classifier = load_classifier(arguments, settings, run.device, overrides)
        predict_files(classifier, paths, failures, arguments, run)
    if failures:
        raise UserError(
            f"{len(failures)} of the files could not be predicted; they are named above"
        )


def load_classifier(arguments, settings, device, overrides):
    """The Classifier that the command line asks for."""
    given = {word.partition("=")[0] for word in overrides}
    size = settings.train.micro_batch
    return Classifier.load(
        arguments.model or settings.paths.output(settings.paths.best_model_file),
        device=device,
        separation=settings.separation,
        separation_model=(
            settings.separation.separation_model if "SEPARATION_MODEL" in given else None
        ),
        stems=arguments.stems,
        batch_size=WINDOWS_AT_ONCE if size == "auto" else size,
    )


def predict_files(classifier, paths, failures, arguments, run):
    """Prints a row for each file as it is done, then writes the tables; adds to `failures`."""
    done, seconds = [], 0.0
    names = dict(zip(paths, clip_names(paths), strict=True))
    table = Table(paths, classifier.label_names)
    with tqdm(total=total_seconds(paths), unit="s of audio", disable=not paths) as bar:

        def progress(more):
            nonlocal seconds
            seconds += more
            bar.update(round(seconds) - bar.n)
            if run.stop.signal_number:
                raise run.interrupted()

        try:
            for path, result in classifier.predict_all(paths, progress=progress):
                if isinstance(result, UserError):
                    log.error("%s", result)
                    failures.append({"file": str(path), "reason": str(result)})
                    continue
                done.append((path, result))
                table.show(path, result, timeline=arguments.timeline)
                if arguments.timeline:
                    draw_timeline(arguments.out / f"{names[path]}.png", path.name, result)
        finally:  # also when stopped: what is done is not lost
            if arguments.csv:
                write_csv(arguments.csv, done, classifier)
            if arguments.json:
                write_json(arguments.json, done, failures, classifier)


def check_knobs(overrides):
    """Raises UserError for a knob that would change nothing: the model brings its image along."""
    for word in overrides:
        name = word.partition("=")[0]
        if name.lower() in {item.name for item in fields(FeatureSettings)}:
            raise UserError(f"{word} does not fit: {name} is the trained model's own; leave it out")


def check_outputs(*paths):
    """Makes the folders of the files to be written. Raises UserError, before any work, if not."""
    for path in filter(None, paths):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path.parent} cannot be made: {error.strerror}") from None
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"{path} cannot be written; name a file in a folder of yours")


def find_files(words):
    """(audio paths in natural order, each once; failures) of files, folders and patterns.

    A failure is {"file": word, "reason": text}, for a word that leads to no audio.
    """
    if not words:
        raise UserError("nothing to predict; name files, folders or patterns such as 'album/*.mp3'")
    found, failures = {}, []
    for word in words:
        paths, reason = _find(word)
        for path in paths:
            found.setdefault(path.resolve(), path)
        if not paths:
            log.error("%s", reason)
            failures.append({"file": word, "reason": reason})
    return sorted(found.values(), key=natural_key), failures


def _find(word):
    """(paths, what is wrong if there are none) of one file, folder or pattern."""
    path = Path(word)
    if path.is_dir():
        return find_audio(path, skip=None), f"there is no audio below {word}"
    if path.exists():
        return [path], None
    if not glob.has_magic(word):
        return [], f"{word} is not there"
    matches = [Path(match) for match in glob.glob(word, recursive=True)]  # noqa: PTH207 also absolute
    paths = [path for path in matches if path.name.lower().endswith(audio.SUFFIXES)]
    folders = [path for path in matches if path.is_dir()]
    paths += [path for folder in folders for path in find_audio(folder, skip=None)]
    return [path for path in paths if path.is_file()], f"{word} matches no audio file"


def total_seconds(paths):
    """How much audio there is, in whole seconds, as far as headers tell; None if they do not."""
    seconds = 0.0
    for path in paths:
        with contextlib.suppress(UserError):  # a bad file, or one for ffmpeg
            seconds += audio.probe(path).seconds
    return math.ceil(seconds) or None


class Table:
    """Rows of text in columns, printed one by one."""

    def __init__(self, paths, label_names):
        self.file = max([len("file"), *(len(str(path)) for path in paths)])
        self.genre = max(len("genre"), *map(len, label_names))
        if paths:
            tqdm.write(self.row("file", "genre", "confidence", "runners-up"))

    def row(self, file, genre, confidence, others):
        """One line of text."""
        return f"{file:<{self.file}}  {genre:<{self.genre}}  {confidence:>10}  {others}".rstrip()

    def show(self, path, prediction, *, timeline):
        """Prints a file's row, and one for each span of its timeline."""
        others = (f"{name} {share:.1%}" for name, share in prediction.runners_up(RUNNERS_UP))
        confidence = f"{prediction.confidence:.1%}"
        tqdm.write(self.row(str(path), prediction.genre, confidence, ", ".join(others)))
        for span in prediction.timeline if timeline else ():
            when = f"    {clock(span.start)} - {clock(span.end)}"
            tqdm.write(self.row(when, span.genre, f"{span.confidence:.1%}", ""))


def clock(seconds, _=None):
    """Seconds as minutes and seconds: 1:05.0."""
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths % 600 // 10:02}.{tenths % 10}"


def write_csv(path, done, classifier):
    """Writes file, genre, label_id, confidence and every genre's probability of each file."""
    ids = dict(zip(classifier.label_names, classifier.label_ids, strict=True))
    with replacing(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "genre", "label_id", "confidence", *ids])
        for name, result in done:
            shares = [f"{result.probabilities[genre]:.6f}" for genre in ids]
            confidence = f"{result.confidence:.6f}"
            writer.writerow([name, result.genre, ids[result.genre], confidence, *shares])


def write_json(path, done, failures, classifier):
    """Writes {"label_ids": ..., "files": [...], "failed": [...]}, times in seconds."""
    content = {
        "label_ids": dict(zip(classifier.label_names, classifier.label_ids, strict=True)),
        "files": [{"file": str(name), **asdict(result)} for name, result in done],
        "failed": failures,
    }
    with replacing(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def draw_timeline(path, title, prediction):
    """Draws the genres' probabilities over time, stacked, as a PNG."""
    from matplotlib.figure import Figure

    spans = prediction.timeline
    middles = [(span.start + span.end) / 2 for span in spans]
    times = [spans[0].start, *middles, spans[-1].end]  # a window stands for its middle
    ranked = [prediction.genre, *(name for name, _ in prediction.runners_up())]
    shares = [
        [span.probabilities[name] for span in (spans[0], *spans, spans[-1])] for name in ranked
    ]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(times, shares, labels=ranked)
    axes.set(title=title, xlabel="minutes", ylabel="probability", ylim=(0, 1))
    axes.set_xlim(times[0], times[-1])
    axes.xaxis.set_major_formatter(clock)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    with replacing(path) as file:
        file.write(picture.getbuffer())


if __name__ == "__main__":
    runtime.run_script(main)
