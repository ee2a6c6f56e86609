"""Clips to train on besides those of train_master: EXTRA_DATA, and PSEUDO_LABELS of test clips.

They are in the table `extra` of a Competition; none of them is validated.
"""

import csv
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from stemgenre.data.clip_index import ClipIndex
from stemgenre.data.competition import Competition, is_test, read_labels, read_targets
from stemgenre.data.find_files import find_clips, find_master, natural_key, with_digest
from stemgenre.data.leakage import find_shared
from stemgenre.data.split import GROUPS_FILE
from stemgenre.errors import UserError
from stemgenre.files import ANY_NAME
from stemgenre.runtime import Runtime, thread_count
from stemgenre.settings import DataSettings, Settings

log = logging.getLogger(__name__)

SUM_TOLERANCE = 0.01  # of a clip's probabilities, which add up to 1


def extra_folders(data: DataSettings) -> list[Path]:
    """The folders of EXTRA_DATA."""
    folders = (data.extra_data,) if isinstance(data.extra_data, str) else data.extra_data or ()
    return [Path(folder) for folder in folders]


def add_extra(
    competition: Competition,
    settings: Settings,
    runtime: Runtime,
    *,
    hash_source: Callable[[Path], str],
) -> Competition:
    """The Competition with the clips of EXTRA_DATA and PSEUDO_LABELS in its table `extra`.

    The table has the columns of `train` and soft_target: a list of each genre's probability, or
    None where target is all that is known. Its index is different from that of `train`. Clips of
    EXTRA_DATA that are duplicates of a train or test clip are left out, and test clips that are
    duplicates of a train clip, which may be validated. A collective: every rank has to call it.
    Raises UserError for what does not fit the competition, Interrupted if a stop was requested.
    """
    tables, first_index = [], len(competition.train)
    if folders := extra_folders(settings.data):
        found = pd.concat(
            [_read_folder(path, competition.label_names, settings) for path in folders],
            ignore_index=True,
        )
        found["digest"] = [hash_source(path) for path in found["path"]]
        _check_genres(found, competition.label_names)
        found = found.drop_duplicates("digest", ignore_index=True)
        stems_digests = zip(found["path"], found["digest"], strict=True)
        found["clip"] = [with_digest(path.stem, digest) for path, digest in stems_digests]
        found.index += first_index
        first_index += len(found)
        tables.append(_without_duplicates(found, competition, settings, runtime, hash_source))
        _log_counts("EXTRA_DATA", tables[-1], competition.label_names)
    if path := settings.data.pseudo_labels:
        if Path(path).resolve() == settings.paths.output("test_probabilities.csv").resolve():
            raise UserError(
                f"PSEUDO_LABELS={path} would be replaced by this run's own; set another OUTPUT_DIR"
            )
        confident = read_pseudo_labels(
            Path(path), competition, confidence=settings.data.pseudo_confidence
        )
        groups_file = Path(settings.paths.eda_dir) / GROUPS_FILE
        shared = find_shared(competition, groups_file=groups_file, hash_source=hash_source)
        is_shared = confident["file_name"].isin(shared.keys())
        if is_shared.any():
            log.warning(
                "PSEUDO_LABELS: %d test clips are left out: they contain the same recording as a "
                "training clip",
                is_shared.sum(),
            )
        confident = confident[~is_shared]
        confident.index += first_index
        tables.append(confident)
        _log_counts("PSEUDO_LABELS", confident, competition.label_names)
    if not tables:
        return competition
    columns = [*competition.train.columns, "soft_target"]
    return dataclasses.replace(competition, extra=pd.concat(tables)[columns])


def with_extra(train: pd.DataFrame, valid: pd.DataFrame, extra: pd.DataFrame) -> pd.DataFrame:
    """The training clips `train` and those of a Competition's `extra`, each with its index.

    Not those of a group that is in `valid`. A clip's augmentation depends on its index: that of the
    others is as without `extra`.
    """
    if not len(extra):
        return train
    extra = extra[~extra["group"].isin(valid["group"].dropna())]
    return pd.concat([train.assign(soft_target=None), extra])


def _read_folder(folder, label_names, settings):
    """Columns file_name, path, target, group and soft_target of a folder of EXTRA_DATA."""
    if not folder.is_dir():
        raise UserError(f"EXTRA_DATA: there is no folder {folder}")
    audio = find_clips(folder, skip=[settings.cache_folder])
    if train_master := find_master(folder, "train_master"):
        if not (label_master := find_master(folder, "label_master")):
            raise UserError(f"EXTRA_DATA: {train_master} needs a label_master beside it")
        labels = read_labels(label_master)
        table = read_targets(train_master, labels, label_master)
        table["path"] = ClipIndex(audio).find_paths(table["file_name"], train_master)
        genres = labels["label_name"].iloc[table["target"]].tolist()
    else:
        paths = [p for p in audio if p.parent != folder and not is_test(p.parent, folder)]
        table = pd.DataFrame({"path": paths, "group": None})
        genres = [path.parent.name for path in paths]
    if not len(table):
        raise UserError(
            f"EXTRA_DATA: {folder} has no clips; it needs a folder of them for each genre, or "
            "masters of its own"
        )
    table["file_name"] = [str(path) for path in table["path"]]
    table["target"] = _find_targets(genres, label_names, folder)
    return table.assign(soft_target=None)


def _check_genres(found, label_names):
    """Raises UserError for files with the same content in two genres."""
    first = {}
    for row in found.itertuples():
        other = first.setdefault(row.digest, row)
        if other.target != row.target:
            raise UserError(
                f"EXTRA_DATA: {other.file_name} ({label_names[other.target]}) and {row.file_name} "
                f"({label_names[row.target]}) are the same file in two genres; remove one"
            )


def _find_targets(genres, label_names, folder):
    """The class index of each genre, by its name as it is, or else in any case."""
    known = {name.casefold(): index for index, name in enumerate(label_names)}
    known |= {name: index for index, name in enumerate(label_names)}
    targets = [known.get(genre, known.get(genre.casefold())) for genre in genres]
    unknown = {genre for genre, target in zip(genres, targets, strict=True) if target is None}
    if unknown:
        raise UserError(
            f"EXTRA_DATA: {folder} has clips of {', '.join(sorted(unknown, key=natural_key))}; "
            f"the competition's genres are {', '.join(label_names)}"
        )
    return targets


def _without_duplicates(found, competition, settings, runtime, hash_source):
    """`found` without the clips that are in the competition; the main process searches them."""
    reasons = {}
    if runtime.is_main:
        known = pd.concat([competition.train, competition.test], ignore_index=True)
        names = {hash_source(row.path): row.file_name for row in known.itertuples()}
        same = {row.clip: names.get(row.digest) for row in found.itertuples()}
        reasons = {clip: f"is the same file as {name}" for clip, name in same.items() if name}
        rest = found[~found["clip"].isin(reasons.keys())]
        if len(rest):
            reasons |= _find_duplicates(rest, known, settings, runtime)
    reasons = runtime.all_gather(reasons)[0]
    if runtime.sync_stop():
        raise runtime.interrupted("EXTRA_DATA: stopped; the same command goes on")
    left_out = found["clip"].isin(reasons.keys())
    for row in found[left_out].itertuples():
        log.warning("EXTRA_DATA: %s is left out: it %s", row.file_name, reasons[row.clip])
    return found[~left_out]


def _find_duplicates(found, known, settings, runtime):
    """{clip: why it is left out} of the clips `found` that cannot be read, or are in `known`."""
    # only here: they load SciPy's and librosa's parts that nothing else of a run needs
    from stemgenre.data.audio_stats import AudioStatsCache, compute_audio_stats
    from stemgenre.data.duplicates import find_duplicates

    threads = thread_count(settings.machine)

    def stopped():
        return bool(runtime.stop.signal_number)

    stats_cache = AudioStatsCache.of(settings)
    clips = pd.concat([found, known], ignore_index=True)
    clips = compute_audio_stats(clips, stats_cache, threads=threads, stopped=stopped)
    failed = clips["error"][: len(found)]
    reasons = {
        clip: error.removeprefix(f"{path} ")  # "cannot be decoded: ..."
        for clip, path, error in zip(found["clip"], found["path"], failed, strict=False)
        if error
    }
    clips = clips[clips["error"] == ""]
    names, file_names = clips["clip"].tolist(), clips["file_name"].tolist()
    if stopped():
        return reasons
    pairs = find_duplicates(
        [stats_cache.fingerprint(name) for name in names],
        lambda position: stats_cache.load_wave(names[position]),
        num_queries=len(found) - len(reasons),
        threads=threads,
        stopped=stopped,
    )
    for first, second in zip(pairs["first"], pairs["second"], strict=True):
        reasons[names[first]] = f"contains the same recording as {file_names[second]}"
    return reasons


def read_pseudo_labels(path: Path, competition: Competition, *, confidence: float) -> pd.DataFrame:
    """The test clips whose top-1 probability in a test_probabilities.csv is `confidence` or more.

    They have the columns of `train` and soft_target, a list of probabilities; target is its
    largest. The index is their position in `test`. Raises UserError if the file is missing, no
    such table, or of another competition.
    """
    probabilities = _read_probabilities(path, competition)
    test = competition.test.assign(group=None).reset_index(drop=True)
    test["soft_target"] = [probabilities[name] for name in test["file_name"]]
    test["target"] = [row.index(max(row)) for row in test["soft_target"]]
    return test[[max(row) >= confidence for row in test["soft_target"]]]


def _read_probabilities(path, competition):
    """{file name: [probability of each genre]} of the test clips."""
    name = f"PSEUDO_LABELS={path}"
    if path.exists() and not path.is_file():
        raise UserError(f"{name} is not a file")
    try:
        with path.open(**ANY_NAME) as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    except csv.Error:
        rows = []
    if not rows or rows[0][0] != "file_name":
        raise UserError(f"{name} is not a test_probabilities.csv, whose first column is file_name")
    header, genres = rows.pop(0), competition.label_names
    if sorted(header[1:]) != sorted(genres):
        raise UserError(
            f"{name} is not of this competition: its genres are {', '.join(header[1:])}, the "
            f"competition's {', '.join(genres)}"
        )
    columns = [header.index(genre) for genre in genres]
    probabilities = {}
    for number, row in enumerate(rows, start=2):
        try:
            values = [float(row[column]) for column in columns]
        except (ValueError, IndexError):
            values = []
        if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > SUM_TOLERANCE:
            raise UserError(f"{name} row {number} has no probabilities that add up to 1")
        probabilities[row[0]] = values
    if different := probabilities.keys() ^ set(competition.test["file_name"]):
        raise UserError(
            f"{name} is not of this competition: {len(different)} test clips are in one of them "
            f"alone, for example {min(different, key=natural_key)}"
        )
    return probabilities


def _log_counts(setting, clips, label_names):
    if not len(clips):
        log.warning("%s adds no clips to train on", setting)
        return
    counts = clips["target"].value_counts()
    texts = [f"{name} {counts.get(target, 0)}" for target, name in enumerate(label_names)]
    log.info("%s: %d more clips to train on: %s", setting, len(clips), ", ".join(texts))
