"""The page of eda.py: what is in the data, to be looked at and listened to."""

import numpy as np
import pandas as pd

from stemgenre import eda_stems
from stemgenre.files import replacing
from stemgenre.page import (
    INK,
    cards,
    document,
    fact,
    note,
    printable,
    section,
    table,
    tag,
    wide,
)

MOST_ROWS = 200  # of a table on the page; the csv has all


def write(path, overview, views, features):
    """Writes the page about an Overview and its StemViews (None before separation) to `path`."""
    parts = [
        _headlines(overview),
        section("Copies and leaks", *_copies(overview)),
        section("Genres", *_genres(overview)),
        section("Files", *_files(overview)),
        section("One clip of each genre", *eda_stems.examples(overview, views, features)),
        section("What the network sees on average", *eda_stems.means(views, features)),
        section("Energy of the stems", *eda_stems.energy(views)),
        section("Files that are left over", *_leftovers(overview)),
    ]
    with replacing(path, "w", encoding="utf-8") as file:
        file.write(document("What is in the data", *parts))


def _headlines(overview):
    splits = overview.clips["split"].value_counts()
    figures = [
        (splits.get("train", 0), "training clips"),
        (splits.get("test", 0), "test clips"),
        (len(overview.genres), "genres"),
        (f"{overview.clips['seconds'].sum() / 3600:.1f} h", "of music"),
        (len(overview.copies), "pairs of one recording"),
        (len(overview.contradictions), "of them with two labels"),
        (len(overview.leaks), "of them between train and test"),
        (len(overview.unreadable), "files that cannot be read"),
    ]
    return cards(*(fact(number, text) for number, text in figures))


def _rows(frame, *, file, formats=None):
    """The first rows of a table, and where the others are."""
    parts = [table(frame.head(MOST_ROWS), formats=formats)]
    if len(frame) > MOST_ROWS:
        parts.append(note(f"{MOST_ROWS} of {len(frame)} rows; {file} has all of them."))
    return parts


def _copies(overview):
    yield tag(
        "p",
        "Clips that hold the same recording, found from the sound: the same file, another encoding,"
        " or overlapping cuts. Offset: where the second clip begins within the first. Similarity:"
        " the share of small cells of time and pitch whose waves are alike once the clips are"
        " aligned.",
    )
    if not len(overview.copies):
        yield tag("p", "None were found.")
        return
    shown = overview.copies.copy()
    shown["different_labels"] = np.where(shown["different_labels"], "two labels", "")
    shown.columns = [name.removesuffix("_seconds").replace("_", " ") for name in shown]
    shown = shown.rename(columns={"different labels": "", "offset": "offset s"})
    shown = shown.rename(columns={"overlap": "overlap s"})
    formats = {"offset s": "{:.3f}", "overlap s": "{:.1f}", "similarity": "{:.3f}"}
    if len(overview.contradictions):
        yield tag("p", tag("strong", "One recording, two labels: "), "decide which is right.")
    yield from _rows(shown, file="copies.csv", formats=formats)
    yield tag(
        "p",
        "With SPLIT_BY_GROUP=True, train.py keeps each group of groups.csv on one side of the"
        " validation split. Without it, the validation hears recordings it was trained on.",
    )


def _genres(overview):
    genres = overview.genres

    def draw(figure):
        axes = figure.subplots()
        names = [printable(name) for name in genres["genre"]]
        axes.barh(names, genres["train_clips"], height=0.7, label="training clips")
        axes.plot(genres["train_groups"], names, "|", color=INK, ms=16, mew=2, label="recordings")
        axes.invert_yaxis()
        axes.set_xlabel("training clips")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    yield wide(draw, alt="training clips of each genre", height=1 + 0.32 * len(genres))
    shown = genres.rename(
        columns={
            "label_id": "label id",
            "train_clips": "training clips",
            "test_clips_known": "test clips, if known",
            "train_groups": "recordings",
            "train_minutes": "minutes",
            "median_loudness_lufs": "median LUFS",
            "median_peak_db": "median peak dB",
        }
    )
    formats = dict.fromkeys(("minutes", "median LUFS", "median peak dB"), "{:.1f}")
    yield table(shown, formats=formats)


def _files(overview):
    clips = overview.clips[overview.clips["error"] == ""]
    if not len(clips):
        return
    wanted = {
        "seconds": ("duration", "s"),
        "loudness_lufs": ("loudness", "LUFS"),
        "peak_db": ("peak", "dB of full scale"),
    }

    def draw(figure):
        for axes, (name, (title, unit)) in zip(
            figure.subplots(1, len(wanted)), wanted.items(), strict=True
        ):
            values = [
                clips.loc[clips["split"] == split, name].dropna().astype(float).to_numpy()
                for split in ("train", "test")
            ]
            axes.hist(values, bins=20, stacked=True, label=("train", "test"))
            axes.set(title=title, xlabel=unit, ylabel="clips")
        axes.legend()

    yield wide(draw, alt="durations, loudness and peaks", height=2.8)
    kinds = clips.groupby(["split", "codec", "sample_rate", "channels"], as_index=False).size()
    kinds = kinds.astype({"sample_rate": int, "channels": int})
    yield table(kinds.rename(columns={"sample_rate": "Hz", "size": "clips"}))
    noted = clips[clips["notes"] != ""]
    if not len(noted):
        yield tag("p", "Nothing unusual in any file.")
        return
    yield tag("h3", f"{len(noted)} clips are unusual")
    shown = noted[["split", "file_name", "label", "notes"]]
    yield from _rows(shown.rename(columns={"file_name": "file"}), file="clips.csv")


def _leftovers(overview):
    if len(overview.unreadable):
        yield tag("h3", "Files that cannot be read")
        shown = overview.unreadable[["split", "file_name", "error"]]
        yield from _rows(shown.rename(columns={"file_name": "file"}), file="unreadable.csv")
    if overview.unnamed:
        yield tag("h3", "Audio that no master names")
        paths = pd.DataFrame({"file": [str(path) for path in overview.unnamed]})
        yield from _rows(paths, file="unnamed.csv")
    if not len(overview.unreadable) and not overview.unnamed:
        yield tag("p", "Every file can be read, and every file has a row in the masters.")
