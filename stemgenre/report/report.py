"""report/index.html: how the training is going while it runs, and its results at the end."""

import datetime
import functools
import importlib.metadata
import logging
import platform
import shutil
import subprocess
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from sklearn.metrics import confusion_matrix

from stemgenre.data.audio import decode
from stemgenre.data.competition import Competition
from stemgenre.errors import UserError
from stemgenre.features.augmentation import NO_AUGMENT
from stemgenre.files import write_text
from stemgenre.html import charts
from stemgenre.html.page import (
    PLAYER_SECONDS,
    audio_player,
    full_width_figure,
    percent,
    printable,
    render_page,
    svg_figure,
)
from stemgenre.report import metrics
from stemgenre.runtime import Runtime, describe_device
from stemgenre.settings import STEMS, Settings, config_values
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.inference import LoadedModel, load_models
from stemgenre.training.members import Member, MemberResult, Predictions, accuracy_interval
from stemgenre.training.stem_loader import StemLoader

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html")
ROOT = Path(__file__).parents[2]
PAGE_SECONDS = (
    30.0  # between two pages at least: one takes 0.5 s, on a GPU a large part of an epoch
)
REFRESH_SECONDS = 10  # after which the browser reloads the page of a run that is not finished
MAX_ERRORS = 8  # misclassified clips shown; each takes about 0.5 MB of the page
NO_CONTENT = dict.fromkeys(  # the parts that not every page has
    ("networks", "score", "kind", "results", "top_errors", "test_clips")
)
TOP_K = 4  # genres listed for each of them, beside the true one
PACKAGES = ("torch", "torchvision", "demucs", "librosa", "numpy", "scikit-learn", "soundfile")


def _on_main_process(write_page):
    """Runs a method of Report on rank 0 only, and makes whatever goes wrong in it a warning."""

    @functools.wraps(write_page)
    def wrapper(self, *args: Any) -> None:
        if not self.runtime.is_main:
            return
        try:
            write_page(self, *args)
        except UserError as error:
            log.warning("%s; the run continues without it", error)
        except Exception:  # a page, whatever is wrong with it, is not worth a night's training
            log.warning(
                "internal error, please report it; the run continues without %s:\n%s",
                self.path,
                traceback.format_exc(),
            )

    return wrapper


class Report:
    """Writes report/index.html below OUTPUT_DIR, on rank 0.

    `train` and `valid` are the split of the competition's training clips. A page that cannot be
    written is a warning; no method raises.
    """

    def __init__(
        self,
        settings: Settings,
        competition: Competition,
        train: pd.DataFrame,
        valid: pd.DataFrame,
        runtime: Runtime,
    ) -> None:
        self.settings, self.competition, self.runtime = settings, competition, runtime
        self.train, self.valid = train, valid
        self.path = settings.paths.output("report") / "index.html"
        self.next_update = 0.0  # time.monotonic() from which update() writes again

    @_on_main_process
    def begin(self, state: TrainState) -> None:
        """Writes the page before the first epoch: settings, and the epochs of a resumed run."""
        self._write(state)

    @_on_main_process
    def update(self, state: TrainState, logits: torch.Tensor) -> None:
        """Writes the page after an epoch, unless the previous one is younger than PAGE_SECONDS.

        `logits` (clips, genres) are those of the validation clips.
        """
        if time.monotonic() < self.next_update:
            return
        self._write(state, results=self._results(logits, f"epoch {state.epoch}"))
        self.next_update = time.monotonic() + PAGE_SECONDS

    @_on_main_process
    def finish(
        self,
        state: TrainState,
        best: LoadedModel,
        loader: StemLoader,
        valid_logits: torch.Tensor,
        test_logits: torch.Tensor,
    ) -> None:
        """Writes the page at the end, about the best epoch's model and its logits (clips, genres).

        `loader` reads the stems of the misclassified clips.
        """
        self._write(
            state,
            finished=True,
            results=self._results(valid_logits, f"best epoch ({state.best_epoch})"),
            top_errors=list(self._top_errors(valid_logits, best, loader)),
            test_clips=self._test_clips(test_logits),
        )

    @_on_main_process
    def show_networks(
        self,
        members: list[Member],
        results: list[MemberResult],
        predictions: Predictions | None = None,
        loader: StemLoader | None = None,
    ) -> None:
        """Writes the page of a run with several networks, which links to the page of each.

        At the end it is about their `predictions`, and `loader` reads the misclassified clips.
        """
        done = {result.member.name: result.state for result in results}
        networks = [
            {
                "name": member.name,
                "page": f"../{member.name}/report/index.html",
                "state": done.get(member.name),
            }
            for member in members
        ]
        if predictions is None:
            self._render(networks=networks)
            return
        self.valid, logits = predictions.valid, predictions.valid_logits
        best, *_ = load_models(members[0].best_model_path, device=self.runtime.device)
        self._render(
            networks=networks,
            score=predictions.valid_score,
            finished=True,
            kind=predictions.kind,
            results=self._results(logits, f"{predictions.kind} predictions"),
            top_errors=list(self._top_errors(logits, best, loader)),
            test_clips=self._test_clips(predictions.test_logits),
        )

    def _write(self, state, **content):
        seconds = sum(row["seconds"] for row in state.history)
        correct = round(max(0.0, state.best_accuracy) * len(self.valid))
        self._render(
            state=state,
            best_accuracy_details=_accuracy_details(correct, len(self.valid)),
            training_time=datetime.timedelta(seconds=round(seconds)),
            seconds_per_epoch=seconds / max(1, state.epoch),
            curves=_curves(state) if state.history else [],
            **content,
        )

    def _render(self, *, finished=False, **content):
        page = render_page(
            TEMPLATE,
            finished=finished,
            refresh_seconds=None if finished else REFRESH_SECONDS,
            now=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            epochs=self.settings.train.epochs,
            **NO_CONTENT | content,
            changed_settings=self._changed_settings,
            environment=self._environment,
        )
        write_text(self.path, page)

    def _results(self, logits, epoch):
        """Confusion matrix, metrics per genre and calibration of the validation clips."""
        targets, names = self.valid["target"].to_numpy(), self.competition.label_names
        probabilities = logits.softmax(1).numpy()
        predicted = probabilities.argmax(1)
        matrix = confusion_matrix(targets, predicted, labels=range(len(names)))
        genres = metrics.per_genre(targets, predicted, names)
        genres = genres.rename(columns={"clips": "validation clips"})
        counts = np.bincount(self.train["target"], minlength=len(names))
        genres.insert(1, "training clips", counts)
        calibration = metrics.calibration(targets, probabilities)
        return {
            "epoch": epoch,
            "confusion": svg_figure(
                lambda figure: charts.confusion(figure, matrix, [printable(n) for n in names]),
                alt="validation clips by true and predicted genre",
                width=min(11.0, 3 + 0.5 * len(names)),
                height=min(9.0, 2 + 0.45 * len(names)),
            ),
            "genres": genres,
            "reliability": svg_figure(
                lambda figure: charts.reliability(
                    figure,
                    confidence=calibration.confidence,
                    accuracy=calibration.accuracy,
                    clips=calibration.clips,
                ),
                alt="accuracy over top-1 probability",
                width=5.5,
                height=4.6,
            ),
            "calibration_error": calibration.error,
        }

    def _top_errors(self, logits, best, loader):
        """The most confident errors: genres with their probabilities, image, players."""
        all_probabilities = logits.softmax(1).numpy()
        targets, names = self.valid["target"].to_numpy(), self.competition.label_names
        features = best.frontend.features
        samples = max(best.frontend.clip_samples, round(PLAYER_SECONDS * features.sr))
        for i in metrics.top_errors(targets, all_probabilities, MAX_ERRORS):
            clip, target, probabilities = self.valid.iloc[i], targets[i], all_probabilities[i]
            order = np.argsort(-probabilities, kind="stable")
            stems = loader.read(clip["clip"], section=lambda _: (0, samples))  # (4, samples)
            image = best.frontend([stems], [NO_AUGMENT])[0].cpu().numpy()  # (C, S, S)
            yield {
                "file_name": clip["file_name"],
                "true": names[target],
                "predicted": names[order[0]],
                "genres": [
                    {"name": names[j], "probability": probabilities[j], "is_true": j == target}
                    for rank, j in enumerate(order)
                    if rank < TOP_K or j == target
                ],
                "image": full_width_figure(
                    functools.partial(
                        charts.image,
                        channels=image,
                        names=features.channel_names,
                        limits=charts.colour_limits([image]),
                    ),
                    alt=f"the channels of {clip['file_name']}",
                    height=3,
                ),
                "players": _players(clip["path"], stems.float().cpu().numpy(), features),
            }

    def _test_clips(self, logits):
        """How often each genre is predicted; the accuracy, if some test clips' genres are known."""
        if not len(self.competition.test):
            return None
        names, predicted = self.competition.label_names, logits.argmax(1).numpy()
        counts = np.bincount(predicted, minlength=len(names))
        targets = self.competition.test["target"].to_numpy()
        known, accuracy = targets >= 0, None
        if known.any():
            correct = np.count_nonzero(predicted[known] == targets[known])
            details = _accuracy_details(correct, known.sum())
            accuracy = f"{percent(correct / known.sum(), 1)}, {details}"
        predictions = pd.DataFrame({"genre": names, "clips predicted as it": counts})
        return {"accuracy": accuracy, "predictions": predictions}

    @functools.cached_property
    def _changed_settings(self):
        config = config_values()
        rows = [
            (name, repr(value), repr(config[name]))
            for name, value in self.settings.values().items()
            if value != config[name]
        ]
        return pd.DataFrame(rows, columns=["setting", "this run", "config.py"])

    @functools.cached_property
    def _environment(self):
        rows = {
            "Python": f"{platform.python_version()} on {platform.platform()}",
            **{name: _version(name) for name in PACKAGES},
            "device": describe_device(self.runtime.device),
            "processes": str(self.runtime.world_size),
            "commit": _commit() or "not a git checkout",
        }
        return pd.DataFrame(list(rows.items()), columns=["name", "version"])


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # Demucs, which CHANNELS=mix does not need


def _accuracy_details(correct, clips):
    low, high = accuracy_interval(correct, clips)
    interval = f"95 % confidence interval {percent(low)} to {percent(high)}"
    return f"{correct} of {clips} clips ({interval})"


def _curves(state):
    return [
        svg_figure(
            functools.partial(
                charts.curves,
                history=state.history,
                lines=lines,
                best_epoch=state.best_epoch,
                ylabel=ylabel,
            ),
            alt=f"{ylabel} over the epochs",
            width=4.6,
            height=3.4,
        )
        for ylabel, lines in charts.CURVES.items()
    ]


def _players(path, waves, features):
    """Players of the clip's file, and of its stems if `waves` are (4, samples), not its mix."""
    try:
        players = [audio_player(*decode(path, seconds=PLAYER_SECONDS), label="the clip")]
    except UserError as error:  # the file has been removed since it was separated
        players = [Markup("<p>{}</p>").format(error)]
    if features.cached_waves == STEMS:
        for name, wave in zip(STEMS, waves, strict=True):
            players.append(audio_player(wave, features.sr, label=name))
    return players


def _commit():
    """The commit of this checkout, with -dirty if files differ from it; None without git.

    If git takes too long, a text that says so.
    """
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:  # a file system that is slow
        return "unknown, git did not answer"
    return done.stdout.strip() or None
