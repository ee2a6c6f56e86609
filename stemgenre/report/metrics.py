"""Probabilities and labels -> the report's metrics: per genre, calibration, confidence interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import precision_recall_fscore_support

from stemgenre.files import ANY_NAME, atomic_write

CALIBRATION_BINS = 10  # of equal width, over the top-1 probability


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram: arrays (bins,) over the bins that hold clips."""

    confidence: np.ndarray  # mean top-1 probability of a bin's clips
    accuracy: np.ndarray  # fraction of them predicted correctly
    clips: np.ndarray  # how many they are
    error: float  # expected calibration error: mean |accuracy - confidence|, weighted by clips


def per_genre(
    targets: np.ndarray, predicted: np.ndarray, label_names: Sequence[str]
) -> pd.DataFrame:
    """A row per genre: genre, clips, precision, recall, F1; NaN where the denominator is zero.

    `targets` and `predicted` are class indices (clips,).
    """
    precision, recall, f1, clips = precision_recall_fscore_support(
        targets, predicted, labels=range(len(label_names)), zero_division=np.nan
    )
    clips = clips.astype(int)  # floats, where a genre has none
    columns = {"genre": label_names, "clips": clips, "precision": precision, "recall": recall}
    return pd.DataFrame(columns | {"F1": f1})


def write_classification_report(
    path: Path, targets: np.ndarray, logits: torch.Tensor, label_names: Sequence[str]
) -> None:
    """Writes per_genre() of logits (clips, genres) as CSV, with scikit-learn's names of columns.

    A precision, recall or F1 whose denominator is zero is an empty cell. Raises UserError if the
    file cannot be written.
    """
    table = per_genre(targets, logits.argmax(1).numpy(), label_names)
    table = table.rename(columns={"clips": "support", "F1": "f1"})
    with atomic_write(path, "w", **ANY_NAME) as file:
        table[["genre", "precision", "recall", "f1", "support"]].to_csv(file, index=False)


def calibration(targets: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """The Calibration of probabilities (clips, genres) for class indices (clips,).

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence = probabilities.max(1).astype(float)
    correct = probabilities.argmax(1) == targets
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    clips = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = clips > 0
    mean, accuracy = (
        np.bincount(bins, weights=values, minlength=CALIBRATION_BINS)[filled] / clips[filled]
        for values in (confidence, correct)
    )
    error = np.average(np.abs(accuracy - mean), weights=clips[filled])
    return Calibration(mean, accuracy, clips[filled], float(error))


def top_errors(targets: np.ndarray, probabilities: np.ndarray, k: int) -> np.ndarray:
    """Positions of up to `k` misclassified clips, the most confident first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != targets)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:k]
