"""All that eda.py found out as tables, in memory and as csv."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stemgenre import groups
from stemgenre.copies import COLUMNS, find_copies
from stemgenre.files import replacing
from stemgenre.survey import MEASURES, survey_clips

log = logging.getLogger(__name__)

SHORT = 0.9  # of CLIP_SECONDS; less is worth a note, as the rest of its image is empty
CLIPPED = 1e-4  # share of samples at full scale from which on it can be heard
DC = 0.01  # of full scale, -40 dB
SILENT = 0.2  # share of a clip
QUIET = -40.0  # LUFS
MOST_LINES = 20  # of one kind in the terminal
MOST = 0.5  # what more than half of the clips share is what the others differ from


@dataclass(frozen=True)
class Overview:
    """What is in the data.

    `clips`: one row per clip of train and test, with split, label, measures, error, notes (texts,
    "; " between them) and group. `genres`: one row per genre. `copies`: one row per pair of clips
    of one recording. `unnamed`: paths of audio that no master names.
    """

    clips: pd.DataFrame
    genres: pd.DataFrame
    copies: pd.DataFrame
    unnamed: list[Path]

    def readable(self, split):
        """The clips of "train" or "test" whose file can be decoded."""
        return self.clips[(self.clips["split"] == split) & (self.clips["error"] == "")]

    @property
    def unreadable(self):
        """The clips whose file cannot be decoded."""
        return self.clips[self.clips["error"] != ""]

    @property
    def contradictions(self):
        """The pairs of one recording whose clips have different labels."""
        return self.copies[self.copies["different_labels"]]

    @property
    def leaks(self):
        """The pairs of one recording, of which train has one clip and test the other."""
        return self.copies[self.copies["where"] == "train and test"]


def take_stock(competition, audio, survey, *, threads, clip_seconds, stopped):
    """The Overview of a Competition, measured through a Survey; None once `stopped()`.

    `audio`: paths of all that was found in the folders.
    """
    clips = survey_clips(_all_clips(competition), survey, threads=threads, stopped=stopped)
    if stopped():
        return None
    readable = clips.index[clips["error"] == ""]
    names = clips["clip"][readable].tolist()
    pairs = find_copies(
        [survey.fingerprint(name) for name in names],
        lambda position: survey.wave(names[position]),
        threads=threads,
        stopped=stopped,
    )
    if stopped():
        return None
    pairs["first"], pairs["second"] = readable[pairs["first"]], readable[pairs["second"]]
    clips["group"] = groups.number_groups(len(clips), pairs[["first", "second"]].to_numpy())
    clips["notes"] = _notes(clips, clip_seconds)
    known = {path.name for path in clips["path"]}  # a second copy of a named file is named too
    return Overview(
        clips,
        _genres(clips, competition),
        _copies(clips, pairs),
        [path for path in audio if path.name not in known],
    )


def _all_clips(competition):
    """The clips of both splits with the columns split, clip, file_name, path and label."""
    clips = pd.concat(
        [competition.train.assign(split="train"), competition.test.assign(split="test")],
        ignore_index=True,
    )
    names = dict(enumerate(competition.label_names))
    clips["label"] = clips["target"].map(names).fillna("")
    return clips[["split", "clip", "file_name", "path", "label"]]


def _notes(clips, clip_seconds):
    """What is unusual about each clip, a text; empty for most."""
    usual = {}
    for name in ("sample_rate", "channels", "codec"):
        shares = clips[name].value_counts(normalize=True)
        if len(shares) and shares.iloc[0] > MOST:
            usual[name] = shares.index[0]
    texts = []
    for row in clips.itertuples():
        if row.error:
            texts.append("cannot be read")
            continue
        notes = []
        if row.seconds < SHORT * clip_seconds:
            notes.append(f"short: {row.seconds:.1f} s")
        if row.clipped_samples > CLIPPED * row.seconds * row.sample_rate:
            notes.append(f"clipped: {row.clipped_samples:.0f} samples")
        if row.dc > DC:
            notes.append(f"DC: {row.dc:.3f} of full scale")
        if row.silent_share > SILENT:
            notes.append(f"silent: {row.silent_share:.0%} of it")
        if not row.loudness_lufs > QUIET:
            level = "" if np.isnan(row.loudness_lufs) else f": {row.loudness_lufs:.0f} LUFS"
            notes.append(f"quiet{level}")
        for name, value in usual.items():
            if getattr(row, name) != value:
                notes.append(f"{name.replace('_', ' ')}: {_plain(getattr(row, name))}")
        texts.append("; ".join(notes))
    return texts


def _plain(value):
    return f"{value:.0f}" if isinstance(value, float) else value


def _copies(clips, pairs):
    """The pairs with names, labels and where they stand: the most telling first."""
    rows = []
    for first, second, *numbers in pairs[list(COLUMNS)].itertuples(index=False):
        one, two = clips.loc[first], clips.loc[second]
        both = one["split"] == two["split"]
        rows.append(
            {
                "where": f"within {one['split']}" if both else "train and test",
                "first": one["file_name"],
                "second": two["file_name"],
                "first_label": one["label"],
                "second_label": two["label"],
                "different_labels": bool(one["label"] and two["label"])
                and one["label"] != two["label"],
                **dict(zip(COLUMNS[2:], numbers, strict=True)),
                "group": one["group"],
            }
        )
    columns = ["where", "first", "second", "first_label", "second_label", "different_labels"]
    table = pd.DataFrame(rows, columns=[*columns, *COLUMNS[2:], "group"])
    table["different_labels"] = table["different_labels"].astype(bool)
    return table.sort_values(
        ["different_labels", "where", "group"], ascending=[False, True, True], ignore_index=True
    )


def _genres(clips, competition):
    """One row per genre: clips, recordings, hours and medians of its training clips."""
    rows = []
    for label, label_id in zip(competition.label_names, competition.label_ids, strict=True):
        train = clips[(clips["split"] == "train") & (clips["label"] == label)]
        test = clips[(clips["split"] == "test") & (clips["label"] == label)]
        rows.append(
            {
                "genre": label,
                "label_id": label_id,
                "train_clips": len(train),
                "test_clips_known": len(test),
                "train_groups": train["group"].nunique(),
                "train_minutes": train["seconds"].sum() / 60,
                "median_loudness_lufs": train["loudness_lufs"].astype(float).median(),
                "median_peak_db": train["peak_db"].astype(float).median(),
            }
        )
    return pd.DataFrame(rows)


def write_tables(folder, overview, views):
    """Writes clips, genres, copies, groups, unreadable and unnamed as csv into `folder`.

    With StemViews also stems: each genre's mean shares of energy.
    """
    clips = overview.clips
    columns = ["split", "clip", "file_name", "path", "label", *MEASURES, "notes", "group"]
    tables = {
        "clips": clips[columns],
        "genres": overview.genres,
        "copies": overview.copies,
        "unreadable": overview.unreadable[["split", "file_name", "path", "error"]],
        "unnamed": pd.DataFrame({"path": [str(path) for path in overview.unnamed]}),
    }
    if views:
        tables["stems"] = views.energy
    for name, table in tables.items():
        with replacing(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            table.to_csv(file, index=False, float_format="%.6g")
    groups.write_groups(folder / groups.FILE, clips)


def log_summary(overview):
    """Says in some lines what is in the data, and warns of what needs a decision."""
    clips, genres = overview.clips, overview.genres
    splits = clips["split"].value_counts()
    log.info(
        "%d training and %d test clips of %d genres, %.1f hours",
        splits.get("train", 0),
        splits.get("test", 0),
        len(genres),
        clips["seconds"].sum() / 3600,
    )
    log.info(
        "training clips: %s",
        ", ".join(f"{row.genre} {row.train_clips}" for row in genres.itertuples()),
    )
    for name in ("sample_rate", "channels", "codec"):
        counts = clips[name].value_counts()
        log.info(
            "%s: %s",
            name.replace("_", " "),
            ", ".join(f"{_plain(value)} ({count} clips)" for value, count in counts.items()),
        )
    noted = (clips["notes"] != "") & (clips["error"] == "")
    if noted.any():
        log.info("%d clips are unusual, see the notes in clips.csv", noted.sum())
    _warn_of_each("unreadable.csv", [row.error for row in overview.unreadable.itertuples()])
    if overview.unnamed:
        log.warning(
            "no master names %d audio files, for example %s",
            len(overview.unnamed),
            overview.unnamed[0],
        )
    log.info("copies and overlapping cuts: %d pairs", len(overview.copies))
    for where, count in overview.copies["where"].value_counts().items():
        log.info("    %s: %d pairs", where, count)
    _warn_of_each(
        "copies.csv",
        [
            f"one recording, two labels: {row.first} is {row.first_label}, "
            f"{row.second} is {row.second_label}"
            for row in overview.contradictions.itertuples()
        ],
    )
    if len(overview.leaks):
        log.warning(
            "%d test clips share their recording with a training clip",
            overview.leaks["second"].nunique(),
        )
    if (overview.copies["where"] == "within train").any():
        log.info("SPLIT_BY_GROUP=True keeps each recording on one side of the validation split")


def _warn_of_each(file, lines):
    for line in lines[:MOST_LINES]:
        log.warning("%s", line)
    if len(lines) > MOST_LINES:
        log.warning("... and %d more, see %s", len(lines) - MOST_LINES, file)
