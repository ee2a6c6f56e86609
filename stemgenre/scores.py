"""Probabilities and labels -> the numbers of the report: per genre, calibration, uncertainty."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support

BINS = 10  # of the reliability diagram


@dataclass(frozen=True)
class Calibration:
    """How often the likeliest genre was right, in bins of its probability; empty ones left out."""

    confidence: np.ndarray  # mean probability of a bin's clips
    accuracy: np.ndarray  # share of them that were right
    clips: np.ndarray  # how many they are
    error: float  # expected calibration error: mean distance of the two, weighted by clips


def accuracy_interval(correct, clips):
    """(low, high): where the accuracy lies with 95 % confidence, by Wilson's score interval."""
    interval = binomtest(int(correct), int(clips)).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


def per_genre(targets, predicted, label_names):
    """A row per genre: clips, precision, recall, f1; NaN where there is nothing to divide by."""
    precision, recall, f1, clips = precision_recall_fscore_support(
        targets, predicted, labels=range(len(label_names)), zero_division=np.nan
    )
    columns = {"genre": label_names, "clips": clips, "precision": precision, "recall": recall}
    return pd.DataFrame(columns | {"F1": f1})


def calibration(targets, probabilities):
    """The Calibration of probabilities (clips, genres).

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence = probabilities.max(1).astype(float)
    right = probabilities.argmax(1) == targets
    bins = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    clips = np.bincount(bins, minlength=BINS)
    filled = clips > 0
    mean, accuracy = (
        np.bincount(bins, weights=values, minlength=BINS)[filled] / clips[filled]
        for values in (confidence, right)
    )
    error = np.average(np.abs(accuracy - mean), weights=clips[filled])
    return Calibration(mean, accuracy, clips[filled], float(error))


def confident_mistakes(targets, probabilities, most):
    """Positions of the wrongly predicted clips, the surest first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != targets)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:most]
