"""Missing or contradictory data is named: the file, the row, what to do."""

import gzip
import io
import os
import time
import zipfile

import kill_points
import pytest
from helpers import put_audio, put_table

from stemgenre.data.competition import load_competition
from stemgenre.errors import UserError

HEADER = "file_name\tlabel_id\n"
LABELS = "label_name\tlabel_id\nblues\t0\nrock\t7\n"
TRAIN = HEADER + "train_0.wav\t0\ntrain_1.wav\t7\n"


@pytest.fixture
def data(tmp_path):
    """A small valid competition, for the test to break."""
    put_audio(*(tmp_path / f"train_sound/train_{n}.wav" for n in range(2)))
    put_audio(*(tmp_path / f"test_sound/test_{n}.wav" for n in range(2)))
    (tmp_path / "train_master.tsv").write_text(TRAIN)
    (tmp_path / "label_master.tsv").write_text(LABELS)
    put_table(tmp_path / "sample_submit.tsv", [("test_0.wav", 0), ("test_1.wav", 0)])
    return tmp_path


def error_message(folder, num_classes="auto"):
    with pytest.raises(UserError) as caught:
        load_competition(folder, num_classes=num_classes, cache_dir=folder / "separated")
    return str(caught.value)


def overwrite(path, content):
    """Replaces a file by text or bytes; None deletes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_the_unchanged_data_is_valid(data):
    competition = load_competition(data, num_classes=2, cache_dir=data / "separated")
    assert competition.train["file_name"].tolist() == ["train_0.wav", "train_1.wav"]
    assert competition.train["target"].tolist() == [0, 1]
    assert competition.test["file_name"].tolist() == ["test_0.wav", "test_1.wav"]
    assert (competition.label_ids, competition.label_names) == ([0, 7], ["blues", "rock"])


def rows(*lines):
    """The train_master with these rows appended."""
    return TRAIN + "".join(f"{line}\n" for line in lines)


def workbook():
    """The bytes of a file as spreadsheet programs save it."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return data.getvalue()


INVALID = [  # file, content, parts of the message
    ("train_master.tsv", None, ["no train_master.csv or .tsv", "--demo"]),
    ("train_master.csv", TRAIN, ["both", "exist", "train_master.tsv"]),
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
    ("train_master.tsv", TRAIN + "train_0.wav\t0\t1\n", ["row 4 has 3 cells", "header has 2"]),
    ("train_master.tsv", TRAIN + "train_0.au\t0\n", ["train_0.au may mean train_0.wav: rename"]),
    ("sample_submit.tsv", "test_0.au\t0\n", ["test_0.au may mean test_0.wav: rename that file"]),
    ("train_master.tsv", TRAIN + "Train_0.WAV\t0\n", ["Train_0.WAV may mean train_0.wav"]),
    ("train_master.tsv", TRAIN + "train_0.wav\tNaN\n", ["row 4", "'NaN'", "not an integer"]),
    ("train_master.tsv", TRAIN + "train_0.wav\tabc\n", ["row 4", "'abc'", "not an integer"]),
    ("train_master.tsv", TRAIN + "train_0.wav\t3.5\n", ["row 4", "'3.5'", "not an integer"]),
    ("train_master.tsv", TRAIN + "train_0.wav\tinf\n", ["row 4", "'inf'", "not an integer"]),
    ("train_master.tsv", TRAIN + "train_0.wav\t1e300\n", ["row 4", "not an integer"]),
    ("train_master.tsv", TRAIN + "train_0.wav\t3\n", ["label_id 3", "label_master.tsv"]),
    ("train_master.tsv", TRAIN + "train_0.wav\t7\n", ["train_0.wav", "two labels: 0 and 7"]),
    (
        "train_master.tsv",
        "file_name\tlabel_id\tgroup\ntrain_0.wav\t0\tCan\ntrain_0.wav\t0\tNeu!\n",
        ["train_0.wav", "two groups: Can and Neu!"],
    ),
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
    (
        "train_master.tsv",
        'file_name,label_id,title\ntrain_0.wav,0,"two\nlines"\ntrain_1.wav,7,x\n',
        ["train_master.tsv row 2", "line break"],
    ),
    (
        "sample_submit.tsv",
        'test_0.wav,0,"two\nlines"\ntest_1.wav,0,x\n',
        ["sample_submit.tsv row 1", "line break"],
    ),
    ("label_master.tsv", None, ["no label_master.csv or .tsv"]),
    ("label_master.tsv", "", ["label_master.tsv is empty"]),
    ("label_master.tsv", "name\tid\nblues\t0\n", ["one column label_name"]),
    ("label_master.tsv", LABELS + "jazz\t7\n", ["label_id 7 twice"]),
    ("label_master.tsv", LABELS + "blues\t8\n", ["label_name blues twice"]),
    ("label_master.tsv", LABELS + "jazz\t3.5\n", ["row 4", "'3.5'"]),
    ("label_master.tsv", LABELS + "\t8\n", ["row 4", "label_name"]),
    ("label_master.tsv", "label_name\tlabel_id\nblues\t0\n", ["has 1 genre"]),
    ("sample_submit.tsv", "", ["sample_submit.tsv is empty"]),
    ("sample_submit.tsv", "1\t0\n2\t0\n", ["no column of audio file names"]),
    ("sample_submit.tsv", "test_0.wav\t0\n\t0\ntest_1.wav\t0\n", ["row 2 has no file name"]),
    ("sample_submit.tsv", "x\n0\ttest_0.wav\t0\n", ["sample_submit.tsv row 1 has 1 cells"]),
    ("sample_submit.tsv", "test_0.wav\t0\ntest_1.wav\n", ["row 1"]),
    ("sample_submit.tsv", "../x.wav\t0\n", ["'../x.wav'", "below the data folder"]),
    ("sample_submit.tsv", "test_7.wav\t0\n", ["1 clips", "test_7.wav", "unpack"]),
    ("test_master.tsv", HEADER + "test_0.wav\t3\n", ["test_master.tsv has label_id 3"]),
    ("more/train_0.wav", b"other", ["train_0.wav is ambiguous", "keep one"]),
    ("more/test_0.wav", b"other", ["test_0.wav is ambiguous", "keep one"]),
    ("train_master.tsv", TRAIN.encode("utf-16-le"), ["not a text file"]),
    ("train_master.tsv", TRAIN.encode("utf-32"), ["not a text file"]),
    ("train_master.tsv", TRAIN.encode() + b"\xe3\x83", ["train_master"]),
    ("train_master.tsv", TRAIN.replace("\t", "|"), ["one column file_name"]),
    ("train_master.tsv", TRAIN.replace("\t", " "), ["one column file_name"]),
    ("train_master.tsv", TRAIN.replace("\t", ",", 1), ["train_master.tsv"]),
    ("train_master.tsv", rows(HEADER.strip()), ["'label_id' is not an integer"]),
    ("train_master.tsv", rows("x.wav\t7,5"), ["'7,5'", "row 4"]),
    ("train_master.tsv", rows("x.wav\t0x7"), ["'0x7'", "row 4"]),
    ("train_master.tsv", rows("x.wav\tTrue"), ["'True'", "row 4"]),
    ("train_master.tsv", rows(f"x.wav\t{10**30}"), ["row 4"]),
    ("train_master.tsv", rows("x.wav\t-inf"), ["row 4"]),
    ("train_master.tsv", rows("x.wav\t2024-01-07"), ["row 4"]),
    ("train_master.tsv", rows("x.wav" + "\t" * 100_000), ["row 4"]),
    ("train_master.tsv", rows('"' + "x.wav\t0\n" * 50_000), ["train_master"]),
    (
        "train_master.tsv",
        rows(*(f"x_{n}.wav\t0" for n in range(10**5))),
        ["100000 clips", "x_0.wav, x_1.wav, x_2.wav, x_3.wav, x_4.wav, ..."],
    ),
    ("train_master.tsv", rows("\\\\host\\music\\x.wav\t0"), ["below the data"]),
    ("train_master.tsv", rows("file:///etc/hosts.wav\t0"), ["no audio", "hosts.wav"]),
    ("train_master.tsv", rows("~/x.wav\t0"), ["no audio", "~/x.wav"]),
    ("train_master.tsv", rows("a/../train_0.wav\t0"), ["below the data folder"]),
    ("train_master.tsv", rows("a\x1b[2J.wav\t0"), ["row 4", "control character"]),
    ("train_master.tsv", rows("a\x9b2J.wav\t0"), ["row 4", "control character"]),
    ("label_master.tsv", LABELS + "\x1b[31mjazz\t9\n", ["row 4", "control character"]),
    ("sample_submit.tsv", "test_0.wav\t0\nx\x07.wav\t0\n", ["row 2", "control character"]),
    ("train_master.tsv", rows("///\t0"), ["below the data folder"]),
    ("train_master.tsv", rows("x\0.wav\t0"), ["not a text file"]),
    ("train_master.tsv", rows("TRAIN_0.WAV\t0"), ["no audio"]),
    ("train_master.tsv", rows("train_sound\t0"), ["no audio"]),
    ("train_master.tsv", gzip.compress(TRAIN.encode()), ["not a text file"]),
    ("train_master.tsv", workbook(), ["train_master.tsv"]),
    (
        "train_master.tsv",
        "<!DOCTYPE html><html><body>Log in</body></html>",
        ["one column file_name"],
    ),
    ("train_master.tsv", '[{"file_name": "train_0.wav", "label_id": 0}]', ["one column"]),
    ("label_master.tsv", LABELS + "  \t9\n", ["row 4"]),
    ("label_master.tsv", LABELS + "jazz\tnine\n", ["'nine'", "label_master"]),
    ("sample_submit.tsv", "test_0.png\t0\n", ["no column of audio"]),
    ("sample_submit.tsv", "test_0.wav\t0\nx.wav\n", ["row 1"]),
    ("sample_submit.tsv", HEADER, ["no column of audio file names"]),
]
UNUSUAL = {  # read as the unchanged table
    "UTF-16 with a byte order mark": ("train_master.tsv", TRAIN.encode("utf-16")),
    "carriage returns as line ends": ("train_master.tsv", TRAIN.replace("\n", "\r")),
    "no line end at the end": ("train_master.tsv", TRAIN.rstrip()),
    "empty lines between": ("train_master.tsv", TRAIN.replace("\n", "\n\n\n")),
    "everything quoted": (
        "train_master.tsv",
        '"file_name","label_id"\n"train_0.wav","0"\n"train_1.wav","7"\n',
    ),
    "capitals and spaces in the header": (
        "train_master.tsv",
        TRAIN.replace("file_name", " File_Name "),
    ),
    "ids as floats": ("train_master.tsv", TRAIN.replace("7", "7.0")),
    "ids in scientific notation": ("train_master.tsv", TRAIN.replace("\t7", "\t7e0")),
    "ids with spaces": ("train_master.tsv", TRAIN.replace("7", " 7 ")),
    "a row repeated 100,000 times": ("train_master.tsv", TRAIN + "train_0.wav\t0\n" * 10**5),
    "a dot in the path": ("train_master.tsv", TRAIN.replace("train_0", "./train_sound/./train_0")),
    "two slashes in the path": (
        "train_master.tsv",
        TRAIN.replace("train_0", "train_sound//train_0"),
    ),
    "a genre that no clip has": ("label_master.tsv", LABELS + "jazz\t9\n"),
}


@pytest.mark.parametrize(
    ("name", "content", "expected"), INVALID, ids=[f"{name} {texts}" for name, _, texts in INVALID]
)
def test_an_invalid_file_is_named_soon_and_briefly(data, name, content, expected):
    overwrite(data / name, content)
    started = time.monotonic()
    message = error_message(data)
    assert time.monotonic() - started < 20
    assert len(message) < 2000
    assert all(character.isprintable() or character == "\n" for character in message)
    for text in expected:
        assert text in message


@pytest.mark.parametrize("case", UNUSUAL)
def test_an_unusual_table_is_read(data, case):
    name, content = UNUSUAL[case]
    overwrite(data / name, content)
    competition = load_competition(data, num_classes="auto", cache_dir=data / "separated")
    targets = zip(competition.train["path"], competition.train["target"], strict=True)
    labels = {path.name: competition.label_ids[target] for path, target in targets}
    assert labels == {"train_0.wav": 0, "train_1.wav": 7}


def test_clips_without_audio_are_counted_and_the_first_five_named(data):
    rows = "".join(f"lost_{n}.wav\t0\n" for n in range(7))
    (data / "train_master.tsv").write_text(TRAIN + rows)
    message = error_message(data)
    assert "7 clips of" in message
    assert "lost_0.wav, lost_1.wav, lost_2.wav, lost_3.wav, lost_4.wav, ..." in message
    assert "lost_5" not in message


@pytest.mark.parametrize("num_classes", [3, 10])
def test_a_wrong_number_of_genres_is_named_with_what_to_write(data, num_classes):
    message = error_message(data, num_classes=num_classes)
    assert f"NUM_CLASSES={num_classes}" in message
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
    message = error_message(folder)
    assert str(folder) in message.splitlines()[0]
    for text in ("train_master.tsv", "label_master.tsv", "sample_submit.tsv", "--demo"):
        assert text in message


@pytest.mark.parametrize(
    "files", [["rock/1.wav"], ["1.wav", "2.wav"], ["rock/1.wav", "test/2.wav"]], ids=str
)
def test_a_tree_without_masters_needs_two_genre_folders(tmp_path, files):
    put_audio(*(tmp_path / name for name in files))
    message = error_message(tmp_path)
    assert "neither masters nor two genre folders" in message
    assert "--demo" in message


@pytest.mark.parametrize("name", ["train_master", "label_master", "sample_submit", "test_master"])
@pytest.mark.parametrize("kind", ["dangling link", "pipe", "device", "folder"])
def test_a_table_that_is_no_file_is_named(data, name, kind):
    path = data / f"{name}.tsv"
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else data / "gone.tsv")
    message = error_message(data)
    assert f"{path} is " in message
    assert ("a link to" if kind == "dangling link" else "not a file") in message


def test_masters_need_test_clips_in_some_form(data):
    (data / "sample_submit.tsv").rename(data / "sample_submission.xlsx")
    (data / "test_sound").rename(data / "unknown")
    for path in (data / "unknown").iterdir():
        path.rename(path.with_name(f"clip_{path.name}"))
    message = error_message(data)
    for text in ("no test clips", "sample_submit.csv or .tsv", "sample_submission.xlsx"):
        assert text in message


@pytest.fixture
def as_a_user(data):
    """A user without root's rights runs the test, in folders that this user may read."""
    if os.geteuid() != 0:
        yield
        return
    load_competition(data, num_classes=2, cache_dir=data / "separated")  # imports what it needs
    folders = [*data.rglob("*"), data, *list(data.parents)[:-1]]
    modes = {path: path.stat().st_mode & 0o7777 for path in folders}
    modes = {path: mode for path, mode in modes.items() if mode and mode & 0o055 != 0o055}
    for path, mode in modes.items():
        path.chmod(mode | 0o055)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    for path, mode in modes.items():
        path.chmod(mode)


@pytest.fixture
def locked(data):
    """A function: makes a folder that nobody may list."""

    def make(name):
        put_audio(data / name / "x.wav")
        (data / name).chmod(0)
        paths.append(data / name)

    paths = []
    yield make
    for path in paths:
        path.chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_refused(data, locked, request):
    locked("rock")
    request.getfixturevalue("as_a_user")
    message = error_message(data)
    assert f"{data / 'rock'} cannot be listed: Permission denied" in message


def test_the_folder_of_a_file_system_check_is_named_and_left_out(data, locked, request, caplog):
    locked("lost+found")
    request.getfixturevalue("as_a_user")
    assert len(load_competition(data, num_classes=2, cache_dir=data / "separated").train) == 2
    assert "lost+found cannot be listed: Permission denied" in caplog.text


def test_a_link_to_a_folder_that_is_gone_is_named(data, caplog):
    (data / "more_sounds").symlink_to(data / "gone")
    assert len(load_competition(data, num_classes=2, cache_dir=data / "separated").train) == 2
    assert f"{data / 'more_sounds'} is a link to" in caplog.text


def test_control_characters_in_names_do_not_reach_the_terminal_or_the_log(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    put_audio(data / "blues" / "1.wav", data / "ro\x1b[31mck" / "1.wav")
    (data / "\x1b[2J\x9b2Jgone").symlink_to(data / "gone")
    code, printed = kill_points.run([f"DATA_DIR={data}", f"OUTPUT_DIR={out}", "DEVICE=cpu"])
    assert code == 2
    for text in (printed, (out / "train_log.txt").read_text(encoding="utf-8")):
        assert r"\x1b[2J\x9b2Jgone is a link to" in text
        assert "rename" in text and r"ro\x1b[31mck" in text
        assert all(character.isprintable() or character == "\n" for character in text)


def test_two_spellings_of_one_file_cannot_have_two_labels(data):
    overwrite(data / "train_master.tsv", TRAIN + "train_sound/train_0.wav\t7\n")
    message = error_message(data)
    assert "two labels" in message
    assert "train_0.wav and train_sound/train_0.wav" in message


def test_a_data_folder_one_level_too_high_suggests_the_right_one(data, tmp_path_factory):
    above = tmp_path_factory.mktemp("above")
    (above / "competition").symlink_to(data, target_is_directory=True)
    assert f"did you mean DATA_DIR={above / 'competition'}?" in error_message(above)
