"""A dataset reads the same in every table format and folder layout.

Labels belong to file names: no order of rows, columns or files moves a label to another clip.
"""

import hashlib
import os
import random
import shutil
import unicodedata

import numpy as np
import pytest
from helpers import put_audio, put_table, run_python

from stemgenre.data.competition import load_competition
from stemgenre.data.find_files import clip_names, natural_key
from stemgenre.errors import UserError
from stemgenre.separation.cache import StemCache

GENRES = [("ロック", 7), ("blues", 0), ("jazz", 42)]  # neither alphabetical nor contiguous
TRAIN = [(f"train_{n}.wav", GENRES[n % 3]) for n in range(12)]
TEST = [f"test_{n}.wav" for n in (10, 2, 0, 1)]
EXPECTED = {name: label for name, (label, _) in TRAIN}


def load(folder, num_classes="auto"):
    return load_competition(folder, num_classes=num_classes, cache_dir=folder / "separated")


def train_labels(competition):
    """{file name: genre} of the training clips."""
    train = competition.train
    return {
        name: competition.label_names[target]
        for name, target in zip(train["file_name"], train["target"], strict=True)
    }


def put_clips(folder):
    put_audio(*(folder / "train_sound_1" / name for name, _ in TRAIN))
    put_audio(*(folder / "test_sound_1" / name for name in TEST))


def put_masters(folder, *, suffix=".tsv", order="as is", index=False, shuffle=0, **text_format):
    """Writes the three tables; `text_format` is the separator, line end and encoding."""
    train = [("file_name", "label_id"), *((name, genre[1]) for name, genre in TRAIN)]
    labels = [("label_name", "label_id"), *GENRES]
    tables = {"train_master": train, "label_master": labels}
    for name, (header, *rows) in tables.items():
        random.Random(shuffle).shuffle(rows)
        rows = [header, *rows]
        if order == "reversed":
            rows = [row[::-1] for row in rows]
        if index:
            rows = [("" if n == 0 else n - 1, *row) for n, row in enumerate(rows)]
        put_table(folder / (name + suffix), rows, **text_format)
    put_table(folder / ("sample_submit" + suffix), [(name, 0) for name in TEST], **text_format)


@pytest.fixture(scope="module")
def competition(tmp_path_factory):
    """The competition with tables in their usual format; read only."""
    folder = tmp_path_factory.mktemp("competition")
    put_clips(folder)
    put_masters(folder)
    return load(folder)


@pytest.fixture
def data(tmp_path):
    """A folder with the audio; the test adds the tables."""
    put_clips(tmp_path)
    return tmp_path


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize(
    "table_format",
    [
        {},
        {"index": True},
        {"order": "reversed"},
        {"order": "reversed", "index": True},
        {"shuffle": 5},
        {"line_end": "\r\n"},
        {"encoding": "utf-8-sig"},
        {"encoding": "utf-16"},
        {"encoding": "shift_jis", "line_end": "\r\n"},
    ],
    ids=str,
)
def test_every_table_format_gives_the_same_clips(data, suffix, separator, table_format):
    put_masters(data, suffix=suffix, separator=separator, **table_format)
    competition = load(data, num_classes=3)
    assert train_labels(competition) == EXPECTED
    assert competition.label_ids == [0, 7, 42]
    assert competition.label_names == ["blues", "ロック", "jazz"]
    assert competition.train["file_name"].tolist() == [name for name, _ in TRAIN]
    assert competition.test["file_name"].tolist() == sorted(TEST, key=natural_key)
    assert set(competition.test["target"]) == {-1}


def test_every_clip_has_its_own_file_and_name_in_the_cache(competition):
    for table in (competition.train, competition.test):
        assert [path.name for path in table["path"]] == table["file_name"].tolist()
        assert table["clip"].tolist() == [path.stem for path in table["path"]]


def test_clips_are_in_natural_order(competition):
    assert competition.test["file_name"].tolist() == [f"test_{n}.wav" for n in (0, 1, 2, 10)]
    names = competition.train["file_name"].tolist()
    assert names.index("train_2.wav") < names.index("train_10.wav")


def test_the_natural_order_is_the_same_on_every_machine():
    names = ["a10", "a2", "A3", "a02", "B1", "b", "2", "10", "a2b", "", "a²", "a٣"]
    orders = {
        tuple(sorted(random.Random(seed).sample(names, len(names)), key=natural_key))
        for seed in range(30)
    }
    assert len(orders) == 1
    (order,) = orders
    assert order.index("a2") < order.index("A3") < order.index("a10")


@pytest.mark.parametrize(
    "place",
    [
        "{name}",
        "sounds/{name}",
        "train_sound_1/train_sound_1/{name}",
        "テスト data/[a]/{name}",
    ],
)
def test_audio_is_found_in_any_folder(tmp_path, place):
    names = [name for name, _ in TRAIN] + TEST
    put_audio(*(tmp_path / place.format(name=name) for name in names))
    put_masters(tmp_path)
    assert train_labels(load(tmp_path)) == EXPECTED


def test_names_with_accents_are_found_however_the_file_system_writes_them(tmp_path):
    """macOS, and archives from there, take composed letters apart."""
    composed = ["ガ.wav", "é/ü.wav", "plain.wav"]
    put_audio(tmp_path / "test_0.wav")
    put_audio(*(tmp_path / "sounds" / unicodedata.normalize("NFD", name) for name in composed))
    rows = [("file_name", "label_id"), *((name, i % 2) for i, name in enumerate(composed))]
    put_table(tmp_path / "train_master.tsv", [*rows, (unicodedata.normalize("NFD", "ガ.wav"), 0)])
    put_table(tmp_path / "label_master.tsv", [("label_name", "label_id"), ("a", 0), ("b", 1)])
    assert len(load(tmp_path, num_classes=2).train) == 3


def test_masters_may_include_the_folder(data):
    put_masters(data)
    rows = [("file_name", "label_id"), ("train_sound_1/train_0.wav", 7)]
    put_table(data / "train_master.tsv", [*rows, ("train_sound_1\\train_1.wav", 0)])
    assert [path.name for path in load(data).train["path"]] == ["train_0.wav", "train_1.wav"]


def test_a_folder_in_a_table_says_which_of_two_files_of_one_name_is_meant(tmp_path):
    put_audio(*(tmp_path / place for place in ("a/1.wav", "b/1.wav", "test/1.wav", "test/2.wav")))
    rows = [("file_name", "label_id"), ("b/1.wav", 0), ("a/1.wav", 1)]
    put_table(tmp_path / "train_master.tsv", rows)
    put_table(tmp_path / "label_master.tsv", [("label_name", "label_id"), ("x", 0), ("y", 1)])
    put_table(tmp_path / "sample_submit.tsv", [("test/1.wav", 0), ("test/2.wav", 0)])
    found = load(tmp_path)
    for table in (found.train, found.test):
        for name, path in zip(table["file_name"], table["path"], strict=True):
            assert path == tmp_path / name
    put_table(tmp_path / "train_master.tsv", [*rows, ("c/1.wav", 1)])
    with pytest.raises(UserError, match=r"1 clips of .* have no audio .*: c/1\.wav"):
        load(tmp_path)


def test_a_training_and_a_test_clip_of_one_name_do_not_share_an_entry_of_the_cache(tmp_path):
    names = [f"{folder}/{n}.wav" for folder in ("train", "test") for n in (1, 2)]
    put_audio(*(tmp_path / name for name in names))
    rows = [("file_name", "label_id"), *((name, n) for n, name in enumerate(names[:2]))]
    put_table(tmp_path / "train_master.tsv", rows)
    put_table(tmp_path / "label_master.tsv", [("label_name", "label_id"), ("x", 0), ("y", 1)])
    put_table(tmp_path / "sample_submit.tsv", [(name, 0) for name in names[2:]])
    found = load(tmp_path)
    assert len({*found.train["clip"], *found.test["clip"]}) == 4


def test_two_files_of_one_name_are_compared_by_their_content(data):
    """Not by size and time: unpacking can give both to all files."""
    put_masters(data)
    original, copy = data / "train_sound_1" / "train_0.wav", data / "copy" / "train_0.wav"
    copy.parent.mkdir()
    copy.write_bytes(original.read_bytes()[::-1])
    for path in (original, copy):
        os.utime(path, (1e9, 1e9))
    with pytest.raises(UserError, match=r"train_0\.wav is ambiguous"):
        load(data)
    for folder in "ab":  # equal files, which are found first
        shutil.copytree(data / "train_sound_1", data / folder)
    with pytest.raises(UserError, match=r"train_0\.wav is ambiguous"):
        load(data)


def test_without_sample_submit_no_training_clip_is_predicted(tmp_path):
    """Its folder may be called testing, as it may hold all clips."""
    put_audio(*(tmp_path / "testing" / name for name in [name for name, _ in TRAIN] + TEST))
    put_masters(tmp_path)
    (tmp_path / "sample_submit.tsv").unlink()
    assert load(tmp_path).test["file_name"].tolist() == sorted(TEST, key=natural_key)


def test_without_sample_submit_test_clips_may_have_the_names_of_training_clips(tmp_path):
    numbers = [("train_sound/1.wav", 7), ("train_sound/2.wav", 0)]
    put_masters(tmp_path)
    put_table(tmp_path / "train_master.tsv", [("file_name", "label_id"), *numbers])
    (tmp_path / "sample_submit.tsv").unlink()
    names = ("train_sound/1.wav", "train_sound/2.wav", "test/1.wav", "test/3.wav")
    put_audio(*(tmp_path / name for name in names))
    shutil.copy(tmp_path / names[1], tmp_path / "test" / "2.wav")  # no test clip, then
    (tmp_path / "test_copy").mkdir()
    shutil.copy(tmp_path / names[3], tmp_path / "test_copy" / "3.wav")  # of a test clip
    test = load(tmp_path).test
    assert test["file_name"].tolist() == ["3.wav", "test/1.wav"]
    assert {*test["path"]} == {tmp_path / name for name in names[2:]}
    assert len({*load(tmp_path).train["clip"], *test["clip"]}) == 4


def test_without_sample_submit_a_test_clip_is_told_from_training_clips_by_its_content(tmp_path):
    numbers = [("a/1.wav", 7), ("b/1.wav", 0)]
    put_masters(tmp_path)
    put_table(tmp_path / "train_master.tsv", [("file_name", "label_id"), *numbers])
    (tmp_path / "sample_submit.tsv").unlink()
    names = [*(name for name, _ in numbers), "Test/1/1.wav"]
    put_audio(*(tmp_path / name for name in names))
    for folder in "ab":  # copies are no test clips
        (tmp_path / "Test" / folder).mkdir()
        shutil.copy(tmp_path / folder / "1.wav", tmp_path / "Test" / folder)
    for path in tmp_path.rglob("*.wav"):  # unpacking can give one time to all files
        os.utime(path, (1e9, 1e9))
    assert load(tmp_path).test["file_name"].tolist() == ["Test/1/1.wav"]


def test_a_test_master_of_no_test_clip_is_named(data, caplog):
    put_masters(data)
    put_table(data / "test_master.tsv", [("file_name", "label_id"), ("other.wav", 7)])
    assert (load(data).test["target"] == -1).all()
    assert "test_master.tsv names none of the test clips" in caplog.text


@pytest.mark.parametrize("text", ["7", "7.0", " 7 ", "007", "7e0", "+7"])
def test_a_label_id_may_be_any_notation_of_an_integer(data, text):
    put_masters(data)
    put_table(
        data / "train_master.tsv",
        [("file_name", "label_id"), ("train_0.wav", text), ("train_1.wav", 0)],
    )
    assert train_labels(load(data))["train_0.wav"] == "ロック"


def test_further_columns_are_ignored(data):
    put_masters(data)
    put_table(
        data / "train_master.tsv",
        [("tempo", "Label_ID ", "artist", "FILE_NAME"), ("", 7, "", "train_0.wav")],
    )
    assert train_labels(load(data)) == {"train_0.wav": "ロック"}


def test_a_column_group_is_read_where_it_is_there(data):
    put_masters(data)
    assert load(data).train["group"].isna().all()
    rows = [("", "Group", "label_id", "file_name"), (0, " Can ", 7, "train_0.wav")]
    rows += [(1, "", 0, "train_1.wav"), (2, '"Simon; Garfunkel"', 42, "train_2.wav")]
    put_table(data / "train_master.tsv", rows)
    groups = load(data).train["group"]
    assert groups[[0, 2]].tolist() == ["Can", "Simon; Garfunkel"]
    assert groups.isna().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("rows", "header", "file_column", "label_column"),
    [
        ([("test_2.wav", 0), ("test_0.wav", 0)], None, 0, 1),
        ([(0, "test_2.wav", 0), (1, "test_0.wav", 0)], None, 1, 2),
        ([("file_name", "label_id"), ("test_2.wav", 0), ("test_0.wav", 0)], 0, 0, 1),
        ([("", "file", "genre"), (0, "test_2.wav", 0), (1, "test_0.wav", 0)], 0, 1, 2),
        ([("label_id", "file"), (0, "test_2.wav"), (0, "test_0.wav")], 0, 1, 0),
        ([("f", "label_id", "note"), ("test_2.wav", 0, "x"), ("test_0.wav", 0, "y")], 0, 0, 1),
        ([("test_2.wav",), ("test_0.wav",)], None, 0, 1),
    ],
)
def test_the_columns_of_sample_submit_are_recognised(data, rows, header, file_column, label_column):
    put_masters(data)
    put_table(data / "sample_submit.tsv", rows)
    competition = load(data)
    template = competition.template
    assert (template.file_column, template.label_column) == (file_column, label_column)
    assert template.header == (None if header is None else [str(cell) for cell in rows[header]])
    assert [row[file_column] for row in template.rows] == ["test_2.wav", "test_0.wav"]
    assert competition.test["file_name"].tolist() == ["test_0.wav", "test_2.wav"]


def test_without_sample_submit_every_test_clip_is_predicted(data):
    put_masters(data)
    (data / "sample_submit.tsv").unlink()
    competition = load(data)
    assert competition.template is None
    assert competition.test["file_name"].tolist() == [f"test_{n}.wav" for n in (0, 1, 2, 10)]


def test_the_tables_names_may_be_in_capitals(data):
    put_masters(data)
    for old, new in [
        ("train_master.tsv", "Train_Master.TSV"),
        ("label_master.tsv", "LABEL_MASTER.Csv"),
        ("sample_submit.tsv", "Sample_Submit.TSV"),
    ]:
        (data / old).rename(data / new)
    competition = load(data)
    assert train_labels(competition) == EXPECTED
    assert [row[0] for row in competition.template.rows] == TEST


@pytest.mark.parametrize(
    "name", ["sample_submission.tsv", "samplesubmit.csv", "submit_sample.csv", "sample_submit.txt"]
)
def test_a_sample_submit_under_another_name_is_named(data, caplog, name):
    put_masters(data)
    (data / "sample_submit.tsv").rename(data / name)
    assert load(data).template is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no sample_submit.csv or .tsv" in line and name in line


def test_other_tables_are_not_taken_for_a_sample_submit(data, caplog):
    put_masters(data)
    (data / "sample_submit.tsv").unlink()
    (data / "notes.csv").write_text("mine")
    (data / "submit.csv").write_text("an earlier run's")
    load(data)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no sample_submit.csv or .tsv" in line and "notes" not in line


def test_known_test_labels_are_joined_by_name(data):
    put_masters(data)
    put_table(
        data / "test_master.tsv",
        [("file_name", "label_id"), ("test_10.wav", 42), ("test_1.wav", 7)],
    )
    competition = load(data)
    targets = dict(zip(competition.test["file_name"], competition.test["target"], strict=True))
    assert targets == {"test_0.wav": -1, "test_1.wav": 1, "test_2.wav": -1, "test_10.wav": 2}


@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("stray", [{5: '"Live'}, {0: '"Live', 7: 'at 7"'}, {3: 'the 12" mix'}])
def test_a_quote_that_does_not_pair_swallows_no_rows(data, separator, stray):
    put_masters(data)
    titles = [stray.get(n, f"title {n}") for n in range(len(TRAIN))]
    rows = [("file_name", "label_id", "title")]
    rows += [(name, genre[1], title) for (name, genre), title in zip(TRAIN, titles, strict=True)]
    put_table(data / "train_master.tsv", rows, separator=separator)
    rows = [(name, 0, stray.get(n, "x")) for n, name in enumerate(TEST)]
    header = ("file_name", "label_id", "title")
    put_table(data / "sample_submit.tsv", [header, *rows], separator=separator)
    competition = load(data)
    assert train_labels(competition) == EXPECTED
    assert [row[0] for row in competition.template.rows] == TEST
    assert [row[2] for row in competition.template.rows] == [row[2] for row in rows]


def test_quoted_cells_may_hold_separators_and_quotes(data):
    put_masters(data)
    text = 'file_name,label_id,title\n"train_0.wav",7,"a, b"\ntrain_1.wav,"0","say ""x"", y"\n'
    (data / "train_master.tsv").write_text(text + "train_2.wav,42,\n")
    assert len(load(data).train) == 3
    sample = 'test_0.wav,0,"say ""x"", y"\ntest_1.wav,0,""\n'
    (data / "sample_submit.tsv").write_text(sample)
    assert [row[2] for row in load(data).template.rows] == ['say "x", y', ""]


def test_a_row_or_a_file_may_be_there_twice(data):
    put_masters(data)
    with (data / "train_master.tsv").open("a") as file:
        file.write("train_0.wav\t7\n")
    copy = data / "copy" / "train_0.wav"
    copy.parent.mkdir()
    copy.write_bytes((data / "train_sound_1" / "train_0.wav").read_bytes())
    competition = load(data)
    assert train_labels(competition) == EXPECTED
    assert len(competition.train) == len(TRAIN)


def test_other_datasets_hidden_files_and_the_cache_are_left_out(data):
    put_masters(data)
    put_masters(data / "demo")
    (data / "sample_submit.tsv").unlink()
    others = ["demo/test_a/test_7.wav", ".hidden/test_8.wav", "test_1/._test_9.wav"]
    put_audio(*(data / name for name in [*others, "separated/test_5.wav", "x/__MACOSX/t.wav"]))
    assert load(data).test["file_name"].tolist() == [f"test_{n}.wav" for n in (0, 1, 2, 10)]


def test_folders_named_after_genres_are_enough(tmp_path):
    clips = ["rock/1.wav", "rock/2.wav", "blues/1.wav", "blues/10.wav", "rock/testify.wav"]
    put_audio(*(tmp_path / name for name in clips))
    put_audio(tmp_path / "test" / "a.wav", tmp_path / "test" / "b.wav")
    competition = load(tmp_path, num_classes=2)
    assert competition.label_names == ["blues", "rock"]
    assert train_labels(competition) == {name: name.split("/")[0] for name in clips}
    assert competition.test["file_name"].tolist() == ["a.wav", "b.wav"]


def test_equal_names_in_two_folders_stay_two_clips(tmp_path):
    folders = [tmp_path / name for name in ("rock", "blues", "test/one", "test/two")]
    put_audio(*(folder / f"{n}.wav" for folder in folders for n in (1, 2)))
    competition = load(tmp_path)
    names = [*competition.train["clip"], *competition.test["clip"]]
    assert len(set(names)) == 8
    assert len(set(competition.test["file_name"])) == 4
    for clip, path in zip(competition.train["clip"], competition.train["path"], strict=True):
        assert clip == f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def test_the_name_of_a_clip_depends_on_the_files_content_and_not_on_its_folder(tmp_path):
    paths = [tmp_path / name for name in ("a/1.wav", "b/1.wav", "b/2.wav")]
    put_audio(*paths)
    names = clip_names(paths)
    assert len(set(names)) == 3 and names[2] == "2"
    moved = shutil.move(paths[0], tmp_path / "1.wav")
    assert clip_names([moved, *paths[1:]]) == names
    assert clip_names([paths[1], paths[1]]) == ["1", "1"], "one file twice is not ambiguous"


def test_names_that_differ_in_case_alone_are_ambiguous(tmp_path):
    paths = [tmp_path / "a" / "Song.wav", tmp_path / "b" / "song.wav"]
    put_audio(*paths)
    assert len({name.casefold() for name in clip_names(paths)}) == 2


def test_an_unreadable_file_with_an_ambiguous_name_is_named(tmp_path):
    with pytest.raises(UserError, match=r"b/1\.wav cannot be read: No such file"):
        put_audio(tmp_path / "a" / "1.wav")
        clip_names([tmp_path / "a" / "1.wav", tmp_path / "b" / "1.wav"])


@pytest.mark.parametrize(
    "stem", ["x" * 252, "曲" * 84, "x" * 245], ids=["longest", "in Japanese", "with a hash"]
)
def test_the_longest_file_names_fit_into_the_cache(tmp_path, stem):
    paths = [tmp_path / folder / f"{stem}.au" for folder in ("a", "b")]
    put_audio(*paths, tmp_path / "a" / "1.au")
    cache = StemCache(tmp_path / "separated", model="htdemucs", sample_rate=8000)
    for group in (paths, paths[:1]):
        names = clip_names(group)
        assert len(set(names)) == len(group)
        for name, path in zip(names, group, strict=True):
            cache.write(name, np.ones((4, 10)), path)
            assert cache.is_current(name, path)


def test_a_folder_and_a_file_name_that_look_alike_stay_apart(tmp_path):
    paths = [tmp_path / name for name in ("x/a.wav", "x__a.wav", "x_a.wav", "y/a.wav")]
    put_audio(*paths)
    assert len(set(clip_names(paths))) == 4


def test_a_pipe_with_an_ambiguous_name_is_named(tmp_path):
    put_audio(tmp_path / "a" / "1.wav")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "1.wav")
    with pytest.raises(UserError, match=r"b/1\.wav cannot be read: .*not a file"):
        clip_names([tmp_path / "a" / "1.wav", tmp_path / "b" / "1.wav"])


def test_a_link_to_a_folder_above_is_entered_once(tmp_path):
    put_audio(
        *(tmp_path / genre / name for genre in ("jazz", "rock") for name in ("a.wav", "b.wav"))
    )
    (tmp_path / "jazz" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(load(tmp_path).train) == 4


def test_names_that_differ_in_a_dot_stay_apart_in_the_cache(tmp_path):
    names = ("a.b.wav", "a_b.wav")
    put_audio(*(tmp_path / genre / name for genre in ("jazz", "rock") for name in names))
    assert load(tmp_path).train["clip"].is_unique


def test_the_data_is_read_without_loading_torch_or_librosa(data):
    put_masters(data)
    code = (
        "import sys, stemgenre.submission\n"
        "from stemgenre.data.competition import load_competition\n"
        "load_competition(sys.argv[1], num_classes=3, cache_dir='none')\n"
        "print({'torch', 'librosa'} & set(sys.modules))"
    )
    assert run_python("-c", code, data).stdout.strip() == "set()"


def test_performances_become_groups(data, tmp_path):
    """benchmarks/groove.py copies a data set with a provenance.tsv."""
    put_masters(data)
    rows = [(name, f"performance {n // 4}") for n, (name, _) in enumerate(TRAIN)]
    destination = tmp_path.with_name(f"{tmp_path.name}-copy")
    command = ("benchmarks/groove.py", data, destination)
    assert "provenance" in run_python(*command).stderr
    put_table(data / "provenance.tsv", [("file_name", "performance"), *rows])
    done = run_python(*command)
    assert "12 clips of 3 performances" in done.stdout, done.stderr
    competition = load(destination)
    assert train_labels(competition) == EXPECTED
    assert competition.train["group"].tolist() == [group for _, group in rows]
    assert "exists" in run_python(*command).stderr
