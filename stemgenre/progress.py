"""How far a run has come, and metrics.csv."""

from dataclasses import dataclass, field

import pandas as pd

from stemgenre.files import replacing

METRICS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_accuracy",
    "learning_rate",
    "gradient_norm",
    "seconds",
)


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside weights and optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps done in the epoch in hand
    sums: dict = field(default_factory=dict)  # of that epoch: loss, correct, gradient_norm, seconds
    history: list = field(default_factory=list)  # one dict of METRICS per finished epoch
    best_epoch: int = 0
    best_accuracy: float = -1.0
    best_loss: float = float("inf")

    def is_better(self, accuracy, loss):
        """A better validation accuracy, or the same with a lower loss."""
        return (accuracy, -loss) > (self.best_accuracy, -self.best_loss)


def write_metrics(path, history):
    """Writes metrics.csv: one row of METRICS per finished epoch."""
    with replacing(path, "w", encoding="utf-8", newline="") as file:
        pd.DataFrame(history, columns=METRICS).to_csv(file, index=False)
