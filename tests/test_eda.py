"""eda.py writes its page and tables, names what is wrong with the data, and train.py heeds it."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from browser import look
from helpers import put_table, run_python

from stemgenre import audio

SMALL = ("SR=11025", "N_FFT=1024", "HOP_LENGTH=256", "N_MELS=32", "CLIP_SECONDS=6", "IMG_SIZE=64")
EVIL = "<b>R&B</b>"  # a genre may be called what it likes


def eda(data, out, *overrides):
    knobs = (f"DATA_DIR={data}", f"EDA_DIR={out}", "DEVICE=cpu", *SMALL, *overrides)
    return run_python("eda.py", *knobs)


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A competition with every fault that eda.py is to list, and eda.py's answer about it."""
    folder = tmp_path_factory.mktemp("messy")
    sounds, rng = folder / "data" / "sounds", np.random.default_rng(0)
    sounds.mkdir(parents=True)
    songs = {f"train_{i}.wav": rng.normal(0, 0.1, 11025 * 6) for i in range(6)}
    songs["train_6.wav"] = 0.5 * songs["train_0.wav"][11025:]  # with the other label
    songs["train_7.wav"] = 2.0 * songs["train_1.wav"]  # with the same label
    songs["train_8.wav"] = np.concatenate([songs["train_2.wav"][:22050], np.zeros(44100)]) + 0.05
    songs["test_0.wav"] = songs["train_3.wav"][: 11025 * 5]
    songs["test_1.wav"] = rng.normal(0, 5e-5, 11025 * 2)
    songs["unnamed.wav"] = rng.normal(0, 0.1, 11025)
    for name, wave in songs.items():
        soundfile.write(sounds / name, wave, 11025)
    (sounds / "train_9.wav").write_bytes(b"this is no sound")
    labels = [0, 1, 0, 1, 0, 1, 1, 1, 0, 0]
    rows = [("file_name", "label_id"), *((f"train_{i}.wav", x) for i, x in enumerate(labels))]
    put_table(folder / "data" / "train_master.tsv", rows)
    label_rows = [("label_name", "label_id"), (EVIL, 0), ("jazz", 1)]
    put_table(folder / "data" / "label_master.tsv", label_rows)
    put_table(folder / "data" / "sample_submit.tsv", [("test_0.wav", 0), ("test_1.wav", 0)])
    return folder, eda(folder / "data", folder / "out")


def read(folder, name):
    return pd.read_csv(folder / "out" / f"{name}.csv", keep_default_na=False)


def test_faults_do_not_stop_it_and_are_said_in_the_terminal(messy):
    _, done = messy
    assert done.returncode == 0, done.stderr
    for text in (
        "10 training and 2 test clips of 2 genres",
        "train_9.wav cannot be decoded",
        "no master names 1 audio files",
        f"one recording, two labels: train_0.wav is {EVIL}, train_6.wav is jazz",
        "1 test clips share their recording with a training clip",
        "SPLIT_BY_GROUP=True",
    ):
        assert text in done.stdout


def test_copies_and_groups_are_as_they_were_made(messy):
    found = read(messy[0], "copies").set_index(["first", "second"])
    assert sorted(found.index) == [
        ("train_0.wav", "train_6.wav"),
        ("train_1.wav", "train_7.wav"),
        ("train_3.wav", "test_0.wav"),
    ]
    assert found["where"].tolist() == ["within train", "train and test", "within train"]
    assert found["different_labels"].tolist() == [True, False, False]
    assert found["offset_seconds"].to_list() == pytest.approx([1, 0, 0], abs=0.001)
    assert found["similarity"].min() > 0.95
    groups = read(messy[0], "groups").set_index("clip")["group"]
    assert len(groups) == 12
    for one, two in (("train_0", "train_6"), ("train_1", "train_7"), ("train_3", "test_0")):
        assert groups[one] == groups[two]
    assert groups.nunique() == 9


def test_tables_hold_every_clip_and_what_is_wrong_with_it(messy):
    clips = read(messy[0], "clips").set_index("clip")
    assert len(clips) == 12
    notes = clips["notes"]
    assert "DC: 0.05" in notes["train_8"]
    assert notes["train_9"] == "cannot be read"
    assert notes["test_1"] == "short: 2.0 s; silent: 100% of it; quiet"
    assert notes["train_4"] == ""
    assert read(messy[0], "unreadable")["file_name"].tolist() == ["train_9.wav"]
    assert [Path(path).name for path in read(messy[0], "unnamed")["path"]] == ["unnamed.wav"]
    genres = read(messy[0], "genres").set_index("genre")
    assert genres["train_clips"].to_dict() == {EVIL: 5, "jazz": 5}


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_without_stems(messy, dark):
    seen = look(messy[0] / "out" / "index.html", dark=dark)
    assert seen.faults() == []
    assert seen.scripts == 0
    assert seen.players == 2  # the mix of each genre
    for text in (EVIL, "train_6.wav", "two labels", "unnamed.wav", "No clips are separated yet"):
        assert text in seen.text


def test_training_by_group_says_when_the_groups_are_old(messy, tmp_path):
    folder, _ = messy
    knobs = [f"DATA_DIR={folder / 'data'}", f"OUTPUT_DIR={tmp_path}", "SPLIT_BY_GROUP=True"]
    knobs += ["NUM_CLASSES=auto", "DEVICE=cpu", *SMALL]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "groups.csv").write_text("split,clip,file_name,group\ntrain,x,x.wav,0\n")
    done = run_python("train.py", *knobs, f"EDA_DIR={tmp_path / 'old'}")
    assert done.returncode == 2
    assert "run python eda.py again" in done.stderr


@pytest.fixture
def separated(small_data, tmp_path):
    """eda.py's answer about a small dataset with its stems."""
    overrides = ["CLIP_SECONDS=2", "SEPARATION_MODEL=synthesised"]
    return tmp_path / "out", eda(small_data, tmp_path / "out", *overrides)


def test_with_stems_the_page_has_images_and_players(separated):
    out, done = separated
    assert done.returncode == 0, done.stderr
    seen = look(out / "index.html")
    assert seen.faults() == []
    assert seen.players == 10 * 5
    assert sum(alt.startswith("image of") for alt in seen.alts) == 10
    assert sum(alt.startswith("mean of") for alt in seen.alts) == 10
    energy = pd.read_csv(out / "stems.csv")
    assert energy[["vocals", "drums", "bass", "other"]].sum(axis=1).to_numpy() == pytest.approx(1)
    assert (out / "index.html").stat().st_size < 10e6
    assert look(out / "index.html", width=390).faults() == []


def test_a_genre_folder_with_a_copy_works_too(tmp_path):
    rng = np.random.default_rng(1)
    for genre in ("rock", "jazz"):
        (tmp_path / "data" / genre).mkdir(parents=True)
        for number in range(2):
            wave = rng.normal(0, 0.1, 11025 * 6)
            soundfile.write(tmp_path / "data" / genre / f"{genre}_{number}.wav", wave, 11025)
    source = tmp_path / "data" / "rock" / "rock_0.wav"
    wave, rate = audio.decode(source)
    soundfile.write(tmp_path / "data" / "jazz" / "again.mp3", 0.5 * wave[0], rate)
    shutil.copy(source, tmp_path / "data" / "jazz" / "jazz_9.wav")
    done = eda(tmp_path / "data", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = read(tmp_path, "copies")
    assert len(found) == 3  # each with each of the three
    assert found["different_labels"].tolist() == [True, True, False]
    assert "test clips share" not in done.stdout
