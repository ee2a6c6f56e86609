"""What the pages draw, each on a matplotlib Figure that page.picture() gives."""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE = "C0", "C1"
SHADES = LinearSegmentedColormap.from_list("shades", [(0.23, 0.51, 0.96, a) for a in (0, 0.9)])
NUMBERED = 25  # genres up to which each cell of a confusion matrix has its number


def curves(figure, history, lines, *, best_epoch, ylabel):
    """Columns of the history over the epochs; `lines` are {column: label}."""
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


def confusion(figure, matrix, label_names):
    """A confusion matrix of clips, its rows the true genres, shaded by their share of the row."""
    axes = figure.subplots()
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    axes.imshow(shares, cmap=SHADES, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ticks = np.arange(len(label_names))
    axes.set_xticks(ticks, label_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, label_names)
    axes.set(xlabel="predicted", ylabel="true genre")
    axes.tick_params(length=0)
    if len(label_names) <= NUMBERED:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            axes.text(column, row, matrix[row, column], ha="center", va="center")


def reliability(figure, calibration):
    """Accuracy over confidence, and how many clips each bin has."""
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color="C7", ls=":", lw=1, label="calibrated")
    upper.plot(calibration.confidence, calibration.accuracy, "o-", color=BLUE, label="this model")
    upper.set(ylabel="share that is right", xlim=(0, 1), ylim=(-0.03, 1.03))
    upper.grid()
    upper.legend()
    lower.bar(calibration.confidence, calibration.clips, width=0.05, color=BLUE)
    lower.set(xlabel="probability of the likeliest genre", ylabel="clips")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def image(figure, channels, names, *, limits):
    """The channels (4, S, S) of an image side by side, with colours between two values."""
    all_axes = figure.subplots(1, len(names), sharey=True)
    low, high = limits
    for axes, channel, name in zip(all_axes, channels, names, strict=True):
        shown = axes.imshow(channel, origin="lower", cmap="magma", vmin=low, vmax=high)
        axes.set(title=name, xticks=(), yticks=())
        axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=all_axes, label="deviations", shrink=0.8)


def colour_limits(images):
    """The values between which the colours of some images (4, S, S) lie."""
    return np.quantile(np.stack(images), [0.01, 0.995])
