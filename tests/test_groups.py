"""Clips of one recording stay on one side of the split, and a stale groups.csv is named."""

import numpy as np
import pandas as pd
import pytest

import config
from stemgenre.dataset import split_clips
from stemgenre.errors import UserError
from stemgenre.groups import groups_to_keep, number_groups, read_groups, write_groups
from stemgenre.settings import load_settings

NAMES = ["blues", "jazz", "rock"]


def table(targets):
    clips = [f"train_{i}" for i in range(len(targets))]
    return pd.DataFrame({"clip": clips, "file_name": clips, "target": targets})


def split(targets, groups, **changes):
    options = {"test_size": 0.1, "seed": 42, "label_names": NAMES} | changes
    return split_clips(table(targets), groups=np.array(groups), **options)


def test_pairs_and_chains_of_pairs_are_one_group():
    assert number_groups(6, [(0, 2), (4, 2)]).tolist() == [0, 1, 0, 2, 0, 3]
    assert number_groups(3, []).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_whole_and_genres_are_shared_out(seed):
    rng = np.random.default_rng(seed)
    targets = np.repeat([0, 1, 2], [200, 120, 80])
    groups = np.where(rng.random(400) < 0.4, rng.integers(0, 60, 400) + 1000 * targets, range(400))
    train, valid = split(targets, groups, seed=seed)
    positions = [part.index.to_numpy() for part in (train, valid)]
    assert sorted(np.concatenate(positions)) == list(range(400))
    assert not set(groups[positions[0]]) & set(groups[positions[1]])
    counts = valid["target"].value_counts().sort_index().tolist()
    assert counts == pytest.approx([20, 12, 8], abs=2)


def test_the_split_is_the_seeds():
    targets, groups = [0, 1] * 50, [i // 4 for i in range(100)]
    first, again = split(targets, groups)[1], split(targets, groups)[1]
    assert first["clip"].tolist() == again["clip"].tolist()
    assert split(targets, groups, seed=1)[1]["clip"].tolist() != first["clip"].tolist()


def test_two_recordings_of_a_genre_are_enough_and_the_smaller_one_is_held_out():
    train, valid = split([0] * 9 + [1] * 9, [0] * 6 + [1] * 3 + [2] * 2 + [3] * 7)
    assert valid["target"].tolist() == [0, 0, 0, 1, 1]
    assert len(train) == 13


def test_a_recording_with_two_labels_leaves_both_genres_something():
    groups = [0, 1, 0, 2]  # the first clip of each genre is the same recording
    for seed in range(20):
        train, valid = split([0, 0, 1, 1], groups, seed=seed)
        assert set(train["target"]) == set(valid["target"]) == {0, 1}


def test_a_genre_of_one_recording_is_named():
    with pytest.raises(UserError, match=r"jazz are of too few.*SPLIT_BY_GROUP=False"):
        split([0] * 4 + [1] * 4, [0, 1, 2, 3, 9, 9, 9, 9])


@pytest.fixture
def settings(tmp_path):
    return load_settings(config, [f"EDA_DIR={tmp_path}", "SPLIT_BY_GROUP=True"])


def write(folder, clips, groups, splits="train"):
    write_groups(folder / "groups.csv", clips.assign(split=splits, group=groups))


def test_groups_are_read_by_name_and_only_of_training_clips(settings, tmp_path):
    clips = table([0, 1, 0, 1])
    write(tmp_path, clips.iloc[::-1], [7, 7, 5, 4], ["train", "train", "train", "train"])
    assert groups_to_keep(settings, clips).tolist() == [4, 5, 7, 7]
    write(tmp_path, clips, [1, 2, 3, 4], ["train", "train", "train", "test"])
    with pytest.raises(UserError, match=r"lacks 1 .*train_3; run python eda\.py again"):
        groups_to_keep(settings, clips)


def test_without_the_knob_nothing_is_read(tmp_path):
    assert groups_to_keep(load_settings(config, [f"EDA_DIR={tmp_path}"]), table([0])) is None


def test_no_file_and_a_damaged_one_say_what_to_run(settings, tmp_path):
    with pytest.raises(UserError, match=r"groups\.csv.*run python eda\.py first"):
        groups_to_keep(settings, table([0, 1]))
    for text in ("", "a,b\n1,2\n", "split,clip,group\ntrain,train_0,x\n", "split,clip\ntrain,a\n"):
        (tmp_path / "groups.csv").write_text(text)
        with pytest.raises(UserError, match=r"run python eda\.py again"):
            read_groups(tmp_path / "groups.csv", table([0, 1]))
    (tmp_path / "groups.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match=r"run python eda\.py again"):
        read_groups(tmp_path / "groups.csv", table([0, 1]))
