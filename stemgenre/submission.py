"""submit.csv in the shape of sample_submit, and summary.json and probabilities beside it."""

import contextlib
import csv
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stemgenre.data.competition import Competition
from stemgenre.files import ANY_NAME, atomic_write

if TYPE_CHECKING:  # importing this module does not load torch
    from stemgenre.training.members import MemberResult, Predictions

log = logging.getLogger(__name__)


def write_submission(path: Path, competition: Competition, predicted: Sequence[int]) -> None:
    """Writes the predicted label ids of the test clips to `path`.

    `predicted` are class indices in the order of `competition.test`. With a sample_submit: its
    rows, order, separator, header and other columns, and names of genres if it has names; without:
    file name and label id, separated by a comma, in natural order, without a header. Without test
    clips nothing is written.
    """
    if not len(competition.test):
        path.unlink(missing_ok=True)  # an earlier run's
        log.warning("there are no test clips: %s is not written", path)
        return
    template = competition.template
    labels = competition.label_ids
    if template and _has_names(template, competition):
        labels = competition.label_names
    labels = [labels[index] for index in predicted]
    by_name = dict(zip(competition.test["file_name"], labels, strict=True))
    if template is None:
        rows, separator, line_end = list(by_name.items()), ",", "\n"
    else:
        rows = [list(row) for row in template.rows]
        for row in rows:
            row[template.label_column] = by_name[row[template.file_column]]
        rows = [template.header, *rows] if template.header else rows
        separator, line_end = template.separator, template.line_end
    _write_csv(path, rows, separator, line_end)
    log.info("the genres of %d test clips are in %s", len(by_name), path)


def note_earlier_submission(path: Path) -> None:
    """Logs that the submission at `path`, if there is one, is an earlier run's for now."""
    if path.is_file():
        log.info("%s is an earlier run's, until this run has written its own", path)


def _has_names(template, competition):
    """Whether a sample_submit has names of genres instead of ids."""
    cells = {row[template.label_column] for row in template.rows}
    ids = {str(label_id) for label_id in competition.label_ids}
    return cells <= set(competition.label_names) and not cells <= ids


def write_probabilities(folder: Path, competition: Competition, predictions: "Predictions") -> None:
    """Writes every genre's probability for each clip: two tables below `folder`.

    valid_predictions.csv has the columns file_name, label and predicted (names of genres) before
    them; with FOLDS it is oof_predictions.csv, with the fold in which the clip was held out, too.
    test_probabilities.csv has file_name alone, its rows are those of the submission.
    """
    names, valid = competition.label_names, predictions.valid
    columns = {
        "file_name": valid["file_name"],
        "label": [names[target] for target in valid["target"]],
        "predicted": [names[index] for index in predictions.valid_logits.argmax(1).tolist()],
    }
    if predictions.kind == "out-of-fold":
        columns["fold"] = valid["fold"]
    clips = zip(*columns.values(), strict=True)
    probabilities = _format_probabilities(predictions.valid_logits)
    rows = [(*clip, *row) for clip, row in zip(clips, probabilities, strict=True)]
    table, other = "valid_predictions.csv", "oof_predictions.csv"
    if "fold" in columns:
        table, other = other, table
    _write_csv(folder / table, [(*columns, *names), *rows])
    (folder / other).unlink(missing_ok=True)  # an earlier run's

    test_names, template = competition.test["file_name"], competition.template
    probabilities = _format_probabilities(predictions.test_logits)
    by_name = dict(zip(test_names, probabilities, strict=True))
    order = [row[template.file_column] for row in template.rows] if template else test_names
    rows = [(name, *by_name[name]) for name in order]
    _write_csv(folder / "test_probabilities.csv", [("file_name", *names), *rows])


def _format_probabilities(logits):
    """[[probability as text, ...], ...]: one list per clip, one text per genre."""
    return [[f"{value:.6f}" for value in row] for row in logits.softmax(1).tolist()]


def _write_csv(path, rows, separator=",", line_end="\n"):
    with atomic_write(path, "w", **ANY_NAME) as file:
        csv.writer(file, delimiter=separator, lineterminator=line_end).writerows(rows)


class Summary:
    """Collects the seconds of each stage, and writes summary.json."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to those of `name`."""
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def write(
        self,
        path: Path,
        competition: Competition,
        results: "list[MemberResult]",
        predictions: "Predictions",
    ) -> None:
        """Writes the run's results as JSON, and logs the accuracies and seconds.

        The test accuracy is that of the clips in test_master, None without one. Of several networks
        the accuracies are those of their mean probabilities, and each one's own are in `networks`.
        """
        valid_score, test_score = predictions.valid_score, predictions.test_score
        first = results[0]
        if len(results) == 1:
            summary = _of_state(first.state)
            log.info("best epoch %(best_epoch)d: validation accuracy %(valid_accuracy).3f", summary)
        else:
            summary = {
                "valid_accuracy": valid_score.accuracy,
                "valid_interval": valid_score.interval,
                "valid_macro_f1": valid_score.macro_f1,
                "networks": {result.member.name: _of_state(result.state) for result in results},
            }
            log.info("%d networks: %s %s", len(results), predictions.kind, valid_score)
        summary |= {
            "test_accuracy": test_score and test_score.accuracy,
            "clips": {
                "train": len(first.member.train),
                "valid": len(predictions.valid),
                "test": len(competition.test),
            },
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
        }
        with atomic_write(path, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
        if test_score:
            log.info("test accuracy %.3f over %d clips", test_score.accuracy, test_score.clips)
        log.info(
            "seconds: %s", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        )


def _of_state(state):
    """What summary.json says of one network."""
    return {
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "valid_accuracy": state.best_accuracy,
        "valid_loss": state.best_loss,
    }
