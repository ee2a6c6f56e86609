"""TRACKER and LOG_EVERY_STEPS: a run's metrics for all the trackers that were asked for."""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from typing import Self

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from stemgenre.errors import Interrupted, UserError, first_line
from stemgenre.html import charts
from stemgenre.html.page import printable
from stemgenre.report import metrics
from stemgenre.runtime import Runtime
from stemgenre.settings import Settings
from stemgenre.tracking import trackers
from stemgenre.tracking.trackers import Results, Row, RunInfo, Tracker
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.members import Predictions, score

log = logging.getLogger(__name__)

STEPS_FILE = "metrics_steps.csv"  # beside metrics.csv
MAX_MISTAKES = 200  # misclassified clips in the table, the most confident ones


class Tracking:
    """The trackers of a run, on rank 0; on the others there are none.

    Raises UserError if a package that TRACKER needs is not installed. After that a tracker that
    fails is a warning, and the run continues without it.
    """

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.settings, self.is_main = settings, runtime.is_main
        self.group = ""  # the run_id of the first network
        self.failed = set()  # names of trackers
        names = settings.tracking.tracker
        self.names = names.split(",") if names else []
        for name in self.names:
            package = importlib.util.find_spec(name)
            if package is None or package.origin is None:  # or a folder of that name: its output
                raise UserError(f"TRACKER={names} needs {name}: pip install {name}")
        if self.is_main and "wandb" in self.names:
            self.attempt("wandb", trackers.log_in)

    def attempt(self, name: str, function: Callable[[], None]) -> None:
        """Calls `function` of the tracker `name`, unless that has failed."""
        if self.is_main and name not in self.failed:
            try:
                function()
            except Exception as error:  # whatever it is, it is not worth a night's training
                self.failed.add(name)
                log.warning("%s: %s; the run continues without it", name, first_line(error))

    def network(self, name: str, settings: Settings) -> "NetworkTracking":
        """What tracks the network with that name and settings; a context, closed at its end."""
        return NetworkTracking(self, name, settings)

    def finish(self, predictions: Predictions, *, label_names: list[str]) -> None:
        """Tracks what several networks predict together as one more of them, called "all"."""
        with self.network("all", self.settings) as tracker:
            tracker.begin(TrainState(), run_id=f"{self.group}-all", steps_per_epoch=1)
            tracker.finish(predictions.valid, predictions.valid_logits, label_names=label_names)


class NetworkTracking:
    """The trackers of one network: begun, then given its steps, epochs and results."""

    def __init__(self, tracking: Tracking, name: str, settings: Settings) -> None:
        self.tracking, self.name, self.settings = tracking, name, settings
        self.folder = settings.paths.output("")
        self.trackers: dict[str, Tracker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        exit_code = 0 if error is None else 255 if stopped else 1
        self._each(lambda tracker: tracker.close(exit_code))

    def begin(self, state: TrainState, *, run_id: str, steps_per_epoch: int) -> None:
        """Begins with what a resumed run has done; that has the run_id of its start."""
        group = self.tracking.group = self.tracking.group or run_id
        run = RunInfo(run_id, self.name, group, self.settings, state, steps_per_epoch)
        output = self.tracking.settings.paths.output
        makers = {
            STEPS_FILE: lambda: trackers.StepsFile(self.folder / STEPS_FILE, run),
            "tensorboard": lambda: trackers.TensorBoard(
                output("tensorboard") / group / self.name, run
            ),
            "wandb": lambda: trackers.WandB(output(""), run),
        }
        for name in (STEPS_FILE, *self.tracking.names):
            self.tracking.attempt(
                name, lambda name=name: self.trackers.update({name: makers[name]()})
            )

    def log_step(self, row: Row) -> None:
        """Passes a row of metrics_steps.csv on."""
        self._each(lambda tracker: tracker.log_step(row))

    def log_epoch(self, row: Row) -> None:
        """Passes a row of metrics.csv on."""
        self._each(lambda tracker: tracker.log_epoch(row))

    def finish(
        self,
        clips: pd.DataFrame,
        logits: torch.Tensor,
        *,
        label_names: list[str],
        best_epoch: int | None = None,
    ) -> None:
        """Passes the results on, computed from logits (clips, genres) of validation clips."""
        if self.trackers.keys() - {STEPS_FILE}:
            model = self.folder / self.tracking.settings.paths.best_model_file
            results = _results(clips, logits, label_names, model, best_epoch)
            self._each(lambda tracker: tracker.finish(results))

    def _each(self, function):
        for name, tracker in self.trackers.items():
            self.tracking.attempt(name, lambda tracker=tracker: function(tracker))


def _results(clips, logits, label_names, model, best_epoch):
    """The Results of the clips of a table, with the columns file_name and target."""
    names = [printable(name) for name in label_names]
    targets, probabilities = clips["target"].to_numpy(), logits.softmax(1).numpy()
    predicted = probabilities.argmax(1)
    total = score(targets, logits)
    scores = {"accuracy": total.accuracy, "macro_f1": total.macro_f1}
    wrong = metrics.top_errors(targets, probabilities, MAX_MISTAKES)
    mistakes = {
        "file_name": [printable(name) for name in clips["file_name"].iloc[wrong]],
        "true": [names[i] for i in targets[wrong]],
        "predicted": [names[i] for i in predicted[wrong]],
        "probability": probabilities[wrong, predicted[wrong]],
        "probability of the true genre": probabilities[wrong, targets[wrong]],
    }
    matrix = confusion_matrix(targets, predicted, labels=range(len(names)))
    return Results(
        scores if best_epoch is None else scores | {"best_epoch": best_epoch},
        _confusion_picture(matrix, names),
        metrics.per_genre(targets, predicted, names),
        pd.DataFrame(mistakes),
        model,
    )


def _confusion_picture(matrix, names):
    """The confusion matrix as (height, width, 3) uint8."""
    size = (min(11.0, 3 + 0.5 * len(names)), min(9.0, 2 + 0.45 * len(names)))  # inches
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=size, dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        charts.confusion(figure, matrix, names)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
