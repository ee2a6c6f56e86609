"""The validation split is stratified and the seed's; clips of one recording stay on one side."""

import os

import numpy as np
import pandas as pd
import pytest

from stemgenre.data.split import (
    load_groups,
    make_splits,
    number_groups,
    split_clips,
    split_folds,
    write_groups,
)
from stemgenre.errors import UserError
from stemgenre.settings import load_settings

GENRES = ["blues", "jazz", "rock"]


def table(targets):
    """Clips with these targets, as load_competition gives them."""
    clips = [f"train_{i}" for i in range(len(targets))]
    return pd.DataFrame({"clip": clips, "file_name": clips, "path": clips, "target": targets})


def split(targets, groups=None, **changes):
    options = {"test_size": 0.1, "seed": 42, "label_names": GENRES} | changes
    groups = None if groups is None else np.array(groups)
    return split_clips(table(targets), groups=groups, **options)


def test_the_split_is_stratified_and_complete():
    targets = [0] * 50 + [1] * 30 + [2] * 20
    train, valid = split(targets)
    assert valid["target"].value_counts().sort_index().tolist() == [5, 3, 2]
    assert sorted([*train.index, *valid.index]) == list(range(100))


@pytest.mark.parametrize("groups", [None, [i // 4 for i in range(100)]])
def test_the_split_depends_on_the_seed_alone(groups):
    targets = [0, 1] * 50
    valid = split(targets, groups)[1]["clip"].tolist()
    assert split(targets, groups)[1]["clip"].tolist() == valid
    assert split(targets, groups, seed=1)[1]["clip"].tolist() != valid


def test_every_genre_of_few_clips_is_on_both_sides():
    train, valid = split([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert sorted(valid["target"]) == [0, 1, 2]
    assert sorted(set(train["target"])) == [0, 1, 2]


@pytest.mark.parametrize(
    ("counts", "test_size"),
    [
        ([100, 100, 3], 0.1),
        ([100, 100, 4], 0.9),
        ([100, 100, 2], 0.5),
        ([300, 2, 2], 0.01),
        ([2, 2, 300], 0.9),
        ([2, 2, 2], 0.9),
    ],
)
def test_a_rare_genre_is_on_both_sides_for_every_seed(counts, test_size):
    targets = np.repeat([0, 1, 2], counts)
    for seed in range(20):
        train, valid = split(targets, test_size=test_size, seed=seed)
        assert set(train["target"]) == set(valid["target"]) == {0, 1, 2}
        assert sorted([*train.index, *valid.index]) == list(range(len(targets)))
        assert len(valid) == pytest.approx(test_size * len(targets), abs=3)
        assert valid.equals(split(targets, test_size=test_size, seed=seed)[1])


@pytest.mark.parametrize(
    ("targets", "message"),
    [([0, 0, 0, 1, 1, 2], "rock has a single clip"), ([1, 1, 1], "two genres are needed")],
)
def test_too_few_clips_for_a_split_are_an_error(targets, message):
    with pytest.raises(UserError, match=message):
        split(targets)


def test_pairs_and_chains_of_pairs_are_one_group():
    assert number_groups(6, [(0, 2), (4, 2)]).tolist() == [0, 1, 0, 2, 0, 3]
    assert number_groups(3, []).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_whole_and_genres_stratified(seed):
    rng = np.random.default_rng(seed)
    targets = np.repeat([0, 1, 2], [200, 120, 80])
    groups = np.where(rng.random(400) < 0.4, rng.integers(0, 60, 400) + 1000 * targets, range(400))
    train, valid = split(targets, groups, seed=seed)
    assert sorted([*train.index, *valid.index]) == list(range(400))
    assert not set(groups[train.index]) & set(groups[valid.index])
    counts = valid["target"].value_counts().sort_index().tolist()
    assert counts == pytest.approx([20, 12, 8], abs=2)


def test_of_two_recordings_in_a_genre_the_smaller_one_is_for_validation():
    train, valid = split([0] * 9 + [1] * 9, [0] * 6 + [1] * 3 + [2] * 2 + [3] * 7)
    assert valid["target"].tolist() == [0, 0, 0, 1, 1]
    assert len(train) == 13


def test_a_recording_with_two_labels_leaves_both_genres_on_both_sides():
    groups = [0, 1, 0, 2]  # the first clip of each genre is the same recording
    for seed in range(20):
        train, valid = split([0, 0, 1, 1], groups, seed=seed)
        assert set(train["target"]) == set(valid["target"]) == {0, 1}


def test_a_genre_of_one_recording_is_an_error():
    with pytest.raises(UserError, match=r"jazz are of too few.*SPLIT_BY_GROUP=False"):
        split([0] * 4 + [1] * 4, [0, 1, 2, 3, 9, 9, 9, 9])


@pytest.fixture
def settings(tmp_path):
    return load_settings([f"EDA_DIR={tmp_path}", "SPLIT_BY_GROUP=True"])


def hash_of(path):
    return f"hash of {path}"


def write(folder, clips, groups, splits="train"):
    hashes = clips["path"].map(hash_of)
    write_groups(folder / "groups.csv", clips.assign(split=splits, group=groups, sha256=hashes))


def test_groups_are_joined_by_clip_name_to_training_clips_only(settings, tmp_path):
    clips = table([0, 1, 0, 1])
    write(tmp_path, clips.iloc[::-1], [7, 7, 5, 4])
    assert load_groups(settings, clips, hash_source=hash_of).tolist() == [0, 1, 2, 2]
    write(tmp_path, clips, [1, 2, 3, 4], ["train", "train", "train", "test"])
    with pytest.raises(UserError, match=r"lacks 1 .*train_3; run python eda\.py again"):
        load_groups(settings, clips, hash_source=hash_of)


def test_groups_of_other_files_of_the_same_names_are_refused(settings, tmp_path):
    clips = table([0, 1, 0, 1])
    write(tmp_path, clips, [7, 7, 5, 4])
    clips.loc[2, "path"] = "elsewhere/train_2.wav"
    with pytest.raises(UserError, match=r"is of another train_2; run python eda\.py again"):
        load_groups(settings, clips, hash_source=hash_of)
    older = pd.read_csv(tmp_path / "groups.csv").drop(columns="sha256")
    older.to_csv(tmp_path / "groups.csv", index=False)
    assert load_groups(settings, clips, hash_source=hash_of).tolist() == [0, 0, 1, 2]


def test_groups_of_clips_whose_name_is_not_utf8_are_read(settings, tmp_path):
    clips = table([0, 1]).assign(clip=["a", os.fsdecode(b"caf\xe9")])
    write(tmp_path, clips, [7, 5])
    assert load_groups(settings, clips, hash_source=hash_of).tolist() == [0, 1]


@pytest.fixture
def in_groups():
    """A function: clips with these texts in the column group."""
    return lambda *texts: table([0, 1] * (len(texts) // 2)).assign(group=list(texts))


def test_clips_with_the_same_text_in_the_column_group_are_a_group(tmp_path, in_groups, caplog):
    caplog.set_level("INFO", logger="stemgenre")
    clips = in_groups("Can", None, "Neu!", "can", "Can", None)
    settings = load_settings([f"EDA_DIR={tmp_path}"])
    assert load_groups(settings, clips, hash_source=hash_of).tolist() == [0, 1, 2, 3, 0, 4]
    assert "6 clips in 5 groups" in caplog.text
    assert load_groups(settings, in_groups(None, None), hash_source=hash_of) is None


def test_groups_and_recordings_that_have_a_clip_in_common_are_one_group(
    settings, tmp_path, in_groups
):
    clips = in_groups("Can", None, None, "Neu!", "Can", None)
    write(tmp_path, clips.drop(columns="group"), [0, 1, 2, 2, 4, 4])
    assert load_groups(settings, clips, hash_source=hash_of).tolist() == [0, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("folds", [1, 3])
@pytest.mark.parametrize("by", ["the column group", "recordings"])
def test_a_run_keeps_groups_on_one_side(folds, by, tmp_path):
    groups = np.arange(24) // 4
    clips = table((groups % 2).tolist())
    words = [f"EDA_DIR={tmp_path}", f"FOLDS={folds}", "TEST_SIZE=0.3"]
    if by == "recordings":
        write(tmp_path, clips, groups)
        words.append("SPLIT_BY_GROUP=True")
    else:
        clips["group"] = [f"album {group}" for group in groups]
    splits = make_splits(load_settings(words), clips, GENRES, hash_source=hash_of)
    assert len(splits) == folds
    for train, valid in splits:
        assert len(train) + len(valid) == 24 and len(valid)
        assert not set(groups[train.index]) & set(groups[valid.index])


def test_a_fold_that_would_train_without_a_genre_is_refused():
    clips, groups = table([0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 2, 2])
    with pytest.raises(UserError, match=r"too unequal for FOLDS=2: .* all of a genre's"):
        split_folds(clips, folds=2, seed=0, label_names=GENRES, groups=groups)


def test_groups_are_not_read_unless_asked_for(tmp_path):
    assert (
        load_groups(load_settings([f"EDA_DIR={tmp_path}"]), table([0]), hash_source=hash_of) is None
    )


def test_a_missing_groups_file_says_what_to_run(settings):
    with pytest.raises(UserError, match=r"groups\.csv.*run python eda\.py first"):
        load_groups(settings, table([0, 1]), hash_source=hash_of)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b\n1,2\n",
        b"split,clip,group\ntrain,train_0,x\n",
        b"split,clip\ntrain,a\n",
        b"\xff\xfe\x00\x80",
    ],
)
def test_a_damaged_groups_file_says_what_to_run(settings, tmp_path, content):
    (tmp_path / "groups.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"run python eda\.py again"):
        load_groups(settings, table([0, 1]), hash_source=hash_of)


def test_a_pipe_for_a_groups_file_says_what_to_run(settings, tmp_path):
    os.mkfifo(tmp_path / "groups.csv")
    with pytest.raises(UserError, match=r"groups\.csv.*run python eda\.py"):
        load_groups(settings, table([0, 1]), hash_source=hash_of)
