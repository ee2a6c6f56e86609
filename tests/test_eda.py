"""eda.py writes its page and tables, names what is wrong with the data, and train.py heeds it."""

import contextlib
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from browser import open_page
from helpers import put_table

import eda
from stemgenre.data import audio
from stemgenre.data.competition import load_competition
from stemgenre.data.split import load_groups
from stemgenre.errors import Interrupted
from stemgenre.files import sha256
from stemgenre.runtime import start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.settings import STEMS, load_settings

SMALL = (
    "SR=11025", "N_FFT=1024", "HOP_LENGTH=256", "N_MELS=32", "CLIP_SECONDS=6", "IMG_SIZE=64",
    "NUM_CLASSES=auto", "DEVICE=cpu",
)  # fmt: skip
HOSTILE = "<b>R&B</b>"  # a genre may have any name
TABLES = ("clips", "genres", "duplicates", "groups", "unreadable", "unlisted")


def settings_of(folder, *overrides):
    folders = (f"DATA_DIR={folder / 'data'}", f"EDA_DIR={folder / 'eda'}")
    return load_settings([*folders, *SMALL, *overrides])


@contextlib.contextmanager
def logged():
    """The messages that the scripts would print, a list that fills up."""
    messages, logger = [], logging.getLogger("stemgenre")
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def run_eda(settings):
    """All that eda.py says."""
    with logged() as messages, start_runtime(settings.machine) as runtime:
        eda.run_eda(settings, runtime)
    return "\n".join(messages)


def write_messy_data(folder):
    """A competition with every problem that eda.py has to report."""
    sounds, rng = folder / "sounds", np.random.default_rng(0)
    sounds.mkdir(parents=True)
    clips = {f"train_{i}.wav": rng.normal(0, 0.1, 11025 * 6) for i in range(6)}
    clips["train_6.wav"] = 0.5 * clips["train_0.wav"][11025:]  # with the other label
    clips["train_7.wav"] = 2.0 * clips["train_1.wav"]  # with the same label
    clips["train_8.wav"] = np.concatenate([clips["train_2.wav"][:22050], np.zeros(44100)]) + 0.05
    clips["test_0.wav"] = clips["train_3.wav"][: 11025 * 5]
    clips["test_1.wav"] = rng.normal(0, 5e-5, 11025 * 2)
    clips["unlisted.wav"] = rng.normal(0, 0.1, 11025)
    for name, wave in clips.items():
        soundfile.write(sounds / name, wave, 11025)
    (sounds / "train_9.wav").write_bytes(b"this is no audio")
    labels = [0, 1, 0, 1, 0, 1, 1, 1, 0, 0]
    rows = [("file_name", "label_id"), *((f"train_{i}.wav", x) for i, x in enumerate(labels))]
    put_table(folder / "train_master.tsv", rows)
    label_rows = [("label_name", "label_id"), (HOSTILE, 0), ("jazz", 1)]
    put_table(folder / "label_master.tsv", label_rows)
    put_table(folder / "sample_submit.tsv", [("test_0.wav", 0), ("test_1.wav", 0)])


def write_stems(settings, names):
    """Stems of some clips, as train.py leaves them when it is stopped: scaled parts of the mix."""
    cache = StemCache(
        settings.cache_folder, model=settings.separation.separation_model, sample_rate=11025
    )
    for name in names:
        source = Path(settings.paths.data_dir) / "sounds" / f"{name}.wav"
        wave, _ = audio.decode(source)
        cache.write(name, wave * np.array([[0.1], [0.2], [0.3], [0.4]]), source)


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """(folder, what eda.py said about messy data of which some clips are separated)."""
    folder = tmp_path_factory.mktemp("messy")
    write_messy_data(folder / "data")
    settings = settings_of(folder)
    write_stems(settings, [f"train_{i}" for i in range(6)])
    damaged = Path(settings.cache_folder) / "train_5.npz"
    data = bytearray(damaged.read_bytes())
    data[5000] ^= 255
    damaged.write_bytes(data)
    return folder, run_eda(settings)


def read(folder, name):
    return pd.read_csv(folder / "eda" / f"{name}.csv", keep_default_na=False)


def test_problems_are_logged_and_do_not_stop_it(messy):
    for text in (
        "10 training and 2 test clips of 2 genres",
        "train_9.wav cannot be decoded",
        "1 audio files are neither training nor test clips",
        f"same recording, different labels: train_0.wav is {HOSTILE}, train_6.wav is jazz",
        "1 test clips contain the same recording as a training clip (leakage)",
        "SPLIT_BY_GROUP=True",
    ):
        assert text in messy[1]
    assert messy[1].count("train_5.npz cannot be read") == 1


def test_duplicates_are_listed_with_labels_and_offsets(messy):
    found = read(messy[0], "duplicates").set_index(["first", "second"])
    assert sorted(found.index) == [
        ("train_0.wav", "train_6.wav"),
        ("train_1.wav", "train_7.wav"),
        ("train_3.wav", "test_0.wav"),
    ]
    assert found["where"].tolist() == ["within train", "train and test", "within train"]
    assert found["different_labels"].tolist() == [True, False, False]
    assert found["offset_seconds"].to_list() == pytest.approx([1, 0, 0], abs=0.001)
    assert found["similarity"].min() > 0.95


def test_clips_of_one_recording_are_one_group_for_train_py(messy):
    groups = read(messy[0], "groups").set_index("clip")["group"]
    assert len(groups) == 12
    for first, second in (("train_0", "train_6"), ("train_1", "train_7"), ("train_3", "test_0")):
        assert groups[first] == groups[second]
    assert groups.nunique() == 9
    settings = settings_of(messy[0], "SPLIT_BY_GROUP=True")
    competition = load_competition(
        settings.paths.data_dir, num_classes="auto", cache_dir=settings.cache_folder
    )
    loaded = load_groups(settings, competition.train, hash_source=sha256)
    assert loaded.tolist() == groups[competition.train["clip"]].tolist()


def test_the_tables_have_every_clip_and_what_is_unusual_about_it(messy):
    clips = read(messy[0], "clips").set_index("clip")
    assert len(clips) == 12
    notes = clips["notes"]
    assert "DC offset: 0.05" in notes["train_8"]
    assert notes["train_9"] == "cannot be read"
    assert notes["test_1"] == "short: 2.0 s; silent: 100% of the clip; quiet: below -70 LUFS"
    assert notes["train_4"] == ""
    assert read(messy[0], "unreadable")["file_name"].tolist() == ["train_9.wav"]
    assert [Path(path).name for path in read(messy[0], "unlisted")["path"]] == ["unlisted.wav"]
    genres = read(messy[0], "genres").set_index("genre")
    assert genres["train_clips"].to_dict() == {HOSTILE: 5, "jazz": 5}


def test_the_energy_of_the_stems_is_of_the_separated_clips(messy):
    energy = read(messy[0], "stems").set_index("genre")
    assert energy["clips"].to_dict() == {HOSTILE: 3, "jazz": 2}
    expected = np.array([1, 4, 9, 16]) / 30
    assert energy.loc["jazz", list(STEMS)].to_list() == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize(
    "screen", [{}, {"dark": True}, {"width": 390}], ids=["light", "dark", "phone"]
)
def test_the_page_shows_it_all(messy, browser, screen):
    page = open_page(browser, messy[0] / "eda" / "index.html", **screen)
    assert page.problems() == []
    assert page.scripts == 0
    assert len(page.durations) == 2 * (1 + len(STEMS))  # the mix and the stems of each genre
    for kind in ("image of", "mean of"):
        assert [alt for alt in page.alts if alt.startswith(kind)] == [
            f"{kind} {HOSTILE}",
            f"{kind} jazz",
        ]
    for text in (HOSTILE, "train_6.wav", "different labels", "train_9.wav", "unlisted.wav"):
        assert text in page.text


def test_without_stems_the_page_has_the_rest(messy, browser, tmp_path):
    shutil.copytree(messy[0] / "eda", tmp_path / "eda")
    overrides = (f"EDA_DIR={tmp_path / 'eda'}", "SEPARATION_CACHE_DIR=empty")
    run_eda(settings_of(messy[0], *overrides))
    page = open_page(browser, tmp_path / "eda" / "index.html")
    assert page.problems() == []
    assert len(page.durations) == 2  # the mix of each genre
    assert "No clips are cached yet" in page.text
    for table in TABLES:
        assert read(messy[0], table).equals(read(tmp_path, table))


def test_a_stopped_run_writes_no_page(messy, tmp_path):
    settings = settings_of(messy[0], f"EDA_DIR={tmp_path}")
    with start_runtime(settings.machine) as runtime:
        runtime.stop.signal_number = 15
        with pytest.raises(Interrupted):
            eda.run_eda(settings, runtime)
    assert not (tmp_path / "index.html").exists()


def test_the_same_file_and_any_name_are_listed(tmp_path):
    """Also of a sound that is too short to be compared; file names are bytes."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    names = ("a/x.wav", "b/y.wav", "a/1.wav", os.fsdecode(b"b/\xe9\x93.wav"))
    waves = [rng.normal(0, 0.1, 3000)] * 2 + [rng.normal(0, 0.1, 11025) for _ in range(2)]
    for name, wave in zip(names, waves, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(os.fsencode(folder / name), wave, 11025, format="WAV")
    run_eda(settings_of(tmp_path))
    found = read(tmp_path, "duplicates")
    assert found[["first", "second", "different_labels"]].to_numpy().tolist() == [
        ["a/x.wav", "b/y.wav", True]
    ]
    assert b"\xe9\x93.wav" in (tmp_path / "eda" / "clips.csv").read_bytes()


def test_genre_folders_without_masters_work_too(tmp_path, monkeypatch):
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
    folders = (f"DATA_DIR={tmp_path / 'data'}", f"EDA_DIR={tmp_path / 'eda'}")
    monkeypatch.setattr(sys, "argv", ["eda.py", *folders, *SMALL])
    with logged() as messages:
        eda.main()
    found = read(tmp_path, "duplicates")
    assert len(found) == 3  # each of the three with the two others
    assert found["different_labels"].tolist() == [True, True, False]
    assert not any("test clips contain" in message for message in messages)
