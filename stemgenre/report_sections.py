"""The sections of the report: each a function from results to Html."""

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from stemgenre import charts, scores
from stemgenre import environment as made_with
from stemgenre.audio import decode
from stemgenre.augmentation import PLAIN
from stemgenre.cache import STEMS
from stemgenre.errors import UserError
from stemgenre.page import (
    Html,
    bar,
    cards,
    fact,
    note,
    picture,
    player,
    printable,
    section,
    table,
    tag,
    wide,
)
from stemgenre.settings import KNOBS

MISTAKES = 8  # shown; each takes about 0.5 MB of the page
LIKELIEST = 4  # genres shown of a mistake, beside the true one


def facts(progress, valid_clips):
    """The numbers of note: accuracy with its uncertainty, loss, time."""
    if not progress.history:
        return tag("p", "No epoch is finished yet.")
    right = round(progress.best_accuracy * valid_clips)
    low, high = scores.accuracy_interval(right, valid_clips)
    seconds = sum(row["seconds"] for row in progress.history)
    return cards(
        fact(
            f"{progress.best_accuracy:.1%}",
            f"best validation accuracy: {right} of {valid_clips} clips, which says no more than "
            f"{low:.0%} to {high:.0%} (95 % confidence)",
        ),
        fact(f"{progress.best_loss:.3f}", f"validation loss of that epoch, {progress.best_epoch}"),
        fact(_duration(seconds), f"of training, {seconds / progress.epoch:.1f} s an epoch"),
    )


def curves(progress):
    """Loss, accuracy and learning rate over the epochs."""
    losses = {"train_loss": "training", "valid_loss": "validation"}
    accuracies = {"train_accuracy": "training", "valid_accuracy": "validation"}
    pictures = (
        (losses, "loss", "cross-entropy in nats"),
        (accuracies, "accuracy", "share of clips"),
        ({"learning_rate": "learning rate"}, "learning rate", "learning rate"),
    )
    return section(
        "Curves",
        cards(
            *(_curve(progress, lines, name, ylabel) for lines, name, ylabel in pictures),
            least="19rem",
        ),
        note(
            "Training clips are augmented and heard with dropout, so the training's curves can be "
            "the worse ones."
        ),
    )


def _curve(progress, lines, name, ylabel):
    return picture(
        lambda figure: charts.curves(
            figure, progress.history, lines, best_epoch=progress.best_epoch, ylabel=ylabel
        ),
        alt=f"{name} over the epochs",
        width=4.6,
        height=3.4,
    )


def confusion(targets, probabilities, label_names, which):
    """The confusion matrix."""
    genres = range(len(label_names))
    matrix = confusion_matrix(targets, probabilities.argmax(1), labels=genres)
    names = [printable(name) for name in label_names]
    size = min(11.0, 3 + 0.5 * len(names))
    return section(
        f"Confusion matrix: {which}",
        picture(
            lambda figure: charts.confusion(figure, matrix, names),
            alt="validation clips by true and predicted genre",
            width=size,
            height=min(9.0, 2 + 0.45 * len(names)),
        ),
    )


def genres(targets, probabilities, label_names, train_targets, which):
    """Precision, recall and F1 of each genre."""
    rows = scores.per_genre(targets, probabilities.argmax(1), label_names)
    rows.insert(1, "training clips", np.bincount(train_targets, minlength=len(label_names)))
    rows = rows.rename(columns={"clips": "validation clips"})
    shares = dict.fromkeys(("precision", "recall", "F1"), "{:.3f}")
    return section(
        f"Genres: {which}",
        table(rows, formats=shares),
        note(
            "Precision: the share of the clips predicted as this genre that are of it. Recall: the "
            "share of this genre's clips that are predicted as it. F1: their harmonic mean. A "
            "genre that is never predicted has no precision."
        ),
    )


def calibration(targets, probabilities, which):
    """Whether the probabilities are as good as they say."""
    found = scores.calibration(targets, probabilities)
    return section(
        f"Calibration: {which}",
        picture(
            lambda figure: charts.reliability(figure, found),
            alt="share of right predictions over the probability of the likeliest genre",
            width=5.5,
            height=4.6,
        ),
        note(
            f"Expected calibration error {found.error:.3f}: so far, on average, are the "
            "probabilities from the share that is right. Below the dotted line the model is surer "
            "than it should be."
        ),
    )


def mistakes(valid, logits, best, reader):
    """The surest wrong predictions: probabilities, image and players."""
    probabilities = logits.softmax(1).numpy()
    found = scores.confident_mistakes(valid["target"].to_numpy(), probabilities, MISTAKES)
    if not len(found):
        return section("Most confident mistakes", tag("p", "Every validation clip is right."))
    return section(
        "Most confident mistakes",
        note(
            "Pictures: the image as the network sees it, time from left to right, low notes at the "
            "bottom. Players: the first seconds of the clip and of its stems."
        ),
        *(_mistake(valid.iloc[one], probabilities[one], best, reader) for one in found),
    )


def _mistake(clip, shares, best, reader):
    true, predicted = best.label_names[clip["target"]], best.label_names[shares.argmax()]
    stems = reader.read(clip["clip"])
    image = best.frontend([stems], [PLAIN])[0].cpu().numpy()
    shown = sorted({*np.argsort(-shares)[:LIKELIEST], clip["target"]}, key=lambda i: -shares[i])
    rows = [
        (
            best.label_names[i],
            f"{shares[i]:.1%}",
            bar(shares[i]),
            "the true one" if i == clip["target"] else "",
        )
        for i in shown
    ]
    return tag(
        "div",
        tag("h3", f"{clip['file_name']}: {true}, heard as {predicted} ({shares.max():.1%})"),
        table(pd.DataFrame(rows, columns=["genre", "probability", "", " "])),
        wide(
            lambda figure: charts.image(
                figure,
                image,
                best.frontend.features.channel_names,
                limits=charts.colour_limits([image]),
            ),
            alt=f"the four channels of {clip['file_name']}",
            height=3,
        ),
        _players(clip["path"], stems.float().cpu().numpy(), best.frontend.features.sr),
        class_="card",
    )


def _players(path, stems, rate):
    try:
        mix = player(*decode(path), label="the clip")
    except UserError as error:  # taken away meanwhile
        mix = tag("p", error)
    parts = (player(wave, rate, label=stem) for stem, wave in zip(STEMS, stems, strict=True))
    return cards(mix, *parts, least="17rem")


def test_clips(clips, logits):
    """What the test clips were taken for; their accuracy, if their labels are known."""
    if not len(clips.test):
        return Html()
    predicted = logits.argmax(1).numpy()
    counts = np.bincount(predicted, minlength=len(clips.label_names))
    targets = clips.test["target"].to_numpy()
    known = targets >= 0
    parts = [table(pd.DataFrame({"genre": clips.label_names, "predictions": counts}))]
    if known.any():
        right = int((predicted == targets)[known].sum())
        low, high = scores.accuracy_interval(right, int(known.sum()))
        text = f"{right} of the {known.sum()} clips whose genre is known are right: "
        text += f"{right / known.sum():.1%} (95 %: {low:.0%} to {high:.0%})."
        parts.insert(0, tag("p", text))
    return section("Test clips", *parts)


def knobs(settings):
    """What was set differently from the defaults."""
    rows = [
        (name, repr(value), repr(KNOBS[name].default))
        for name, value in settings.knobs().items()
        if value != KNOBS[name].default
    ]
    if not rows:
        return section("Settings", tag("p", "All knobs have their defaults."))
    frame = pd.DataFrame(rows, columns=["knob", "this run", "default"])
    return section("Settings other than the defaults", table(frame))


def environment(run):
    """Versions, device, commit."""
    rows = list(made_with.environment(run).items())
    return section("Environment", table(pd.DataFrame(rows, columns=["what", "version"])))


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
