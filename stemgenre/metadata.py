"""Masters, sample_submit and the audio found below DATA_DIR -> one table of clips.

Labels are joined by file name, never by position.
"""

import filecmp
import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from stemgenre.errors import UserError
from stemgenre.finding import find_audio, find_master, natural_key
from stemgenre.tables import SubmissionForm, read_form, read_master, whole_numbers

log = logging.getLogger(__name__)

LAYOUT = """\
    {data_dir}/
        train_master.tsv     file_name, label_id      (.csv works too)
        label_master.tsv     label_name, label_id
        sample_submit.tsv    file name, label id      (without a header)
        train_sound_1/...    the clips, in any folders below
        test_sound_1/...
or, without masters, one folder of clips per genre: {data_dir}/blues/*.wav, {data_dir}/rock/*.wav
`python train.py --demo` tries everything on a synthesised competition, with nothing to download."""


@dataclass(frozen=True)
class Competition:
    """All clips of a dataset.

    `train` and `test` have the columns clip (its name in the cache), file_name (as the masters
    write it), path, and target (class index; -1 where it is not known). Class index i has the
    label `label_ids[i]`, `label_names[i]`. `form` is None without a sample_submit.
    """

    train: pd.DataFrame
    test: pd.DataFrame
    label_ids: list[int]
    label_names: list[str]
    form: SubmissionForm | None


def load_competition(data_dir, *, num_classes, cache_dir):
    """The Competition below `data_dir`; audio below `cache_dir` is not looked at.

    Raises UserError for whatever is missing or contradicts itself.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"there is no data folder {data_dir}; expected\n{_layout(data_dir)}")
    audio = find_audio(data_dir, skip=Path(cache_dir))
    if not audio:
        nested = [
            folder
            for folder in sorted(data_dir.iterdir())
            if folder.is_dir() and folder.name != "demo" and find_master(folder, "train_master")
        ]
        hint = f"; did you mean DATA_DIR={nested[0]}?" if nested else ""
        raise UserError(f"there is no audio below {data_dir}{hint}; expected\n{_layout(data_dir)}")
    train_master = find_master(data_dir, "train_master")
    if train_master:
        competition = _from_masters(data_dir, train_master, audio)
    else:
        competition = _from_folders(data_dir, audio)
    classes = len(competition.label_ids)
    if num_classes not in ("auto", classes):
        raise UserError(
            f"NUM_CLASSES={num_classes}, but the data has {classes} genres; "
            f'write {classes} or "auto"'
        )
    return competition


def _layout(data_dir):
    return LAYOUT.format(data_dir=data_dir)


def _from_masters(data_dir, train_master, audio):
    label_master = find_master(data_dir, "label_master")
    if not label_master:
        raise UserError(
            f"there is no label_master.csv or .tsv in {data_dir}; expected\n{_layout(data_dir)}"
        )
    labels = _read_labels(label_master)
    by_name = _by_name(audio)
    train = _read_truth(train_master, labels, label_master)
    sample = find_master(data_dir, "sample_submit")
    form = read_form(sample) if sample else None
    if form:
        test = pd.DataFrame({"file_name": [row[form.file_column] for row in form.rows]})
    else:
        known = {_checked_name(name, train_master).name for name in train["file_name"]}
        test = pd.DataFrame(
            {"file_name": [p.name for p in audio if p.name not in known and _is_test(p, data_dir)]}
        )
    test = test.drop_duplicates("file_name", ignore_index=True)
    train["path"] = _find_paths(train["file_name"], by_name, train_master)
    _check_one_label_each(train, train_master)
    train = train.drop_duplicates("path", ignore_index=True)
    test["path"] = _find_paths(test["file_name"], by_name, sample)
    truth = find_master(data_dir, "test_master")
    known = (
        _read_truth(truth, labels, label_master).set_index("file_name")["target"] if truth else {}
    )
    test["target"] = test["file_name"].map(known).fillna(-1).astype(int)
    return _competition(data_dir, train, test, labels, form)


def _check_one_label_each(train, master):
    """Raises UserError if two spellings of one file's name have two labels."""
    for path, rows in train[train["path"].duplicated(keep=False)].groupby("path"):
        if rows["target"].nunique() > 1:
            names = " and ".join(rows["file_name"])
            raise UserError(f"{master} gives {path} two labels, as {names}; keep one")


def _from_folders(data_dir, audio):
    """Genres from folder names; the test is below a folder (or a file on its own) named test..."""
    if any(
        part.lower().startswith(("train_sound", "test_sound"))
        for path in audio
        for part in path.relative_to(data_dir).parts
    ):
        raise UserError(
            f"there is no train_master.csv or .tsv in {data_dir}; expected\n{_layout(data_dir)}"
        )
    below = [path for path in audio if path.parent != data_dir]
    test = [path for path in below if _is_test(path.parent, data_dir)]
    test += [path for path in audio if path.parent == data_dir and _is_test(path, data_dir)]
    train = [path for path in below if not _is_test(path.parent, data_dir)]
    genres = sorted({path.parent.name for path in train}, key=natural_key)
    if len(genres) < 2:
        raise UserError(
            f"{data_dir} has neither masters nor two genre folders; expected\n{_layout(data_dir)}"
        )
    labels = pd.DataFrame({"label_name": genres, "label_id": range(len(genres))})
    names = [path.relative_to(data_dir).as_posix() for path in train]
    targets = [genres.index(path.parent.name) for path in train]
    sample = find_master(data_dir, "sample_submit")
    form = read_form(sample) if sample else None
    test_names = [path.name for path in test]
    if len(set(test_names)) < len(test):
        test_names = [path.relative_to(data_dir).as_posix() for path in test]
    test_table = pd.DataFrame({"file_name": test_names, "path": test})
    if form:
        test_table = pd.DataFrame({"file_name": [row[form.file_column] for row in form.rows]})
        test_table = test_table.drop_duplicates("file_name", ignore_index=True)
        test_table["path"] = _find_paths(test_table["file_name"], _by_name(audio), sample)
    test_table["target"] = -1
    train_table = pd.DataFrame({"file_name": names, "path": train, "target": targets})
    return _competition(data_dir, train_table, test_table, labels, form)


def _competition(data_dir, train, test, labels, form):
    train, test = (
        table.sort_values("file_name", key=lambda c: c.map(natural_key), ignore_index=True)
        for table in (train, test)
    )
    shared = set(train["path"]) & set(test["path"])
    if shared:
        log.warning(
            "%d clips stand in both train and test, for example %s", len(shared), min(shared)
        )
    names = _clip_names([*train["path"], *test["path"]], data_dir)
    train["clip"] = [names[path] for path in train["path"]]
    test["clip"] = [names[path] for path in test["path"]]
    return Competition(
        train, test, labels["label_id"].tolist(), labels["label_name"].tolist(), form
    )


def _clip_names(paths, data_dir):
    """{path: name in the cache}: the file's stem, or its whole path where stems are not unique."""
    stems = pd.Series([path.stem.casefold() for path in set(paths)])
    twice = set(stems[stems.duplicated()])
    return {
        path: path.stem
        if path.stem.casefold() not in twice
        else "__".join(path.relative_to(data_dir).parts)
        for path in paths
    }


def _is_test(path, data_dir):
    return any(part.lower().startswith("test") for part in path.relative_to(data_dir).parts)


def _by_name(audio):
    by_name = {}
    for path in audio:
        by_name.setdefault(path.name, []).append(path)
    return by_name


def _find_paths(names, by_name, master):
    """The audio path of each file name of a master. Raises UserError for those without audio."""
    paths, missing = [], []
    for text in names:
        name = _checked_name(text, master)
        found = [
            path
            for path in by_name.get(name.name, ())
            if path.parts[-len(name.parts) :] == name.parts
        ]
        if not found:
            missing.append(text)
        elif any(not filecmp.cmp(found[0], other, shallow=False) for other in found[1:]):
            raise UserError(
                f"{text} is there more than once, with different content: "
                f"{found[0]} and {found[1]}; keep one"
            )
        paths.append(found[0] if found else None)
    if missing:
        raise UserError(
            f"{len(missing)} clips of {master} have no audio below {master.parent}: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; "
            "unpack all sound folders there"
        )
    return paths


def _checked_name(text, master):
    name = PurePosixPath(text.replace("\\", "/"))
    if not name.name or name.is_absolute() or ".." in name.parts or text[1:2] == ":":
        raise UserError(f"{master} names {text!r}, which is not a file below the data folder")
    return name


def _read_truth(master, labels, label_master):
    """Columns file_name and target (class index) of a master with file_name and label_id."""
    table = read_master(master, ("file_name", "label_id"))
    table["label_id"] = whole_numbers(table["label_id"], master)
    unknown = sorted(set(table["label_id"]) - set(labels["label_id"]))
    if unknown:
        raise UserError(f"{master} has label_id {unknown[0]}, which {label_master} does not name")
    table = table.drop_duplicates(ignore_index=True)
    twice = table["file_name"][table["file_name"].duplicated()]
    if len(twice):
        ids = table["label_id"][table["file_name"] == twice.iloc[0]].tolist()
        raise UserError(
            f"{master} lists {twice.iloc[0]} with two labels: {ids[0]} and {ids[1]}; keep one"
        )
    index = {label_id: i for i, label_id in enumerate(labels["label_id"])}
    table["target"] = table["label_id"].map(index)
    return table[["file_name", "target"]]


def _read_labels(master):
    labels = read_master(master, ("label_name", "label_id"))
    labels["label_id"] = whole_numbers(labels["label_id"], master)
    for column in ("label_name", "label_id"):
        twice = labels[column][labels[column].duplicated()]
        if len(twice):
            raise UserError(f"{master} has the {column} {twice.iloc[0]} twice; keep one")
    if len(labels) < 2:
        raise UserError(f"{master} names {len(labels)} genre; a classifier needs two or more")
    return labels.sort_values("label_id", ignore_index=True)
