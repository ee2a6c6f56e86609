"""Which clips are of one recording: groups.csv, and a split that keeps them together."""

import csv
import logging
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stemgenre.errors import UserError
from stemgenre.files import replacing

log = logging.getLogger(__name__)

FILE = "groups.csv"  # below EDA_DIR
COLUMNS = ("split", "clip", "file_name", "group")


def number_groups(count, pairs):
    """The group of each of `count` clips, an array of numbers from 0 in the order of the clips.

    `pairs` (first, second) are of one recording each; so are chains of pairs.
    """
    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def write_groups(path, clips):
    """Writes COLUMNS of `clips` as csv, one row per clip."""
    with replacing(path, "w", encoding="utf-8", newline="") as file:
        clips.to_csv(file, columns=list(COLUMNS), index=False)


def read_groups(path, clips):
    """The group of each training clip, an array, in the order of `clips`.

    Raises UserError if there is no such file, or if it does not know a clip.
    """
    again = "run python eda.py first" if not Path(path).is_file() else "run python eda.py again"
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        known = {row["clip"]: int(row["group"]) for row in rows if row["split"] == "train"}
    except OSError as error:
        raise UserError(f"SPLIT_BY_GROUP=True needs {path} ({error.strerror}); {again}") from None
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is not a table of groups ({error!r}); {again}") from None
    missing = [clip for clip in clips["clip"] if clip not in known]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} training clips, for example {missing[0]}; {again}"
        )
    return np.array([known[clip] for clip in clips["clip"]])


def groups_to_keep(settings, clips):
    """read_groups for the training clips with SPLIT_BY_GROUP=True, else None."""
    if not settings.data.split_by_group:
        return None
    groups = read_groups(Path(settings.paths.eda_dir) / FILE, clips)
    log.info("split: by recording, %d clips are of %d", len(groups), len(set(groups)))
    return groups


def split_groups(targets, groups, *, test_size, seed, label_names):
    """(training positions, validation positions): groups stay whole, genres on both sides.

    `targets` and `groups` are arrays with a number for each clip. Each genre gives about
    `test_size` of its clips; the genres with the fewest groups choose first. sklearn's
    StratifiedGroupKFold makes no promise that every genre is on both sides. Raises UserError for a
    genre that cannot be.
    """
    table = pd.crosstab(groups, targets)  # clips of each group in each genre
    order = np.random.default_rng(seed).permutation(len(table))
    counts = table.to_numpy()[order]  # (groups, genres)
    held = np.zeros(len(counts), dtype=bool)
    for genre in np.argsort((counts > 0).sum(axis=0), kind="stable"):
        wanted = max(1, round(test_size * counts[:, genre].sum()))
        mine = np.flatnonzero((counts[:, genre] > 0) & ~held)
        for group in mine:
            if counts[held, genre].sum() + counts[group, genre] <= wanted:
                _hold(group, held, counts)
        if not counts[held, genre].any():  # all are larger than what is wanted
            for group in mine[np.argsort(counts[mine, genre], kind="stable")]:
                if _hold(group, held, counts):
                    break
    for genre, target in enumerate(table.columns):
        if not counts[held, genre].any() or not counts[~held, genre].any():
            raise UserError(
                f"the clips of {label_names[target]} are of too few recordings for both sides of "
                "the validation split; set SPLIT_BY_GROUP=False, or add clips of others"
            )
    validation = np.isin(groups, table.index[order[held]])
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def _hold(group, held, counts):
    """Puts a group on the validation side if every genre keeps a clip to train on."""
    left = counts[~held].sum(axis=0) - counts[group]
    held[group] = (left > 0).all()
    return held[group]
