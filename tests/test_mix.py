"""CHANNELS=mix: clips are decoded and cached as they are, and Demucs need not be installed."""

import json
import logging

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from helpers import run_python, run_training, stop_after_first_entry

from stemgenre import Classifier
from stemgenre.data.audio import decode
from stemgenre.errors import Interrupted, UserError
from stemgenre.features.augmentation import NO_AUGMENT
from stemgenre.runtime import start_runtime
from stemgenre.separation import decode as decode_module
from stemgenre.separation.cache import MIX, open_cache
from stemgenre.separation.decode import EndOfFile, decode_files
from stemgenre.separation.separate import separate_missing
from stemgenre.settings import load_settings

SR = 11025


def noise(seconds, *, channels=1, seed=0, rate=SR, peak=0.5):
    """(samples, channels) of noise."""
    rng = np.random.default_rng(seed)
    return (peak * rng.uniform(-1, 1, (round(seconds * rate), channels))).astype(np.float32)


def put_clips(folder, **waves):
    """A table of clips, of waves at SR or of bytes, in the folder."""
    folder.mkdir(exist_ok=True)
    rows = []
    for name, wave in waves.items():
        path = folder / f"{name}.wav"
        if isinstance(wave, bytes):
            path.write_bytes(wave)
        else:
            soundfile.write(path, wave, SR, subtype="FLOAT")
        rows.append({"clip": name, "path": path})
    return pd.DataFrame(rows)


@pytest.fixture
def decode_clips(small_settings, tmp_path):
    """Runs separate_missing with CHANNELS=mix on a table of clips and returns the cache."""
    settings = small_settings("CHANNELS=mix", f"SEPARATION_CACHE_DIR={tmp_path / 'cache'}")
    cache = open_cache(settings)

    def run(clips):
        with start_runtime(settings.machine) as runtime:
            separate_missing(clips, cache, settings, runtime)
        return cache

    run.cache = cache
    return run


def decoded(*paths, sample_rate=SR):
    """{path: (mix, EndOfFile)} of files, as decode_files gives them."""
    found = {path: ([], []) for path in paths}
    pairs = ((path, path) for path in paths)
    for path, value in decode_files(pairs, waves=MIX, sample_rate=sample_rate, threads=2):
        found[path][isinstance(value, EndOfFile)].append(value)
    return {path: (blocks, *end) for path, (blocks, end) in found.items()}


@pytest.mark.parametrize(("rate", "channels"), [(SR, 1), (44100, 2), (8000, 1), (48000, 6)])
def test_a_mix_is_the_mean_of_the_first_two_channels_at_sr(tmp_path, rate, channels):
    path = tmp_path / "clip.wav"
    low = librosa.resample(noise(2, channels=channels, rate=4000).T, orig_sr=4000, target_sr=rate)
    soundfile.write(path, low.T, rate, subtype="FLOAT")
    ((block,), end) = decoded(path)[path]
    expected = librosa.resample(decode(path)[0][:2].mean(0), orig_sr=rate, target_sr=SR)
    assert block.dtype == torch.float16
    assert block.shape == (1, 2 * SR)
    assert np.abs(block[0].float().numpy() - expected)[100:-100].max() < 2e-3
    assert end == EndOfFile("float32")


def test_a_long_file_comes_in_blocks_that_join_without_seams(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(55, rate=8000), 8000, subtype="FLOAT")
    (whole,), _ = decoded(path, sample_rate=2000)[path]
    monkeypatch.setattr(decode_module, "BLOCK_SECONDS", 15)
    blocks, end = decoded(path, sample_rate=2000)[path]
    assert len(blocks) > 2
    assert max(block.shape[1] for block in blocks) <= 25 * 2000
    assert torch.equal(torch.cat(blocks, 1), whole)
    assert end.error is None


def test_clips_are_cached_and_bad_ones_are_named(decode_clips, tmp_path):
    wave = noise(1)
    clips = put_clips(
        tmp_path / "clips", good=wave, broken=b"RIFF????", silent=0 * wave, fine=wave[::-1],
        loud=3e4 * np.sign(wave),
    )  # fmt: skip
    with pytest.raises(UserError, match="2 clips could not be decoded") as error:
        decode_clips(clips)
    assert "broken.wav" in str(error.value)
    assert "silent.wav" in str(error.value)
    cache = decode_clips.cache
    assert {path.name for path in cache.folder.glob("*.npz")} == {
        "good.npz",
        "fine.npz",
        "loud.npz",
    }
    assert np.allclose(cache.read("good")[0], wave[:, 0], atol=1e-3)
    assert np.abs(cache.read("loud")).max() == 3e4, "nothing is normalised"
    before = cache.path("good").stat().st_mtime_ns
    decode_clips(clips[clips["clip"].isin(["good", "fine"])])
    assert cache.path("good").stat().st_mtime_ns == before


def test_stopping_keeps_what_is_decoded(decode_clips, tmp_path, monkeypatch):
    waves = {f"c{n}": noise(0.2, seed=n) for n in range(40)}
    clips = put_clips(tmp_path / "clips", **waves)
    stop_after_first_entry(monkeypatch)
    with pytest.raises(Interrupted):
        decode_clips(clips)
    monkeypatch.undo()
    assert 1 <= len(list(decode_clips.cache.folder.glob("*.npz"))) < 40
    decode_clips(clips)
    assert len(list(decode_clips.cache.folder.glob("*.npz"))) == 40


# A whole run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder per genre of real wav files: three genres of five clips, and three test clips."""
    folder = tmp_path_factory.mktemp("mix") / "data"
    for genre, frequency in {"low": 200, "middle": 600, "high": 1800}.items():
        for number in range(6):
            part = genre if number < 5 else "test"
            path = folder / part / f"{genre}_{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            time = np.arange(round((1.5 + 0.2 * number) * 22050)) / 22050
            wave = 0.3 * np.sin(2 * np.pi * frequency * (1 + 0.02 * number) * time)
            wave = wave[:, None] + noise(1, rate=len(wave), seed=number, peak=0.02)
            soundfile.write(path, wave, 22050)
    return folder


WORDS = [
    "CHANNELS=mix", "SR=11025", "N_FFT=1024", "HOP_LENGTH=256", "N_MELS=32", "CLIP_SECONDS=2",
    "IMG_SIZE=64", "PRETRAINED=False", "FREEZE_STAGES=0", "EPOCHS=2", "BATCH_SIZE=6",
    "TEST_SIZE=0.2", "NUM_CLASSES=auto", "DEVICE=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """(finished process, its folder) of train.py, predict.py and eda.py without Demucs."""
    folder = tmp_path_factory.mktemp("run")
    words = [*WORDS, f"DATA_DIR={data}", f"OUTPUT_DIR={folder}", f"EDA_DIR={folder / 'eda'}"]
    predict = ["predict.py", data / "test", "DEVICE=cpu", "--model", folder / "best_model.pth"]
    done = run_python(
        "tests/without_demucs.py", "train.py", *words, "then",
        *predict, "--json", folder / "genres.json", "then", "eda.py", *words,
    )  # fmt: skip
    return done, folder


def test_a_run_needs_no_demucs(run, data):
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert "clips: 18 of 18 clips are to be decoded into" in done.stderr + done.stdout
    assert len(pd.read_csv(folder / "submit.csv", header=None)) == 3
    cached = {path.name for path in data.joinpath("separated", "mix").glob("*.npz")}
    assert len(cached) == 18
    assert not list(data.joinpath("separated").glob("*.npz")), "there are no stems"
    page = (folder / "report" / "index.html").read_text()
    assert "not installed" in page
    assert "the run continues without" not in done.stderr + done.stdout


def test_clips_of_extra_data_are_decoded_and_trained_on(data, tmp_path):
    extra = tmp_path / "more" / "low" / "x.wav"
    extra.parent.mkdir(parents=True)
    soundfile.write(extra, noise(1.5, rate=22050, channels=1), 22050)
    folders = [f"DATA_DIR={data}", f"OUTPUT_DIR={tmp_path}", f"EDA_DIR={tmp_path / 'eda'}"]
    words = [*WORDS, *folders, f"EXTRA_DATA={tmp_path / 'more'}", "EPOCHS=1", "BACKBONE=cnn"]
    out = run_training(load_settings(words))
    clips = json.loads((out / "summary.json").read_text())["clips"]
    assert clips == {"train": 13, "valid": 3, "test": 3}


def test_predict_and_eda_need_no_demucs_either(run):
    done, folder = run
    assert done.returncode == 0, done.stderr
    files = json.loads((folder / "genres.json").read_text())["files"]
    found = {file["file"].rpartition("/")[2]: file for file in files}
    probabilities = pd.read_csv(folder / "test_probabilities.csv").set_index("file_name")
    for name, row in probabilities.iterrows():
        for genre in ("low", "middle", "high"):
            assert found[name]["probabilities"][genre] == pytest.approx(row[genre], abs=1e-4)
    page = (folder / "eda" / "index.html").read_text()
    assert "Mean images" in page
    assert "Energy of the stems" not in page


def test_the_model_predicts_files_of_any_length_and_keeps_no_stems(run, tmp_path, caplog):
    _, folder = run
    path = tmp_path / "song.wav"
    soundfile.write(path, noise(7.5, rate=22050, channels=2), 22050)
    with caplog.at_level(logging.WARNING):
        kept = tmp_path / "kept"
        classifier = Classifier.load(folder / "best_model.pth", device="cpu", stems=kept)
    assert any("nothing is separated" in line for line in caplog.messages)
    result = classifier.predict(path)
    assert not kept.exists()
    starts = [segment.start for segment in result.timeline]
    assert starts == pytest.approx([0, 1, 2, 3, 4, 5, 5.5], abs=1e-3)
    (whole,), _ = decoded(path)[path]
    windows = [whole[:, round(s * SR) : round(s * SR) + 2 * SR] for s in starts]
    (member,) = classifier.models
    images = member.frontend(windows, [NO_AUGMENT] * len(windows))
    assert images.shape[1] == 1
    with torch.inference_mode():
        expected = member.net(images).softmax(1)
    found = torch.tensor([list(s.probabilities.values()) for s in result.timeline])
    assert torch.allclose(found, expected, atol=1e-4)


def test_mix_and_stems_train_together(small_settings):
    channels = "mix,vocals,drums,bass,other"
    out = run_training(small_settings(f"CHANNELS={channels}", "EPOCHS=1"), with_report=True)
    assert (out / "submit.csv").exists()
    classifier = Classifier.load(out / "best_model.pth", device="cpu")
    assert classifier.features.channel_names == channels.split(",")
    page = (out / "report" / "index.html").read_text()
    assert "the run continues without" not in page
