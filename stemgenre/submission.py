"""submit.csv in the shape of sample_submit, and summary.json beside it."""

import contextlib
import csv
import json
import logging
import time

import torch

from stemgenre.files import replacing

log = logging.getLogger(__name__)


def write_submission(path, competition, targets):
    """Writes the predicted label ids of the test clips to `path`.

    `targets` are class indices in the order of `competition.test`. With a sample_submit: its rows,
    order, separator, header and other columns; without: file name and label id, separated by a
    comma, in natural order, without a header.
    """
    ids = [competition.label_ids[target] for target in targets]
    by_name = dict(zip(competition.test["file_name"], ids, strict=True))
    form = competition.form
    if form is None:
        rows, separator, line_end = [[name, label] for name, label in by_name.items()], ",", "\n"
    else:
        rows = [list(row) for row in form.rows]
        for row in rows:
            row[form.label_column] = by_name[row[form.file_column]]
        rows = [form.header, *rows] if form.header else rows
        separator, line_end = form.separator, form.line_end
    with replacing(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator, lineterminator=line_end).writerows(rows)


def write_probabilities(folder, competition, valid, valid_logits, test_logits):
    """Writes every genre's probability of each clip: two tables below `folder`.

    valid_predictions.csv has file_name, label and predicted (names of genres) before them;
    test_probabilities.csv file_name alone, its rows those of the submission.
    """
    names = competition.label_names
    answers = zip(valid_logits.argmax(1).tolist(), valid_logits.softmax(1), strict=True)
    rows = [
        (clip.file_name, names[clip.target], names[predicted], *_shares(shares))
        for clip, (predicted, shares) in zip(valid.itertuples(), answers, strict=True)
    ]
    header = ("file_name", "label", "predicted", *names)
    _write_table(folder / "valid_predictions.csv", header, rows)
    shares = dict(zip(competition.test["file_name"], test_logits.softmax(1), strict=True))
    form = competition.form
    order = [row[form.file_column] for row in form.rows] if form else list(shares)
    rows = [(name, *_shares(shares[name])) for name in order]
    _write_table(folder / "test_probabilities.csv", ("file_name", *names), rows)


def _shares(shares):
    return [f"{share:.6f}" for share in shares.tolist()]


def _write_table(path, header, rows):
    with replacing(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


class Summary:
    """Collects the seconds of each stage, and writes summary.json."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def stage(self, name):
        """Counts the block's seconds under `name`."""
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)

    def write(self, path, progress, clips, logits, *, train, valid):
        """Writes what came of the run as json, and logs its last lines."""
        known = torch.tensor(clips.test["target"].to_numpy()) >= 0
        right = logits.argmax(1) == torch.tensor(clips.test["target"].to_numpy())
        accuracy = right[known].float().mean().item() if known.any() else None
        summary = {
            "best_epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "valid_accuracy": progress.best_accuracy,
            "valid_loss": progress.best_loss,
            "test_accuracy": accuracy,
            "clips": {"train": len(train), "valid": len(valid), "test": len(clips.test)},
            "seconds": self.seconds,
        }
        with replacing(path, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
        log.info(
            "best epoch %d: validation accuracy %.3f", progress.best_epoch, progress.best_accuracy
        )
        if accuracy is not None:
            log.info("test accuracy %.3f over %d clips", accuracy, int(known.sum()))
        log.info(
            "seconds: %s", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        )
