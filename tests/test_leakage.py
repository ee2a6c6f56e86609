"""When train and test share recordings, a run says so at its start."""

import logging
import shutil
from pathlib import Path

import pytest
from helpers import put_audio, put_table

from stemgenre.data.competition import load_competition
from stemgenre.data.leakage import warn_of_leakage
from stemgenre.data.source_hashes import SourceHashes, once_each

GROUPS = [
    ("split", "clip", "file_name", "group"),
    ("train", "train_0", "train_0.wav", 0),
    ("train", "train_1", "train_1.wav", 1),
    ("test", "test_0", "test_0.wav", 1),
    ("test", "test_1", "test_1.wav", 2),
]


@pytest.fixture
def data(tmp_path):
    """A competition of two training and two test clips."""
    folder = tmp_path / "data"
    put_audio(*(folder / f"{split}_{n}.wav" for split in ("train", "test") for n in (0, 1)))
    rows = [("file_name", "label_id"), ("train_0.wav", 0), ("train_1.wav", 1)]
    put_table(folder / "train_master.tsv", rows)
    put_table(folder / "label_master.tsv", [("label_name", "label_id"), ("a", 0), ("b", 1)])
    put_table(folder / "sample_submit.tsv", [("test_0.wav", 0), ("test_1.wav", 0)])
    return folder


@pytest.fixture
def warnings(data, tmp_path, caplog):
    """A function: what a run on the data says of leakage."""
    caplog.set_level(logging.INFO, logger="stemgenre")

    def warnings():
        caplog.clear()
        competition = load_competition(data, num_classes=2, cache_dir=data / "separated")
        hashes = SourceHashes(tmp_path / "hashes.jsonl")
        groups_file = tmp_path / "groups.csv"
        warn_of_leakage(competition, groups_file=groups_file, hash_source=hashes.sha256)
        return [record.getMessage() for record in caplog.records]

    return warnings


def test_train_and_test_without_a_common_recording_need_no_word(warnings):
    assert warnings() == []


def test_equal_files_are_named(warnings, data):
    shutil.copy(data / "train_1.wav", data / "test_1.wav")
    (line,) = warnings()
    assert line.startswith("1 of 2 test clips contain the same recording")
    assert "test_1.wav and train_1.wav" in line


def test_groups_that_eda_found_are_named_with_equal_files_in_one_line(warnings, data, tmp_path):
    put_table(tmp_path / "groups.csv", GROUPS, separator=",")
    (line,) = warnings()
    assert line.startswith("1 of 2 test clips") and "test_0.wav and train_1.wav" in line
    shutil.copy(data / "train_1.wav", data / "test_1.wav")
    (line,) = warnings()
    assert line.startswith("2 of 2 test clips")


@pytest.mark.parametrize(
    "rows",
    [
        GROUPS[:-1],
        [*GROUPS, ("test", "test_2", "test_2.wav", 0)],
        [*GROUPS[:-1], ("test", "test_1", "test_1.wav", "x")],
        [GROUPS[0], *(("train" if row[0] == "test" else "test", *row[1:]) for row in GROUPS[1:])],
        [("a", "b")],
    ],
    ids=["a clip less", "a clip more", "damaged", "train for test", "another table"],
)
def test_groups_of_other_clips_say_nothing_about_these(warnings, tmp_path, rows):
    put_table(tmp_path / "groups.csv", rows, separator=",")
    assert warnings() == []


def test_groups_of_other_files_with_the_same_names_say_nothing(warnings, data, tmp_path):
    hashes = {path.name: SourceHashes(tmp_path / "h").sha256(path) for path in data.glob("*.wav")}
    rows = [(*GROUPS[0], "sha256"), *((*row, hashes[row[2]]) for row in GROUPS[1:])]
    put_table(tmp_path / "groups.csv", rows, separator=",")
    assert len(warnings()) == 1
    put_audio(tmp_path / "x.wav", data / "train_0.wav")  # now it is another sound
    assert warnings() == []


def test_a_file_is_looked_at_once_however_its_path_is_given():
    looked_at = []
    hash_source = once_each(lambda path: looked_at.append(path) or f"hash of {path}")
    assert hash_source(Path("a.wav")) == hash_source("a.wav") == "hash of a.wav"
    assert hash_source("b.wav") == "hash of b.wav"
    assert looked_at == ["a.wav", "b.wav"]
