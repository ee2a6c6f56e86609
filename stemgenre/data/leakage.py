"""Recordings that are in train and in test, which a run names at its start."""

import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from stemgenre.data.competition import Competition
from stemgenre.data.find_files import paused_garbage_collector
from stemgenre.data.split import find_changed, read_groups
from stemgenre.errors import ClipError, UserError

log = logging.getLogger(__name__)


@paused_garbage_collector()
def warn_of_leakage(
    competition: Competition, *, groups_file: Path, hash_source: Callable[[Path], str]
) -> None:
    """Warns, once, of test clips that contain the same recording as a training clip.

    These are the same file, by `hash_source`, or one group in eda.py's `groups_file` if it is of
    this competition; nothing is decoded.
    """
    if shared := find_shared(competition, groups_file=groups_file, hash_source=hash_source):
        test, train = min(shared.items())
        log.warning(
            "%d of %d test clips contain the same recording as a training clip, for example %s and "
            "%s (leakage): accuracy on the test clips is too optimistic",
            len(shared),
            len(competition.test),
            test,
            train,
        )


def find_shared(
    competition: Competition, *, groups_file: Path, hash_source: Callable[[Path], str]
) -> dict[str, str]:
    """{test file name: training file name} of clips that contain the same recording.

    See warn_of_leakage.
    """
    return _same_files(competition, hash_source) | _same_groups(
        competition, groups_file, hash_source
    )


def _same_files(competition, hash_source):
    """{test file name: training file name} of clips with the same content."""
    names = {}  # of training clips, by content
    for digest, file_name in _digests(competition.train, hash_source):
        names.setdefault(digest, file_name)
    digests = _digests(competition.test, hash_source)
    return {file_name: names[digest] for digest, file_name in digests if digest in names}


def _digests(clips, hash_source):
    """Yields (content's hash, file name) of the clips that can be read."""
    for path, file_name in zip(clips["path"], clips["file_name"].tolist(), strict=True):
        try:
            yield hash_source(path), file_name
        except ClipError:  # it is gone: separating it will say so
            continue


def _same_groups(competition, groups_file, hash_source):
    """{test file name: training file name} of clips in one group of eda.py's table."""
    try:
        groups = read_groups(groups_file)
    except UserError:  # SPLIT_BY_GROUP, which needs the table, says what is wrong with it
        return {}
    keys = ["split", "clip", "file_name"]
    clips = pd.concat(
        [competition.train.assign(split="train"), competition.test.assign(split="test")]
    )
    of_this_competition = set(clips[keys].itertuples(index=False, name=None))
    if set(groups[keys].itertuples(index=False, name=None)) != of_this_competition:
        return {}
    if find_changed(groups, clips, hash_source):
        return {}  # another dataset, with the same names
    names = groups[groups["split"] == "train"].groupby("group")["file_name"].first()
    test = groups[(groups["split"] == "test") & groups["group"].isin(names.index)]
    return dict(zip(test["file_name"], names[test["group"]], strict=True))
