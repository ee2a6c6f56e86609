"""EXTRA_DATA and PSEUDO_LABELS: more clips to train on, none of them validated or predicted."""

import json
import logging
import runpy
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers import put_table, run_training

from stemgenre.data import extra
from stemgenre.data.competition import load_competition
from stemgenre.data.extra import add_extra, extra_folders, with_extra
from stemgenre.data.find_files import with_digest
from stemgenre.data.source_hashes import SourceHashes
from stemgenre.data.split import split_clips
from stemgenre.errors import Interrupted, UserError
from stemgenre.files import sha256
from stemgenre.runtime import start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.settings import load_settings

SR = 8000
TRAIN = {"train_0.wav": 0, "train_1.wav": 1, "train_2.wav": 0, "train_3.wav": 1}
TEST = ("test_0.wav", "test_1.wav")


def noise(seed, *, seconds=6.0):
    """A sound that is like no other: (samples,)."""
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * SR))


def put(path, wave):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, SR)


@pytest.fixture
def data(tmp_path):
    """A competition of blues and Jazz, four training and two test clips."""
    folder = tmp_path / "data"
    for seed, name in enumerate([*TRAIN, *TEST]):
        put(folder / "sounds" / name, noise(seed))
    put_table(folder / "train_master.tsv", [("file_name", "label_id"), *TRAIN.items()])
    put_table(folder / "label_master.tsv", [("label_name", "label_id"), ("blues", 0), ("Jazz", 1)])
    put_table(folder / "sample_submit.tsv", [(name, 0) for name in TEST])
    return folder


@pytest.fixture
def load(data, tmp_path):
    """A function: the Competition with EXTRA_DATA or PSEUDO_LABELS, as train.py loads it."""

    def load(*overrides, stop_signal=0):
        folders = (f"DATA_DIR={data}", f"EDA_DIR={tmp_path / 'eda'}", "NUM_CLASSES=2")
        settings = load_settings([*folders, *overrides, "DEVICE=cpu"])
        cache = settings.cache_folder
        competition = load_competition(
            data, num_classes=2, cache_dir=cache, extra_folders=extra_folders(settings.data)
        )
        hashes = SourceHashes(cache / "hashes.jsonl")
        with start_runtime(settings.machine) as runtime:
            runtime.stop.signal_number = stop_signal
            return add_extra(competition, settings, runtime, hash_source=hashes.sha256)

    return load


def message(load, *overrides):
    """The error of such a setting: one line."""
    with pytest.raises(UserError) as error:
        load(*overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_genre_folders_are_found_by_name_and_else_in_any_case(load, tmp_path):
    for seed, name in enumerate(["more/blues/a.wav", "more/JAZZ/a.wav", "others/Jazz/b.wav"]):
        put(tmp_path / name, noise(100 + seed))
    competition = load(f"EXTRA_DATA={(str(tmp_path / 'more'), str(tmp_path / 'others'))}")
    extra = competition.extra
    assert [path.name for path in extra["path"]] == ["a.wav", "a.wav", "b.wav"]
    assert extra["target"].tolist() == [0, 1, 1]
    assert extra["clip"].nunique() == 3
    assert len(competition.train) == 4 and len(competition.test) == 2
    assert set(competition.train.columns) <= set(extra.columns)


def test_masters_of_its_own_are_joined_by_the_genres_names(load, tmp_path):
    more = tmp_path / "more"
    for seed, name in enumerate(["x.wav", "y.wav", "test_9.wav"]):
        put(more / "sounds" / name, noise(100 + seed))
    put_table(more / "train_master.csv", [("file_name", "label_id"), ("x.wav", 7), ("y.wav", 3)])
    put_table(more / "label_master.csv", [("label_id", "label_name"), (3, "jazz"), (7, "blues")])
    extra = load(f"EXTRA_DATA={more}").extra
    assert {p.name: t for p, t in zip(extra["path"], extra["target"], strict=True)} == {
        "x.wav": 0,
        "y.wav": 1,
    }


def test_extra_clips_change_nothing_for_the_others(load, tmp_path):
    """Names in the cache, indices and the split are those of before, whatever the files' names."""
    put(tmp_path / "more" / "blues" / "train_0.wav", noise(100))
    put(tmp_path / "more" / "blues" / "copy.wav", noise(100))
    before, after = load(), load(f"EXTRA_DATA={tmp_path / 'more'}")
    pd.testing.assert_frame_equal(before.train, after.train)
    pd.testing.assert_frame_equal(before.test, after.test)
    assert before.extra.empty and len(after.extra) == 1, "one of two equal files is enough"
    assert not set(after.extra["clip"]) & {*after.train["clip"], *after.test["clip"]}
    options = {"test_size": 0.5, "seed": 1, "label_names": after.label_names}
    train, valid = split_clips(after.train, **options)
    more = with_extra(train, valid, after.extra)
    assert len(more) == len(train) + 1 and more.index.is_unique
    assert not set(after.extra.index) & {*train.index, *valid.index}
    assert more["clip"].tolist()[: len(train)] == train["clip"].tolist()
    assert more["target"].dtype == train["target"].dtype
    pd.testing.assert_frame_equal(with_extra(train, valid, before.extra), train)


def test_a_folder_of_extra_data_below_the_data_folder_is_not_the_competitions(load, data):
    put(data / "more" / "blues" / "test_7.wav", noise(100))
    (data / "sample_submit.tsv").unlink()
    competition = load(f"EXTRA_DATA={data / 'more'}")
    assert sorted(competition.test["file_name"]) == sorted(TEST)
    assert len(competition.extra) == 1


def test_duplicates_of_train_and_test_clips_are_left_out_and_named(load, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="stemgenre")
    more = tmp_path / "more" / "blues"
    put(more / "cut.wav", 0.3 * noise(1)[SR // 2 :])  # of train_1
    put(more / "louder.wav", 2 * noise(4))  # test_0
    put(more / "new.wav", noise(100))
    put(more / "of_new.wav", 0.5 * noise(100))  # the competition has neither
    shutil.copy(tmp_path / "data" / "sounds" / "train_2.wav", more / "file.wav")
    (more / "broken.wav").write_bytes(b"this is no audio")
    extra = load(f"EXTRA_DATA={tmp_path / 'more'}").extra
    assert [path.name for path in extra["path"]] == ["new.wav", "of_new.wav"]
    for name, reason in {
        "cut.wav": "train_1.wav",
        "louder.wav": "test_0.wav",
        "file.wav": "same file as train_2.wav",
        "broken.wav": "cannot be decoded",
    }.items():
        (line,) = [
            r.getMessage() for r in caplog.records if f"{name} is left out" in r.getMessage()
        ]
        assert reason in line
    assert "EXTRA_DATA: 2 more clips to train on: blues 2, Jazz 0" in caplog.text


def test_a_file_that_is_in_two_genres_is_refused(load, tmp_path):
    put(tmp_path / "more" / "blues" / "a.wav", noise(100))
    put(tmp_path / "more" / "Jazz" / "b.wav", noise(100))
    text = message(load, f"EXTRA_DATA={tmp_path / 'more'}")
    assert "a.wav (blues)" in text and "b.wav (Jazz) are the same file in two genres" in text


def test_fingerprints_are_kept_for_the_next_start(load, tmp_path):
    put(tmp_path / "more" / "blues" / "a.wav", noise(100))
    load(f"EXTRA_DATA={tmp_path / 'more'}")
    entries = {path: path.stat().st_mtime_ns for path in tmp_path.glob("eda/audio_stats/*.npz")}
    assert len(entries) == 7
    load(f"EXTRA_DATA={tmp_path / 'more'}")
    assert entries == {p: p.stat().st_mtime_ns for p in tmp_path.glob("eda/audio_stats/*.npz")}


def test_a_stopped_search_ends_the_run(load, tmp_path):
    put(tmp_path / "more" / "blues" / "a.wav", noise(100))
    with pytest.raises(Interrupted):
        load(f"EXTRA_DATA={tmp_path / 'more'}", stop_signal=15)


def test_extra_data_that_does_not_fit_is_one_line(load, tmp_path):
    more = tmp_path / "more"
    assert f"no folder {more}" in message(load, f"EXTRA_DATA={more}")
    more.mkdir()
    assert f"{more} has no clips" in message(load, f"EXTRA_DATA={more}")
    put(more / "a.wav", noise(100))  # in no genre's folder
    assert f"{more} has no clips" in message(load, f"EXTRA_DATA={more}")
    for genre in ("polka", "blues", "tango"):
        put(more / genre / "a.wav", noise(100))
    text = message(load, f"EXTRA_DATA={more}")
    assert f"{more} has clips of polka, tango; the competition's genres are blues, Jazz" in text
    put_table(more / "train_master.tsv", [("file_name", "label_id"), ("blues/a.wav", 7)])
    assert "train_master.tsv needs a label_master" in message(load, f"EXTRA_DATA={more}")
    put_table(more / "label_master.tsv", [("label_name", "label_id"), ("ska", 7)])
    assert "has clips of ska" in message(load, f"EXTRA_DATA={more}")
    assert not (tmp_path / "eda").exists(), "nothing is done"


def test_without_extra_data_nothing_of_its_search_is_imported(data, monkeypatch):
    for name in ("pyloudnorm", "stemgenre.data.duplicates", "stemgenre.data.fingerprint"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    add_extra = runpy.run_path(extra.__file__)["add_extra"]
    found = load_competition(data, num_classes=2, cache_dir="none")
    assert add_extra(found, load_settings(), None, hash_source=None) is found


# ----------------------------------------------------------------------------------- pseudo labels


def put_probabilities(path, rows, genres=("blues", "Jazz")):
    put_table(path, [("file_name", *genres), *rows], separator=",")


def test_confident_test_clips_get_soft_labels(load, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="stemgenre")
    path = tmp_path / "test_probabilities.csv"
    rows = [("test_1.wav", "0.100000", "0.900000"), ("test_0.wav", "0.6", "0.4")]
    put_probabilities(path, rows)
    competition = load(f"PSEUDO_LABELS={path}")
    (clip,) = competition.extra.itertuples()
    assert (clip.clip, clip.target, clip.soft_target) == ("test_1", 1, [0.1, 0.9])
    assert clip.Index not in competition.train.index
    assert "PSEUDO_LABELS: 1 more clips to train on: blues 0, Jazz 1" in caplog.text
    assert competition.test["target"].tolist() == [-1, -1]
    put_probabilities(path, [(name, *row[::-1]) for name, *row in rows], ("Jazz", "blues"))
    extra = load(f"PSEUDO_LABELS={path}", "PSEUDO_CONFIDENCE=0.5").extra
    assert extra["target"].tolist() == [0, 1], "genres are joined by name"
    put_probabilities(path, [(name, 0.5, 0.5) for name in TEST])
    assert load(f"PSEUDO_LABELS={path}").extra.empty


def test_test_clips_that_are_training_clips_too_get_no_soft_labels(load, data, tmp_path, caplog):
    """They may be validated."""
    put(data / "sounds" / "test_0.wav", noise(2))  # as train_2
    path = tmp_path / "test_probabilities.csv"
    put_probabilities(path, [(name, 0.01, 0.99) for name in TEST])
    assert load(f"PSEUDO_LABELS={path}").extra["clip"].tolist() == ["test_1"]
    assert "PSEUDO_LABELS: 1 test clips are left out" in caplog.text


def test_extra_clips_and_pseudo_labelled_ones_are_told_apart(load, tmp_path):
    """By their indices, on which the augmentation of a clip depends."""
    put(tmp_path / "more" / "blues" / "a.wav", noise(100))
    path = tmp_path / "test_probabilities.csv"
    put_probabilities(path, [(name, 0.01, 0.99) for name in TEST])
    competition = load(f"EXTRA_DATA={tmp_path / 'more'}", f"PSEUDO_LABELS={path}")
    clips = with_extra(competition.train, competition.train[:0], competition.extra)
    assert len(clips) == 7 and clips.index.is_unique
    assert competition.extra["target"].tolist() == [0, 1, 1]


def test_extra_clips_of_a_group_that_is_held_out_are_not_trained_on(load, tmp_path):
    put(tmp_path / "more" / "a.wav", noise(100))
    put(tmp_path / "more" / "b.wav", noise(101))
    rows = [("file_name", "label_id", "group"), ("a.wav", 0, "album"), ("b.wav", 0, "")]
    put_table(tmp_path / "more" / "train_master.csv", rows, separator=",")
    labels = [("label_name", "label_id"), ("blues", 0), ("Jazz", 1)]
    put_table(tmp_path / "more" / "label_master.csv", labels, separator=",")
    competition = load(f"EXTRA_DATA={tmp_path / 'more'}")
    train = competition.train[:2].assign(group="album")
    valid = competition.train[2:]
    assert len(with_extra(train, valid, competition.extra)) == 4
    assert len(with_extra(valid, train, competition.extra)) == 3


def test_pseudo_labels_that_the_run_itself_would_replace_are_refused(load, tmp_path):
    path = tmp_path / "test_probabilities.csv"
    put_probabilities(path, [(name, 0.01, 0.99) for name in TEST])
    words = f"PSEUDO_LABELS={tmp_path / 'x' / '..' / path.name}", f"OUTPUT_DIR={tmp_path}"
    assert "would be replaced by this run's own; set another OUTPUT_DIR" in message(load, *words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read: No such file"),
        ("", "is not a test_probabilities.csv"),
        ("\0\1\2", "is not a test_probabilities.csv"),
        ("test_0.wav,0\ntest_1.wav,1\n", "is not a test_probabilities.csv"),
        ("file_name,blues,rock\n", "its genres are blues, rock, the competition's blues, Jazz"),
        ("file_name,blues,Jazz\ntest_0.wav,1,0\n", "1 test clips are in one of them alone"),
        ("file_name,blues,Jazz\ntest_0.wav,1,0\nother.wav,1,0\n", "2 test clips .*other.wav"),
        ("file_name,blues,Jazz\ntest_0.wav,1,x\n", "row 2 has no probabilities"),
        ("file_name,blues,Jazz\ntest_0.wav,nan,1\n", "row 2 has no probabilities"),
        ("file_name,blues,Jazz\ntest_0.wav,1\n", "row 2 has no probabilities"),
    ],
)
def test_pseudo_labels_that_do_not_fit_are_one_line(load, tmp_path, text, expected):
    path = tmp_path / "test_probabilities.csv"
    if text is not None:
        path.write_text(text)
    text = message(load, f"PSEUDO_LABELS={path}")
    assert f"PSEUDO_LABELS={path} " in text
    assert pd.Series(text).str.contains(expected).all(), text


def test_a_run_validates_and_predicts_the_same_clips(
    small_settings, finished_run, small_data, tmp_path
):
    """An extra clip and pseudo-labelled ones are trained on, and change no table's rows."""
    shutil.copytree(small_data / "separated", tmp_path / "separated")
    source = tmp_path / "more" / "rock" / "train_0.wav"
    put(source, noise(0, seconds=2))
    cache = StemCache(tmp_path / "separated", model="synthesised", sample_rate=11025)
    stems = np.random.default_rng(0).normal(0, 0.1, (4, 2 * 11025))
    cache.write(with_digest("train_0", sha256(source)), stems, source)
    out = run_training(
        small_settings(
            f"EXTRA_DATA={tmp_path / 'more'}",
            f"PSEUDO_LABELS={finished_run / 'test_probabilities.csv'}",
            "PSEUDO_CONFIDENCE=0",
            f"SEPARATION_CACHE_DIR={tmp_path / 'separated'}",
            f"EDA_DIR={tmp_path / 'eda'}",
        )
    )
    for name in ("valid_predictions.csv", "test_probabilities.csv"):
        before, after = (pd.read_csv(folder / name) for folder in (finished_run, out))
        assert before["file_name"].tolist() == after["file_name"].tolist()
    clips, plain = (
        json.loads((folder / "summary.json").read_text())["clips"] for folder in (out, finished_run)
    )
    assert clips == plain | {"train": plain["train"] + 1 + plain["test"]}
