"""Data that is missing or contradicts itself is named: the file, the row, what to do."""

import pytest
from helpers import put_audio, put_table

from stemgenre.errors import UserError
from stemgenre.metadata import load_competition

HEADER = "file_name\tlabel_id\n"
LABELS = "label_name\tlabel_id\nblues\t0\nrock\t7\n"
TRAIN = HEADER + "train_0.wav\t0\ntrain_1.wav\t7\n"


@pytest.fixture
def data(tmp_path):
    """A small competition without a fault, for the test to spoil."""
    put_audio(*(tmp_path / f"train_sound/train_{n}.wav" for n in range(2)))
    put_audio(*(tmp_path / f"test_sound/test_{n}.wav" for n in range(2)))
    (tmp_path / "train_master.tsv").write_text(TRAIN)
    (tmp_path / "label_master.tsv").write_text(LABELS)
    put_table(tmp_path / "sample_submit.tsv", [("test_0.wav", 0), ("test_1.wav", 0)])
    return tmp_path


def refusal(folder, num_classes="auto"):
    with pytest.raises(UserError) as caught:
        load_competition(folder, num_classes=num_classes, cache_dir=folder / "separated")
    return str(caught.value)


def spoil(path, content):
    """Replaces a file by text or bytes; None deletes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_the_data_is_faultless_until_it_is_spoilt(data):
    clips = load_competition(data, num_classes=2, cache_dir=data / "separated")
    assert clips.train["file_name"].tolist() == ["train_0.wav", "train_1.wav"]
    assert clips.train["target"].tolist() == [0, 1]
    assert clips.test["file_name"].tolist() == ["test_0.wav", "test_1.wav"]
    assert (clips.label_ids, clips.label_names) == ([0, 7], ["blues", "rock"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train_master.tsv", None, ["no train_master.csv or .tsv", "--demo"]),
        ("train_master.csv", TRAIN, ["both there", "train_master.tsv"]),
        ("train_master.tsv", "", ["train_master.tsv is empty"]),
        ("train_master.tsv", "\n \n", ["train_master.tsv is empty"]),
        ("train_master.tsv", ",,\n,,\n", ["train_master.tsv is empty"]),
        ("train_master.tsv", HEADER, ["header but no rows"]),
        ("train_master.tsv", "name\tlabel_id\na.wav\t1\n", ["needs one column file_name"]),
        ("train_master.tsv", "train_0.wav\t0\n", ["needs one column file_name", "train_0.wav"]),
        ("train_master.tsv", "file_name\tlabel\na.wav\t1\n", ["one column label_id", "label"]),
        ("train_master.tsv", "label_id\tfile_name\tlabel_id\n0\ta.wav\t1\n", ["one column"]),
        ("train_master.tsv", TRAIN + "train_0.wav\t\n", ["row 4", "label_id is missing"]),
        ("train_master.tsv", TRAIN + "\t7\n", ["row 4", "file_name or label_id is missing"]),
        ("train_master.tsv", TRAIN + "train_0.wav\n", ["row 4", "missing"]),
        ("train_master.tsv", TRAIN + "train_0.wav\tNaN\n", ["row 4", "'NaN'", "whole number"]),
        ("train_master.tsv", TRAIN + "train_0.wav\tabc\n", ["row 4", "'abc'", "whole number"]),
        ("train_master.tsv", TRAIN + "train_0.wav\t3.5\n", ["row 4", "'3.5'", "whole number"]),
        ("train_master.tsv", TRAIN + "train_0.wav\tinf\n", ["row 4", "'inf'", "whole number"]),
        ("train_master.tsv", TRAIN + "train_0.wav\t1e300\n", ["row 4", "whole number"]),
        ("train_master.tsv", TRAIN + "train_0.wav\t3\n", ["label_id 3", "label_master.tsv"]),
        ("train_master.tsv", TRAIN + "train_0.wav\t7\n", ["train_0.wav", "two labels: 0 and 7"]),
        ("train_master.tsv", TRAIN + "/etc/x.wav\t0\n", ["'/etc/x.wav'", "below the data"]),
        ("train_master.tsv", TRAIN + "../x.wav\t0\n", ["'../x.wav'", "below the data folder"]),
        ("train_master.tsv", TRAIN + "a/../../x.wav\t0\n", ["'a/../../x.wav'", "below the data"]),
        ("train_master.tsv", TRAIN + "..\\x.wav\t0\n", ["below the data folder"]),
        ("train_master.tsv", TRAIN + "C:\\x.wav\t0\n", ["C:", "below the data folder"]),
        ("train_master.tsv", TRAIN + ".\t0\n", ["'.'", "below the data folder"]),
        ("train_master.tsv", bytes(range(256)) * 8, ["train_master.tsv is not a text file"]),
        ("train_master.tsv", b"\x89PNG\r\n\x1a\n\xff\xd8", ["train_master.tsv"]),
        ("train_master.tsv", b"\xff\xfeabc", ["train_master.tsv is not a text file"]),
        ("train_master.tsv", HEADER + "x" * 200_000, ["train_master.tsv is not a table"]),
        ("train_master.tsv", HEADER + '"open', ["train_master.tsv"]),
        ("label_master.tsv", None, ["no label_master.csv or .tsv"]),
        ("label_master.tsv", "", ["label_master.tsv is empty"]),
        ("label_master.tsv", "name\tid\nblues\t0\n", ["one column label_name"]),
        ("label_master.tsv", LABELS + "jazz\t7\n", ["label_id 7 twice"]),
        ("label_master.tsv", LABELS + "blues\t8\n", ["label_name blues twice"]),
        ("label_master.tsv", LABELS + "jazz\t3.5\n", ["row 4", "'3.5'"]),
        ("label_master.tsv", LABELS + "\t8\n", ["row 4", "label_name"]),
        ("label_master.tsv", "label_name\tlabel_id\nblues\t0\n", ["names 1 genre"]),
        ("sample_submit.tsv", "", ["sample_submit.tsv is empty"]),
        ("sample_submit.tsv", "1\t0\n2\t0\n", ["no column of audio file names"]),
        ("sample_submit.tsv", "test_0.wav\t0\n\t0\ntest_1.wav\t0\n", ["row 2", "no file name"]),
        ("sample_submit.tsv", "x\n0\ttest_0.wav\t0\n", ["sample_submit.tsv row 1"]),
        ("sample_submit.tsv", "test_0.wav\t0\ntest_1.wav\n", ["row 1"]),
        ("sample_submit.tsv", "../x.wav\t0\n", ["'../x.wav'", "below the data folder"]),
        ("sample_submit.tsv", "test_7.wav\t0\n", ["1 clips", "test_7.wav", "unpack"]),
        ("test_master.tsv", HEADER + "test_0.wav\t3\n", ["test_master.tsv has label_id 3"]),
        ("more/train_0.wav", b"other", ["train_0.wav is there more than once", "keep one"]),
        ("more/test_0.wav", b"other", ["test_0.wav is there more than once", "keep one"]),
    ],
)
def test_a_fault_is_named(data, name, content, said):
    spoil(data / name, content)
    message = refusal(data)
    assert "Traceback" not in message
    for words in said:
        assert words in message


def test_clips_without_audio_are_counted_and_the_first_five_named(data):
    rows = "".join(f"lost_{n}.wav\t0\n" for n in range(7))
    (data / "train_master.tsv").write_text(TRAIN + rows)
    message = refusal(data)
    assert "7 clips of" in message
    assert "lost_0.wav, lost_1.wav, lost_2.wav, lost_3.wav, lost_4.wav, ..." in message
    assert "lost_5" not in message


@pytest.mark.parametrize("wrong", [3, 10])
def test_another_number_of_genres_is_named_with_what_to_write(data, wrong):
    message = refusal(data, num_classes=wrong)
    assert f"NUM_CLASSES={wrong}" in message
    assert 'write 2 or "auto"' in message


@pytest.mark.parametrize("state", ["no folder", "a file", "an empty folder", "no audio"])
def test_without_data_the_layout_and_the_demo_are_shown(tmp_path, state):
    folder = tmp_path / "data"
    if state == "a file":
        folder.write_text("")
    elif state != "no folder":
        folder.mkdir()
    if state == "no audio":
        put_table(folder / "train_master.tsv", [("file_name", "label_id"), ("a.au", 0)])
    message = refusal(folder)
    assert str(folder) in message.splitlines()[0]
    for words in ("train_master.tsv", "label_master.tsv", "sample_submit.tsv", "--demo"):
        assert words in message


@pytest.mark.parametrize(
    "files", [["rock/1.wav"], ["1.wav", "2.wav"], ["rock/1.wav", "test/2.wav"]], ids=str
)
def test_a_tree_without_masters_needs_two_genre_folders(tmp_path, files):
    put_audio(*(tmp_path / name for name in files))
    message = refusal(tmp_path)
    assert "neither masters nor two genre folders" in message
    assert "--demo" in message


def test_two_spellings_of_one_file_cannot_have_two_labels(data):
    spoil(data / "train_master.tsv", TRAIN + "train_sound/train_0.wav\t7\n")
    message = refusal(data)
    assert "two labels" in message
    assert "train_0.wav and train_sound/train_0.wav" in message


def test_data_one_folder_too_deep_is_pointed_at(data, tmp_path_factory):
    above = tmp_path_factory.mktemp("above")
    (above / "competition").symlink_to(data, target_is_directory=True)
    assert f"did you mean DATA_DIR={above / 'competition'}?" in refusal(above)
