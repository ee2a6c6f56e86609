"""Everything eda.py found out about a dataset, as tables in memory and as csv."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stemgenre.data import split
from stemgenre.data.audio_stats import STAT_COLUMNS, AudioStatsCache, compute_audio_stats
from stemgenre.data.competition import Competition
from stemgenre.data.duplicates import COLUMNS, find_duplicates
from stemgenre.eda.stem_stats import StemStats
from stemgenre.errors import ClipError
from stemgenre.files import ANY_NAME, atomic_write

log = logging.getLogger(__name__)

# Clips beyond these thresholds get a note.
MIN_LENGTH = 0.9  # of CLIP_SECONDS; the rest of a shorter clip's image is empty
MAX_CLIPPED_FRACTION = 1e-4  # of the samples; more may be audible
MAX_DC_OFFSET = 0.01  # of full scale, -40 dB
MAX_SILENT_FRACTION = 0.2  # of a clip
MIN_LOUDNESS = -40.0  # LUFS
MAJORITY = 0.5  # of the clips: a format that more than these have is the usual one
FORMAT_COLUMNS = ("sample_rate", "channels", "codec")
MAX_LOG_LINES = 20  # of one kind


@dataclass(frozen=True)
class DatasetSummary:
    """What is in a dataset.

    `clips`: one row per clip of train and test, with split, label, statistics, error, notes (text,
    separated by "; ") and group. `genres`: one row per genre. `duplicates`: one row per pair of
    clips that contain the same recording. `unlisted`: paths of audio without a row in the masters.
    """

    clips: pd.DataFrame
    genres: pd.DataFrame
    duplicates: pd.DataFrame
    unlisted: list[Path]

    def readable(self, split: str) -> pd.DataFrame:
        """The clips of "train" or "test" whose file can be decoded."""
        return self.clips[(self.clips["split"] == split) & (self.clips["error"] == "")]

    @property
    def total_duration(self) -> str:
        """The duration of all clips as text, in hours or minutes."""
        minutes = self.clips["seconds"].sum() / 60
        return f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.0f} min"

    @property
    def unreadable(self) -> pd.DataFrame:
        """The clips whose file cannot be decoded."""
        return self.clips[self.clips["error"] != ""]

    @property
    def label_conflicts(self) -> pd.DataFrame:
        """The duplicates whose two clips have different labels."""
        return self.duplicates[self.duplicates["different_labels"]]

    @property
    def leaks(self) -> pd.DataFrame:
        """The duplicates with one clip in train and the other in test."""
        return self.duplicates[self.duplicates["where"] == "train and test"]


def analyze_dataset(
    competition: Competition,
    audio_files: Sequence[Path],
    stats_cache: AudioStatsCache,
    *,
    threads: int,
    clip_seconds: float,
    stopped: Callable[[], bool],
) -> DatasetSummary | None:
    """The DatasetSummary of a Competition; None once `stopped()`.

    `audio_files`: all that was found below DATA_DIR, with a row in the masters or without.
    """
    clips = _all_clips(competition)
    clips = compute_audio_stats(clips, stats_cache, threads=threads, stopped=stopped)
    if stopped():
        return None
    clips["sha256"] = [_hash(path, stats_cache) for path in clips["path"]]
    readable = clips.index[clips["error"] == ""]
    names = clips["clip"][readable].tolist()
    pairs = find_duplicates(
        [stats_cache.fingerprint(name) for name in names],
        lambda position: stats_cache.load_wave(names[position]),
        threads=threads,
        stopped=stopped,
    )
    if stopped():
        return None
    pairs["first"], pairs["second"] = readable[pairs["first"]], readable[pairs["second"]]
    pairs = _with_same_files(pairs, clips.loc[readable])
    clips["group"] = split.number_groups(len(clips), pairs[["first", "second"]].to_numpy())
    clips["notes"] = _notes(clips, clip_seconds)
    listed = {path.name for path in clips["path"]}  # by name: a second copy of a file is listed too
    return DatasetSummary(
        clips,
        _genres(clips, competition),
        _duplicates(clips, pairs),
        [path for path in audio_files if path.name not in listed],
    )


def _with_same_files(pairs, clips):
    """`pairs`, and those clips that are the same file, with too little sound to be found by it."""
    rows, firsts = list(pairs.itertuples(index=False, name=None)), {}
    found = {(first, second) for first, second, *_ in rows}
    for row in clips.itertuples():
        first = firsts.setdefault(row.sha256, row.Index)
        if first != row.Index and (first, row.Index) not in found:
            rows.append((first, row.Index, 0.0, row.seconds, 1.0))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _hash(path, stats_cache):
    """A file's hash; "" if it is gone."""
    try:
        return stats_cache.hash_source(path)
    except ClipError:
        return ""


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
    """What is unusual about each clip, a list of texts; empty for most."""
    usual = {}
    for name in FORMAT_COLUMNS:
        fractions = clips[name].value_counts(normalize=True)
        if len(fractions) and fractions.iloc[0] > MAJORITY:
            usual[name] = fractions.index[0]
    texts = []
    for row in clips.itertuples():
        if row.error:
            texts.append("cannot be read")
            continue
        notes = []
        if row.seconds < MIN_LENGTH * clip_seconds:
            notes.append(f"short: {row.seconds:.1f} s")
        if row.clipped_samples > MAX_CLIPPED_FRACTION * row.seconds * row.sample_rate:
            notes.append(f"clipped: {row.clipped_samples:.0f} samples")
        if row.dc_offset > MAX_DC_OFFSET:
            notes.append(f"DC offset: {row.dc_offset:.3f} of full scale")
        if row.silent_fraction > MAX_SILENT_FRACTION:
            notes.append(f"silent: {row.silent_fraction:.0%} of the clip")
        if np.isnan(row.loudness_lufs):
            notes.append("quiet: below -70 LUFS")
        elif row.loudness_lufs < MIN_LOUDNESS:
            notes.append(f"quiet: {row.loudness_lufs:.0f} LUFS")
        for name, value in usual.items():
            if getattr(row, name) != value:
                notes.append(f"{name.replace('_', ' ')}: {_format(getattr(row, name))}")
        texts.append("; ".join(notes))
    return texts


def _format(value):
    return f"{value:.0f}" if isinstance(value, float) else value


def _duplicates(clips, pairs):
    """The pairs with names, labels and splits, those with different labels first."""
    rows = []
    for number, second_number, *measures in pairs[list(COLUMNS)].itertuples(index=False):
        first, second = clips.loc[number], clips.loc[second_number]
        labels = first["label"], second["label"]
        rows.append(
            {
                "where": f"within {first['split']}"
                if first["split"] == second["split"]
                else "train and test",
                "first": first["file_name"],
                "second": second["file_name"],
                "first_label": labels[0],
                "second_label": labels[1],
                "different_labels": all(labels) and labels[0] != labels[1],
                **dict(zip(COLUMNS[2:], measures, strict=True)),
                "group": first["group"],
            }
        )
    columns = ["where", "first", "second", "first_label", "second_label", "different_labels"]
    table = pd.DataFrame(rows, columns=[*columns, *COLUMNS[2:], "group"])
    table["different_labels"] = table["different_labels"].astype(bool)
    return table.sort_values(
        ["different_labels", "where", "group"], ascending=[False, True, True], ignore_index=True
    )


def _genres(clips, competition):
    """One row per genre: clips, recordings, minutes and medians of its training clips."""
    rows = []
    for label, label_id in zip(competition.label_names, competition.label_ids, strict=True):
        train = clips[(clips["split"] == "train") & (clips["label"] == label)]
        test = clips[(clips["split"] == "test") & (clips["label"] == label)]
        rows.append(
            {
                "genre": label,
                "label_id": label_id,
                "train_clips": len(train),
                "known_test_clips": len(test),
                "train_recordings": train["group"].nunique(),
                "train_minutes": train["seconds"].sum() / 60,
                "median_loudness_lufs": train["loudness_lufs"].median(),
                "median_peak_db": train["peak_db"].median(),
            }
        )
    return pd.DataFrame(rows)


def write_tables(folder: Path, summary: DatasetSummary, stem_stats: StemStats | None) -> None:
    """Writes clips, genres, duplicates, groups, unreadable and unlisted as csv into `folder`.

    With StemStats also stems.csv: each stem's mean fraction of the energy, by genre.
    """
    columns = ["split", "clip", "file_name", "path", "label", *STAT_COLUMNS, "notes", "group"]
    tables = {
        "clips": summary.clips[columns],
        "genres": summary.genres,
        "duplicates": summary.duplicates,
        "unreadable": summary.unreadable[["split", "file_name", "path", "error"]],
        "unlisted": pd.DataFrame({"path": [str(path) for path in summary.unlisted]}),
    }
    if stem_stats:
        tables["stems"] = stem_stats.energy
    for name, table in tables.items():
        with atomic_write(folder / f"{name}.csv", "w", **ANY_NAME) as file:
            table.to_csv(file, index=False, float_format="%.6g")
    split.write_groups(folder / split.GROUPS_FILE, summary.clips)


def log_summary(summary: DatasetSummary) -> None:
    """Logs what is in the data in a few lines, and warns of what needs a decision."""
    clips, genres = summary.clips, summary.genres
    splits = clips["split"].value_counts()
    log.info(
        "%d training and %d test clips of %d genres, %s",
        splits.get("train", 0),
        splits.get("test", 0),
        len(genres),
        summary.total_duration,
    )
    counts = [f"{row.genre} {row.train_clips}" for row in genres.itertuples()]
    log.info("training clips: %s", ", ".join(counts))
    for name in FORMAT_COLUMNS:
        counts = clips[name].value_counts().items()
        texts = [f"{_format(value)} ({count} clips)" for value, count in counts]
        log.info("%s: %s", name.replace("_", " "), ", ".join(texts))
    noted = (clips["notes"] != "") & (clips["error"] == "")
    if noted.any():
        log.info("%d clips are unusual, see the notes in clips.csv", noted.sum())
    _warn_of_each("unreadable.csv", summary.unreadable["error"].tolist())
    if summary.unlisted:
        log.warning(
            "%d audio files are neither training nor test clips, for example %s; see unlisted.csv",
            len(summary.unlisted),
            summary.unlisted[0],
        )
    log.info("duplicates and overlapping cuts: %d pairs", len(summary.duplicates))
    for where, count in summary.duplicates["where"].value_counts().items():
        log.info("    %s: %d pairs", where, count)
    conflicts = [
        f"same recording, different labels: {row.first} is {row.first_label}, "
        f"{row.second} is {row.second_label}"
        for row in summary.label_conflicts.itertuples()
    ]
    _warn_of_each("duplicates.csv", conflicts)
    if len(summary.leaks):
        leaked = summary.leaks["second"].nunique()
        log.warning("%d test clips contain the same recording as a training clip (leakage)", leaked)
    if (summary.duplicates["where"] == "within train").any():
        log.info(
            "duplicates within train make validation accuracy too optimistic (leakage); "
            "SPLIT_BY_GROUP=True keeps each recording on one side of the validation split"
        )


def _warn_of_each(file_name, lines):
    for line in lines[:MAX_LOG_LINES]:
        log.warning("%s", line)
    if len(lines) > MAX_LOG_LINES:
        log.warning("... and %d more, see %s", len(lines) - MAX_LOG_LINES, file_name)
