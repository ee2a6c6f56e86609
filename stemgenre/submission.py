"""submit.csv in the shape of sample_submit, and summary.json and probabilities beside it."""

import contextlib
import csv
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from stemgenre.data.competition import Competition
from stemgenre.files import atomic_write

if TYPE_CHECKING:  # importing this module does not load torch
    import torch

    from stemgenre.training.checkpoint import TrainState

log = logging.getLogger(__name__)


def write_submission(path: Path, competition: Competition, predicted: Sequence[int]) -> None:
    """Writes the predicted label ids of the test clips to `path`.

    `predicted` are class indices in the order of `competition.test`. With a sample_submit: its
    rows, order, separator, header and other columns; without: file name and label id, separated by
    a comma, in natural order, without a header. Without test clips nothing is written.
    """
    if not len(competition.test):
        log.warning("there are no test clips: %s is not written", path)
        return
    label_ids = [competition.label_ids[index] for index in predicted]
    by_name = dict(zip(competition.test["file_name"], label_ids, strict=True))
    template = competition.template
    if template is None:
        rows, separator, line_end = list(by_name.items()), ",", "\n"
    else:
        rows = [list(row) for row in template.rows]
        for row in rows:
            row[template.label_column] = by_name[row[template.file_column]]
        rows = [template.header, *rows] if template.header else rows
        separator, line_end = template.separator, template.line_end
    _write_csv(path, rows, separator, line_end)


def write_probabilities(
    folder: Path,
    competition: Competition,
    valid: pd.DataFrame,
    valid_logits: "torch.Tensor",
    test_logits: "torch.Tensor",
) -> None:
    """Writes every genre's probability for each clip: two tables below `folder`.

    valid_predictions.csv has the columns file_name, label and predicted (names of genres) before
    them; test_probabilities.csv has file_name alone, its rows are those of the submission. The
    logits are (clips, genres), in the order of `valid` and `competition.test`.
    """
    names = competition.label_names
    predicted = [names[index] for index in valid_logits.argmax(1).tolist()]
    labels = [names[target] for target in valid["target"]]
    columns = zip(
        valid["file_name"], labels, predicted, _format_probabilities(valid_logits), strict=True
    )
    rows = [(*clip, *probabilities) for *clip, probabilities in columns]
    header = ("file_name", "label", "predicted", *names)
    _write_csv(folder / "valid_predictions.csv", [header, *rows])

    test_names, template = competition.test["file_name"], competition.template
    by_name = dict(zip(test_names, _format_probabilities(test_logits), strict=True))
    order = [row[template.file_column] for row in template.rows] if template else test_names
    rows = [(name, *by_name[name]) for name in order]
    _write_csv(folder / "test_probabilities.csv", [("file_name", *names), *rows])


def _format_probabilities(logits):
    """[[probability as text, ...], ...]: one list per clip, one text per genre."""
    return [[f"{value:.6f}" for value in row] for row in logits.softmax(1).tolist()]


def _write_csv(path, rows, separator=",", line_end="\n"):
    # File names that are not UTF-8 are written as the bytes that they are.
    options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with atomic_write(path, "w", **options) as file:
        csv.writer(file, delimiter=separator, lineterminator=line_end).writerows(rows)


class Summary:
    """Collects the seconds of each stage, and writes summary.json."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the block's seconds under `name`."""
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)

    def write(
        self,
        path: Path,
        state: "TrainState",
        competition: Competition,
        test_logits: "torch.Tensor",
        *,
        train: pd.DataFrame,
        valid: pd.DataFrame,
    ) -> None:
        """Writes the run's results as JSON, and logs the accuracies and seconds.

        The test accuracy is that of the clips in test_master, None without one.
        """
        targets = competition.test["target"].to_numpy()
        known = targets >= 0
        correct = test_logits.argmax(1).numpy() == targets
        test_accuracy = float(correct[known].mean()) if known.any() else None
        summary = {
            "best_epoch": state.best_epoch,
            "epochs": state.epoch,
            "valid_accuracy": state.best_accuracy,
            "valid_loss": state.best_loss,
            "test_accuracy": test_accuracy,
            "clips": {"train": len(train), "valid": len(valid), "test": len(competition.test)},
            "seconds": self.seconds,
        }
        with atomic_write(path, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
        log.info("best epoch %d: validation accuracy %.3f", state.best_epoch, state.best_accuracy)
        if test_accuracy is not None:
            log.info("test accuracy %.3f over %d clips", test_accuracy, int(known.sum()))
        log.info(
            "seconds: %s", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        )
