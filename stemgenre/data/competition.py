"""The masters, sample_submit and the audio found below DATA_DIR -> one table of clips.

Labels are joined by file name, never by position.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from stemgenre.data.clip_index import ClipIndex, is_copy
from stemgenre.data.find_files import (
    SYSTEM_FOLDERS,
    clip_names,
    find_clips,
    find_master,
    natural_key,
    near_names,
    paused_garbage_collector,
)
from stemgenre.data.tables import (
    SubmissionTemplate,
    parse_label_ids,
    read_master,
    read_template,
)
from stemgenre.errors import CONTROL_CHARACTER, UserError

log = logging.getLogger(__name__)

SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
LAYOUT = """\
    {data_dir}/
        train_master.tsv     file_name, label_id      (.csv works too)
        label_master.tsv     label_name, label_id
        sample_submit.tsv    file name, label id      (with or without a header)
        train_sound_1/...    the clips, in any folders below
        test_sound_1/...
or, without masters, one folder of clips per genre: {data_dir}/blues/*.wav, {data_dir}/rock/*.wav
in place of any clip.wav, a folder clip/ with its stems: vocals.wav, drums.wav, bass.wav, other.wav
`python train.py --demo` tries everything on a synthesised competition, with nothing to download."""


@dataclass(frozen=True)
class Competition:
    """All clips of a dataset.

    `train` and `test` have the columns clip (its name in the cache), file_name (as the masters
    write it), path, and target (class index; -1 where it is not known). `train` has a column group,
    too: the text in train_master's column of that name, or None. Class index i has the label
    `label_ids[i]`, `label_names[i]`. `template` is None without a sample_submit. `extra`, which is
    empty unless extra.add_extra adds to it, has the columns of `train`: clips to train on only.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    label_ids: list[int]
    label_names: list[str]
    template: SubmissionTemplate | None
    extra: pd.DataFrame


@paused_garbage_collector()
def load_competition(
    data_dir: Path | str,
    *,
    num_classes: int | str,
    cache_dir: Path | str,
    extra_folders: Sequence[Path] = (),
) -> Competition:
    """The Competition below `data_dir`; audio below `cache_dir` and `extra_folders` is left out.

    `num_classes` is the expected number of genres or "auto". Raises UserError for whatever is
    missing or contradictory.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"there is no data folder {data_dir}; {_expected_layout(data_dir)}")
    audio = find_clips(data_dir, skip=[Path(cache_dir), *extra_folders])
    if not audio:
        nested = [
            folder
            for folder in sorted(data_dir.iterdir())
            if folder.is_dir()
            and folder.name not in ("demo", *SYSTEM_FOLDERS)
            and find_master(folder, "train_master")
        ]
        hint = f"; did you mean DATA_DIR={nested[0]}?" if nested else ""
        raise UserError(f"there is no audio below {data_dir}{hint}; {_expected_layout(data_dir)}")
    train_master = find_master(data_dir, "train_master")
    if train_master:
        competition = _from_masters(data_dir, train_master, audio)
    else:
        competition = _from_genre_folders(data_dir, audio)
    found = len(competition.label_ids)
    if num_classes not in ("auto", found):
        raise UserError(
            f'NUM_CLASSES={num_classes}, but the data has {found} genres; write {found} or "auto"'
        )
    return competition


def _not_found(data_dir, name):
    """That a table is not there, and which files may be meant to be it."""
    near = near_names(data_dir, name)[:3]
    is_book = any(Path(each).suffix.lower() in SPREADSHEETS for each in near)
    way_out = "save it as CSV under that name" if is_book else "rename it"
    return f"there is no {name}.csv or .tsv in {data_dir}" + (
        f"; if {' or '.join(near)} is meant, {way_out}" if near else ""
    )


def _expected_layout(data_dir):
    return "expected\n" + LAYOUT.format(data_dir=data_dir)


def _from_masters(data_dir, train_master, audio):
    """The Competition of train_master, label_master, and the optional other tables."""
    label_master = find_master(data_dir, "label_master")
    if not label_master:
        raise UserError(f"{_not_found(data_dir, 'label_master')}; {_expected_layout(data_dir)}")
    labels = read_labels(label_master)
    if len(labels) < 2:
        raise UserError(f"{label_master} has {len(labels)} genre; a classifier needs two or more")
    train = read_targets(train_master, labels, label_master)
    index = ClipIndex(audio)
    train["path"] = index.find_paths(train["file_name"], train_master)
    train = _without_repeated(train, train_master)
    template, test = _read_sample_submit(data_dir, index)
    if template is None:
        test = _test_clips(data_dir, index, labelled=train["path"])
        missing = _not_found(data_dir, "sample_submit")
        if not len(test):
            raise UserError(
                f"there are no test clips: {missing}; nor is there audio whose name, or folder's "
                "name, begins with test"
            )
        log.warning("%s; the submission has a row for each of %d test clips", missing, len(test))
    test_master = find_master(data_dir, "test_master")
    if test_master:
        known = read_targets(test_master, labels, label_master).set_index("file_name")["target"]
        test["target"] = test["file_name"].map(known).fillna(-1).astype(int)
        if (test["target"] < 0).all():
            log.warning("%s names none of the test clips: there is no test accuracy", test_master)
    return _build_competition(train, test, labels, template)


def _test_clips(data_dir, index, *, labelled):
    """Columns file_name and path of the test clips where no table names them.

    They are what is named test, or lies in such a folder, but the labelled clips and copies of them
    under the same name; of copies in such folders, the first. One that shares its name with a clip
    of other content is named with its folders.
    """
    known, paths = {}, []
    for path in labelled:
        known.setdefault(path.name, []).append(path)
    for path in index.clips:
        same_name = known.setdefault(path.name, [])
        if is_test(path, data_dir) and not any(is_copy(path, other) for other in same_name):
            same_name.append(path)
            paths.append(path)
    names = [
        path.relative_to(data_dir).as_posix() if len(known[path.name]) > 1 else path.name
        for path in paths
    ]
    return pd.DataFrame({"file_name": names, "path": paths})


def _from_genre_folders(data_dir, audio):
    """The Competition of a tree with one folder per genre.

    Test clips are below a folder named test..., or are files named test... beside the genres.
    """
    if near_names(data_dir, "train_master") or any(
        part.lower().startswith(("train_sound", "test_sound"))
        for path in audio
        for part in path.relative_to(data_dir).parts
    ):
        raise UserError(f"{_not_found(data_dir, 'train_master')}; {_expected_layout(data_dir)}")
    nested = [path for path in audio if path.parent != data_dir]
    train_paths = [path for path in nested if not is_test(path.parent, data_dir)]
    genres = sorted({path.parent.name for path in train_paths}, key=natural_key)
    for genre in genres:
        if CONTROL_CHARACTER.search(genre):  # it would be printed and saved wherever the genre is
            raise UserError(f"the folder {genre!r} has a control character in its name; rename it")
    if len(genres) < 2:
        raise UserError(
            f"{data_dir} has neither masters nor two genre folders; {_expected_layout(data_dir)}"
        )
    train = pd.DataFrame(
        {
            "file_name": [path.relative_to(data_dir).as_posix() for path in train_paths],
            "path": train_paths,
            "target": [genres.index(path.parent.name) for path in train_paths],
            "group": None,
        }
    )
    template, test = _read_sample_submit(data_dir, ClipIndex(audio))
    if template is None:
        paths = [path for path in nested if is_test(path.parent, data_dir)]
        paths += [path for path in audio if path.parent == data_dir and is_test(path, data_dir)]
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            names = [path.relative_to(data_dir).as_posix() for path in paths]
        if near_names(data_dir, "sample_submit"):
            log.warning(
                "%s; the submission has a row for each of %d test clips",
                _not_found(data_dir, "sample_submit"),
                len(paths),
            )
        test = pd.DataFrame({"file_name": names, "path": paths})
    labels = pd.DataFrame({"label_name": genres, "label_id": range(len(genres))})
    return _build_competition(train, test, labels, template)


def is_test(path: Path, data_dir: Path) -> bool:
    """Whether a path below `data_dir` has a part that begins with test."""
    return any(part.lower().startswith("test") for part in path.relative_to(data_dir).parts)


def _read_sample_submit(data_dir, index):
    """(template, table of its files with file_name and path), or (None, None) without one."""
    sample_submit = find_master(data_dir, "sample_submit")
    if not sample_submit:
        return None, None
    template = read_template(sample_submit)
    names = dict.fromkeys(row[template.file_column] for row in template.rows)
    paths = index.find_paths(names, sample_submit)
    return template, pd.DataFrame({"file_name": [*names], "path": paths})


def _build_competition(train, test, labels, template):
    """The Competition of two tables with file_name, path and target (-1 if `test` has none)."""
    if "target" not in test:
        test["target"] = -1
    train, test = _in_natural_order(train), _in_natural_order(test)
    in_both = set(_texts(train["path"])) & set(_texts(test["path"]))
    if in_both:
        log.warning(
            "%d clips are in both train and test, for example %s",
            len(in_both),
            min(map(Path, in_both)),
        )
    names = clip_names([*train["path"], *test["path"]])
    train["clip"], test["clip"] = names[: len(train)], names[len(train) :]
    label_ids, label_names = labels["label_id"].tolist(), labels["label_name"].tolist()
    return Competition(train, test, label_ids, label_names, template, extra=train.iloc[:0])


def _in_natural_order(table):
    """The rows of a table by file_name."""
    keys = [natural_key(name) for name in table["file_name"]]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return table.iloc[order].reset_index(drop=True)


def read_targets(master: Path, labels: pd.DataFrame, label_master: Path) -> pd.DataFrame:
    """Columns file_name, target (class index) and group (text or None) of a master.

    `labels` are read_labels of `label_master`. Raises UserError for an unknown label_id, and for a
    file with two of them or with two groups.
    """
    table = read_master(master, ("file_name", "label_id"), optional="group")
    if "group" not in table:
        table["group"] = None
    table["group"] = table["group"].replace("", None)
    table["label_id"] = parse_label_ids(table["label_id"], master)
    unknown = sorted(set(table["label_id"]) - set(labels["label_id"]))
    if unknown:
        raise UserError(f"{master} has label_id {unknown[0]}, which {label_master} lacks")
    table = table.drop_duplicates(ignore_index=True)
    repeated = table["file_name"][table["file_name"].duplicated()]
    if len(repeated):
        name = repeated.iloc[0]
        first, second = table[table["file_name"] == name].to_dict("records")[:2]
        what = "label" if first["label_id"] != second["label_id"] else "group"
        values = [row["label_id" if what == "label" else "group"] for row in (first, second)]
        raise UserError(f"{master} gives {name} two {what}s: {values[0]} and {values[1]}; keep one")
    index = {label_id: i for i, label_id in enumerate(labels["label_id"])}
    table["target"] = table["label_id"].map(index)
    return table[["file_name", "target", "group"]]


def _texts(paths):
    """Paths as text, which is hashed and compared in a tenth of the time."""
    return paths.map(str)


def _without_repeated(train, master):
    """The rows of `train` without those of a file that is in it under another name, too.

    Raises UserError if such a file has two labels.
    """
    texts = _texts(train["path"])
    for path, rows in train[texts.duplicated(keep=False)].groupby("path"):
        if rows["target"].nunique() > 1:
            names = " and ".join(rows["file_name"])
            raise UserError(f"{master} gives {path} two labels, as {names}; keep one")
    return train[~texts.duplicated()].reset_index(drop=True)


def read_labels(master: Path) -> pd.DataFrame:
    """Columns label_name and label_id of label_master, sorted by id: row i is class index i.

    Raises UserError for a name or an id that is there twice.
    """
    labels = read_master(master, ("label_name", "label_id"))
    labels["label_id"] = parse_label_ids(labels["label_id"], master)
    for column in ("label_name", "label_id"):
        repeated = labels[column][labels[column].duplicated()]
        if len(repeated):
            raise UserError(f"{master} has the {column} {repeated.iloc[0]} twice; keep one")
    return labels.sort_values("label_id", ignore_index=True)
