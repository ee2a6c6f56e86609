"""The charts of the pages and of the README, each drawn on a given matplotlib Figure."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stemgenre.settings import STEMS

BLUE = "C0"
SHADES = LinearSegmentedColormap.from_list("shades", [(0.23, 0.51, 0.96, a) for a in (0, 0.9)])
CURVES = {  # label of the y axis: {column of metrics.csv: label of the line}
    "cross-entropy (nats)": {"train_loss": "training", "valid_loss": "validation"},
    "accuracy (fraction of clips)": {"train_accuracy": "training", "valid_accuracy": "validation"},
    "learning rate": {"learning_rate": "learning rate"},
}
MAX_NUMBERED_GENRES = 25  # a larger confusion matrix has no room for numbers in its cells


def curves(
    figure: Figure, history: list[dict], lines: dict[str, str], *, best_epoch: int, ylabel: str
) -> None:
    """Columns of the training history over the epochs; `lines` are {column: label}."""
    axes = figure.subplots()
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) <= 30 else None
    for column, label in lines.items():
        axes.plot(epochs, [row[column] for row in history], marker=marker, ms=3, label=label)
    if best_epoch:
        axes.axvline(best_epoch, color="C7", ls=":", lw=1, label="best epoch")
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid()
    axes.legend()


def confusion(figure: Figure, matrix: np.ndarray, label_names: Sequence[str]) -> None:
    """A confusion matrix (genres, genres) of clip counts, its rows the true genres.

    A cell is shaded by its fraction of the row.
    """
    axes = figure.subplots()
    fractions = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes.imshow(fractions, cmap=SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ticks = np.arange(len(label_names))
    axes.set_xticks(ticks, label_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, label_names)
    axes.set(xlabel="predicted genre", ylabel="true genre")
    axes.tick_params(length=0)
    if len(label_names) <= MAX_NUMBERED_GENRES:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            axes.text(column, row, matrix[row, column], ha="center", va="center")


def reliability(
    figure: Figure, *, confidence: np.ndarray, accuracy: np.ndarray, clips: np.ndarray
) -> None:
    """A reliability diagram: accuracy over confidence, and the clips of each bin; all (bins,)."""
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color="C7", ls=":", lw=1, label="perfectly calibrated")
    upper.plot(confidence, accuracy, "o-", color=BLUE, label="this model")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(-0.03, 1.03))
    upper.grid()
    upper.legend()
    lower.bar(confidence, clips, width=0.05, color=BLUE)
    lower.set(xlabel="top-1 probability", ylabel="clips")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def image(
    figure: Figure,
    channels: np.ndarray,
    names: Sequence[str],
    *,
    limits: tuple[float, float] | np.ndarray,
) -> None:
    """The channels (C, S, S) of an image side by side, colours from limits[0] to limits[1].

    Fewer channels than stems leave room on the right.
    """
    columns = max(len(STEMS), len(names))
    all_axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    all_axes, unused = all_axes[: len(names)], all_axes[len(names) :]
    for axes in unused:
        axes.set_visible(False)
    low, high = limits
    for axes, channel, name in zip(all_axes, channels, names, strict=True):
        shown = axes.imshow(channel, origin="lower", cmap="magma", vmin=low, vmax=high)
        axes.set(title=name, xticks=(), yticks=())
        axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=all_axes, label="standard deviations", shrink=0.8)


def colour_limits(images: Sequence[np.ndarray]) -> np.ndarray:
    """(low, high): the 1 % and 99.5 % quantiles of some images (C, S, S)."""
    return np.quantile(np.stack(images), [0.01, 0.995])
