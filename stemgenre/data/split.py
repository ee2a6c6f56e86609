"""Training and validation clips, one split or folds: stratified by genre, groups of clips whole.

A group is what train_master's column group calls one; eda.py finds clips of one recording and
writes their groups to groups.csv, which SPLIT_BY_GROUP=True reads.
"""

import contextlib
import csv
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from stemgenre.errors import ClipError, UserError
from stemgenre.files import ANY_NAME, atomic_write
from stemgenre.settings import Settings

log = logging.getLogger(__name__)

GROUPS_FILE = "groups.csv"  # below EDA_DIR
GROUPS_COLUMNS = ("split", "clip", "file_name", "group", "sha256")
HashSource = Callable[[Path], str]  # the hash of an audio file


def make_splits(
    settings: Settings,
    clips: pd.DataFrame,
    label_names: Sequence[str],
    *,
    hash_source: HashSource,
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """[(training rows, validation rows)] of `clips`: of each of the FOLDS, or of a hold-out.

    `hash_source` is for SPLIT_BY_GROUP, whose table is of certain files. Raises UserError if the
    clips cannot be split so.
    """
    data = settings.data
    how = {"seed": settings.machine.seed, "label_names": label_names}
    groups = load_groups(settings, clips, hash_source=hash_source)
    if data.folds > 1:
        return split_folds(clips, folds=data.folds, groups=groups, **how)
    return [split_clips(clips, test_size=data.test_size, groups=groups, **how)]


def split_clips(
    clips: pd.DataFrame,
    *,
    test_size: float,
    seed: int,
    label_names: Sequence[str],
    groups: np.ndarray | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(training rows, validation rows) of `clips`, stratified by the column target.

    The validation part is about the fraction `test_size` and has at least one clip of each genre.
    Clips with the same number in `groups` (one for each clip) are on the same side. Raises
    UserError if a genre cannot be on both sides.
    """
    counts = clips["target"].value_counts()
    single = [label_names[target] for target, count in counts.items() if count < 2]
    if single:
        raise UserError(
            f"{', '.join(sorted(single))} has a single clip; the validation split needs two or "
            "more of each genre: one to train on, one to validate"
        )
    if len(counts) < 2:
        raise UserError(
            f"all training clips are {label_names[counts.index[0]]}; two genres are needed"
        )
    if groups is None:
        train, valid = _split_stratified(clips["target"], test_size, seed)
    else:
        targets = clips["target"].to_numpy()
        train, valid = _split_by_group(targets, groups, test_size, seed, label_names)
    return clips.iloc[train], clips.iloc[valid]


def split_folds(
    clips: pd.DataFrame,
    *,
    folds: int,
    seed: int,
    label_names: Sequence[str],
    groups: np.ndarray | None = None,
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """[(training rows, validation rows)] of `clips` for each fold, stratified by the column target.

    Each clip is validated in one fold. Clips with the same number in `groups` (one for each clip)
    are in the same fold. Raises UserError if a genre has too few clips or groups.
    """
    targets = clips["target"].to_numpy()
    if groups is None:
        kind, what, needed, numbers = StratifiedKFold, "clips", folds, np.arange(len(clips))
    else:
        kind, what, needed, numbers = StratifiedGroupKFold, "groups", 2, groups
    for target in np.unique(targets):
        found = len(np.unique(numbers[targets == target]))
        if found < needed:
            raise UserError(
                f"FOLDS={folds} needs {needed} {what} or more in each genre, and "
                f"{label_names[target]} has {found}; use fewer folds, or FOLDS=1"
            )
    if len(np.unique(numbers)) < folds:
        found = len(np.unique(numbers))
        raise UserError(
            f"FOLDS={folds} is more than the {found} {what} of clips; use FOLDS={found} or fewer"
        )
    splitter = kind(folds, shuffle=True, random_state=seed)
    parts = list(splitter.split(targets, targets, groups))
    for train, valid in parts:
        if not len(valid) or len(np.unique(targets[train])) < len(np.unique(targets)):
            raise UserError(
                f"the groups of clips are too unequal for FOLDS={folds}: a fold would have no "
                "clip, or all of a genre's; use fewer folds, or another SEED"
            )
    return [(clips.iloc[train], clips.iloc[valid]) for train, valid in parts]


def _split_stratified(targets, test_size, seed):
    """(training positions, validation positions), both sorted."""
    genres = targets.nunique()
    expected = math.ceil(test_size * len(targets))
    count = min(max(expected, genres), len(targets) - genres)
    if count != expected:
        log.info(
            "split: %d validation clips instead of %d, so that both sides have every genre",
            count,
            expected,
        )
    train, valid = train_test_split(
        np.arange(len(targets)), test_size=count, stratify=targets, random_state=seed
    )
    # sklearn rounds a rare genre's part down to nothing, or up to all of it.
    targets, rng = targets.to_numpy(), np.random.default_rng(seed)
    for genre in np.unique(targets):
        if genre not in targets[valid]:
            train, valid = _move_one(genre, targets, train, valid, rng)
        elif genre not in targets[train]:
            valid, train = _move_one(genre, targets, valid, train, rng)
    return np.sort(train), np.sort(valid)


def _move_one(genre, targets, source, target, rng):
    """(source, target) with a random position of `genre` moved from the one to the other."""
    position = rng.choice(source[targets[source] == genre])
    return source[source != position], np.append(target, position)


def _split_by_group(targets, groups, test_size, seed, label_names):
    """(training positions, validation positions), both sorted: groups whole, genres on both sides.

    Each genre gives about `test_size` of its clips; the genres with the fewest groups choose first.
    sklearn's StratifiedGroupKFold does not guarantee that every genre is on both sides.
    """
    table = pd.crosstab(groups, targets)  # clips of each group in each genre
    order = np.random.default_rng(seed).permutation(len(table))
    counts = table.to_numpy()[order]  # (groups, genres)
    in_valid = np.zeros(len(counts), dtype=bool)
    for genre in np.argsort((counts > 0).sum(axis=0), kind="stable"):
        expected = max(1, round(test_size * counts[:, genre].sum()))
        candidates = np.flatnonzero((counts[:, genre] > 0) & ~in_valid)
        for group in candidates:
            if counts[in_valid, genre].sum() + counts[group, genre] <= expected:
                _move_to_valid(group, in_valid, counts)
        if not counts[in_valid, genre].any():  # every group has more clips than expected
            for group in candidates[np.argsort(counts[candidates, genre], kind="stable")]:
                if _move_to_valid(group, in_valid, counts):
                    break
    for genre, target in enumerate(table.columns):
        if not counts[in_valid, genre].any() or not counts[~in_valid, genre].any():
            raise UserError(
                f"the clips of {label_names[target]} are of too few groups for both sides of the "
                "validation split; set SPLIT_BY_GROUP=False, take the column group, if there "
                "is one, out of train_master, or add clips of other groups"
            )
    valid = np.isin(groups, table.index[order[in_valid]])
    return np.flatnonzero(~valid), np.flatnonzero(valid)


def _move_to_valid(group, in_valid, counts):
    """Whether the group could be moved: every genre has to keep a clip to train on."""
    remaining = counts[~in_valid].sum(axis=0) - counts[group]
    in_valid[group] = (remaining > 0).all()
    return in_valid[group]


def number_groups(count: int, pairs: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """The group of each of `count` clips: (count,) integers from 0, in the order of the clips.

    `pairs` (first, second) are positions of clips of one recording; so are chains of pairs.
    """
    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def write_groups(path: Path, clips: pd.DataFrame) -> None:
    """Writes GROUPS_COLUMNS of `clips` as CSV, one row per clip; `sha256` is its file's hash."""
    with atomic_write(path, "w", **ANY_NAME) as file:
        clips.to_csv(file, columns=list(GROUPS_COLUMNS), index=False)


def read_groups(path: Path) -> pd.DataFrame:
    """GROUPS_COLUMNS of a table that write_groups wrote, the group as an integer.

    An older table has no hashes, which are then empty. Raises UserError if it is missing or not
    such a table.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file; delete it and run python eda.py")
    try:
        with path.open(**ANY_NAME) as file:
            table = [{"sha256": ""} | row for row in csv.DictReader(file)]
        rows = [[row[name] for name in GROUPS_COLUMNS] for row in table]
        table = pd.DataFrame(rows, columns=list(GROUPS_COLUMNS))
        table["group"] = [int(group) for group in table["group"]]
    except OSError as error:
        raise UserError(
            f"SPLIT_BY_GROUP=True needs {path} ({error.strerror}); run python eda.py first"
        ) from None
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is not a table of groups ({error!r}); run python eda.py again"
        ) from None
    return table


def find_changed(groups: pd.DataFrame, clips: pd.DataFrame, hash_source: HashSource) -> str | None:
    """The first of `clips` (columns split, clip, path) whose file is not the one in `groups`.

    Not those without a hash there, as in older tables, and that are gone.
    """
    known = groups.set_index(["split", "clip"])["sha256"].to_dict()
    for row in clips.itertuples():
        with contextlib.suppress(ClipError):
            if (digest := known.get((row.split, row.clip))) and hash_source(row.path) != digest:
                return row.clip
    return None


def load_groups(
    settings: Settings, clips: pd.DataFrame, *, hash_source: HashSource
) -> np.ndarray | None:
    """The group of each training clip, in the order of `clips`; None without groups.

    Clips are in one group if they have the same text in the column group, or if they are one
    recording (SPLIT_BY_GROUP=True), or by a chain of both. Raises UserError if eda.py has not
    written the groups of all these clips, or of other files of their names.
    """
    pairs = _same(clips["group"]) if "group" in clips else []
    if not pairs and not settings.data.split_by_group:
        return None
    if settings.data.split_by_group:
        path = Path(settings.paths.eda_dir) / GROUPS_FILE
        pairs += _same(_recordings(path, clips, hash_source))
    groups = number_groups(len(clips), pairs)
    log.info("split by group: %d clips in %d groups", len(groups), len(set(groups)))
    return groups


def _same(values):
    """[(position of a value, position where it is first)], without those that are missing."""
    first = {}
    return [
        (position, first.setdefault(value, position))
        for position, value in enumerate(values)
        if pd.notna(value)
    ]


def _recordings(path, clips, hash_source):
    """The recording of each clip, by eda.py's table."""
    table = read_groups(path)
    if changed := find_changed(table, clips.assign(split="train"), hash_source):
        raise UserError(f"{path} is of another {changed}; run python eda.py again")
    known = table[table["split"] == "train"].set_index("clip")["group"].to_dict()
    missing = [clip for clip in clips["clip"] if clip not in known]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} training clips, for example {missing[0]}; "
            "run python eda.py again"
        )
    return [known[clip] for clip in clips["clip"]]
