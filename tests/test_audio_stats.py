"""The statistics of a file are correct, cached, and computed again once the file has changed."""

import re
import subprocess

import numpy as np
import pandas as pd
import pyloudnorm
import pytest
import soundfile
from helpers import tone

from stemgenre.data import audio
from stemgenre.data.audio_stats import (
    STAT_COLUMNS,
    AudioStatsCache,
    compute_audio_stats,
    compute_stats,
    count_clipped,
    integrated_loudness,
)
from stemgenre.data.fingerprint import HOP_LENGTH, SAMPLE_RATE


@pytest.fixture
def stats_cache(tmp_path):
    return AudioStatsCache(tmp_path / "audio_stats", seconds=2.0)


def stats_of(stats_cache, path, wave, rate=8000, **options):
    soundfile.write(path, wave, rate, **options)
    return stats_cache.stats(path.stem, path)


def test_the_statistics_of_a_known_wave(stats_cache, tmp_path):
    wave = np.concatenate([tone(seconds=3, sr=22050, peak=0.5), np.zeros(22050)]) + 0.1
    stereo = np.stack([wave, 0 * wave], axis=1)
    stats = stats_of(stats_cache, tmp_path / "a.wav", stereo, 22050)
    assert stats["seconds"] == pytest.approx(4)
    assert (stats["sample_rate"], stats["channels"], stats["codec"]) == (22050, 2, "PCM_16")
    assert stats["peak_db"] == pytest.approx(20 * np.log10(0.6), abs=0.01)
    assert stats["dc_offset"] == pytest.approx(0.1, abs=0.001)
    assert stats["clipped_samples"] == 0
    assert stats["loudness_lufs"] == pytest.approx(-9.7, abs=0.3)  # 10 lg 0.125 - 0.69


def test_silence_and_clipping_are_measured(stats_cache, tmp_path):
    wave = np.concatenate([tone(seconds=3, sr=22050, peak=2.0).clip(-1, 1), np.zeros(22050)])
    stats = stats_of(stats_cache, tmp_path / "a.wav", wave, 22050)
    assert stats["silent_fraction"] == pytest.approx(0.25, abs=0.02)
    fraction = stats["clipped_samples"] / (3 * 22050)
    assert fraction == pytest.approx(2 / 3, abs=0.02)  # of its time a sine is above half its peak


def test_peaks_that_only_touch_full_scale_are_not_clipped():
    wave = np.zeros((30, 1), dtype=np.float32)
    wave[[3, 4, 10]] = [[1], [1], [-1]]
    assert count_clipped(wave) == 0
    wave[[0, 1, 2, 27, 28, 29]] = -1
    assert count_clipped(wave) == 5 + 3


def test_a_long_file_is_not_held_in_memory():
    """Its statistics are of all of it, its loudness of the beginning."""
    rate, loud, quiet = (
        8000,
        tone(seconds=10, peak=0.5)[:, None],
        tone(seconds=10, peak=0.1)[:, None],
    )
    blocks = [(loud, rate), *[(quiet, rate)] * 4]
    stats, wave, _ = compute_stats(blocks, held_seconds=15)
    assert wave.shape == (1, 15 * rate)
    assert stats["seconds"] == 50
    assert stats["loudness_lufs"] == pytest.approx(integrated_loudness(wave, rate))
    loud_last = compute_stats(blocks[::-1], held_seconds=15)[0]
    assert loud_last["peak_db"] == stats["peak_db"]
    assert loud_last["loudness_lufs"] == pytest.approx(stats["loudness_lufs"] - 14, abs=1)


@pytest.mark.parametrize("rate", [48000, 44100, 22050, 8000])
@pytest.mark.parametrize(("channels", "lufs"), [(1, -3.01), (2, 0.0)])
def test_a_full_scale_sine_has_the_loudness_of_the_standard(rate, channels, lufs):
    wave = np.tile(tone(frequency=997, seconds=3, sr=rate, peak=1.0), (channels, 1))
    assert integrated_loudness(wave, rate) == pytest.approx(lufs, abs=0.05)


def test_pauses_do_not_count_and_silence_has_no_loudness():
    loud = tone(seconds=3, sr=22050, peak=0.1)
    with_pause = np.concatenate([loud, np.zeros(22050 * 5), loud * 0.01])
    loudness = integrated_loudness(loud[None], 22050)
    assert integrated_loudness(with_pause[None], 22050) == pytest.approx(loudness, abs=0.3)
    assert integrated_loudness(np.zeros((1, 22050)), 22050) == -np.inf


@pytest.mark.parametrize(
    ("channels", "seconds", "rate"), [(1, 0.01, 8000), (1, 0.2, 48000), (6, 1, 8000), (1, 5, 2000)]
)
def test_short_clips_surround_and_low_rates_have_a_loudness(channels, seconds, rate):
    wave = np.tile(tone(frequency=400, seconds=seconds, sr=rate, peak=0.1), (channels, 1))
    assert -30 < integrated_loudness(wave, rate) < -10


@pytest.mark.parametrize(
    ("channels", "rate", "seconds"),
    [(1, 22050, 3), (2, 44100, 3.03), (5, 48000, 2), (1, 8000, 9)],
)
def test_pyloudnorm_measures_the_same_loudness(channels, rate, seconds):
    rng = np.random.default_rng(channels)
    samples = round(seconds * rate)
    wave = rng.normal(0, 0.05, (channels, samples)) * np.geomspace(1e-4, 1, samples)
    meter = pyloudnorm.Meter(rate, filter_class="DeMan")
    assert integrated_loudness(wave, rate) == pytest.approx(
        meter.integrated_loudness(wave.T), abs=1e-6
    )


@pytest.mark.usefixtures("ffmpeg")
def test_ffmpeg_measures_the_same_loudness(tmp_path):
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.05, (44100 * 6, 2)) * np.linspace(0.02, 1, 44100 * 6)[:, None]
    soundfile.write(tmp_path / "noise.wav", wave, 44100)
    command = ["ffmpeg", "-nostats", "-i", tmp_path / "noise.wav", "-af", "ebur128", "-f", "null"]
    done = subprocess.run([*command, "-"], capture_output=True, text=True, check=True)
    theirs = float(re.findall(r"I:\s+(-[\d.]+) LUFS", done.stderr)[-1])
    assert integrated_loudness(wave.T, 44100) == pytest.approx(theirs, abs=0.1)


def test_a_second_run_decodes_nothing(stats_cache, tmp_path, monkeypatch):
    first = stats_of(stats_cache, tmp_path / "a.flac", tone(seconds=3))
    monkeypatch.setattr(audio, "read_blocks", None)
    assert stats_cache.stats("a", tmp_path / "a.flac") == first
    assert set(first) == set(STAT_COLUMNS)


def test_the_beginning_of_a_clip_is_what_is_compared(stats_cache, tmp_path):
    stats_of(stats_cache, tmp_path / "a.wav", tone(seconds=3, peak=0.1), subtype="FLOAT")
    wave = stats_cache.load_wave("a")
    assert len(wave) == 2 * SAMPLE_RATE
    assert np.abs(wave).max() == pytest.approx(1, abs=1e-3)
    frames = stats_cache.fingerprint("a").shape[1]
    assert frames == pytest.approx(2 * SAMPLE_RATE / HOP_LENGTH, abs=1)


@pytest.mark.parametrize(
    "change", ["file", "truncated", "empty", "bit flip", "header", "compared seconds"]
)
def test_a_damaged_or_outdated_entry_is_computed_again(stats_cache, tmp_path, change):
    path, entry = tmp_path / "a.wav", stats_cache.path("a")
    stats_of(stats_cache, path, tone(seconds=3))
    data = bytearray(entry.read_bytes())
    if change == "file":
        soundfile.write(path, tone(seconds=2), 8000)
    elif change == "truncated":
        entry.write_bytes(data[:1000])
    elif change == "empty":
        entry.write_bytes(b"")
    elif change == "bit flip":
        data[-4000] ^= 255  # in the wave
        entry.write_bytes(data)
    elif change == "header":
        data[data.rfind(b"), }")] = ord(" ")  # of the wave's, which NumPy parses
        entry.write_bytes(data)
    else:
        stats_cache = AudioStatsCache(stats_cache.folder, seconds=1.0)
    stats = stats_cache.stats("a", path)
    assert stats["seconds"] == pytest.approx(2 if change == "file" else 3)
    wave = stats_cache.load_wave("a")
    assert len(wave) == SAMPLE_RATE * (1 if change == "compared seconds" else 2)


def test_files_that_cannot_be_decoded_are_listed_with_the_others(stats_cache, tmp_path):
    soundfile.write(tmp_path / "good.wav", tone(seconds=1), 8000)
    (tmp_path / "bad.wav").write_bytes(b"this is no audio")
    soundfile.write(tmp_path / "silent.wav", np.zeros(800), 8000)
    names = ["good", "bad", "silent", "gone"]
    clips = pd.DataFrame({"clip": names, "path": [tmp_path / f"{name}.wav" for name in names]})
    table = compute_audio_stats(clips, stats_cache, threads=2).set_index("clip")
    assert table["error"]["good"] == ""
    assert table["seconds"]["good"] == pytest.approx(1)
    for name, reason in {"bad": "decoded", "silent": "silent", "gone": "No such file"}.items():
        assert reason in table["error"][name]
        assert np.isnan(table["seconds"][name])
