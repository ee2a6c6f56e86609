"""Loudness is what the standard's own test tones and ffmpeg's meter say."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from stemgenre.loudness import integrated_loudness


def sine(rate, *, peak=1.0, seconds=3.0, hertz=997):
    return peak * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)[None]


@pytest.mark.parametrize("rate", [48000, 44100, 22050])
def test_a_full_scale_sine_has_the_standards_loudness(rate):
    assert integrated_loudness(sine(rate), rate) == pytest.approx(-3.01, abs=0.05)
    assert integrated_loudness(np.tile(sine(rate), (2, 1)), rate) == pytest.approx(0, abs=0.05)


def test_pauses_do_not_count_and_silence_has_no_loudness():
    loud = sine(22050, peak=0.1)
    with_pause = np.concatenate([loud, np.zeros((1, 22050 * 5)), loud * 0.01], axis=1)
    assert integrated_loudness(with_pause, 22050) == pytest.approx(
        integrated_loudness(loud, 22050), abs=0.3
    )
    assert integrated_loudness(np.zeros((1, 22050)), 22050) == -np.inf


def test_the_shortest_clip_has_a_loudness():
    assert np.isfinite(integrated_loudness(sine(8000, seconds=0.01), 8000))


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_ffmpeg_measures_the_same(tmp_path):
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.05, (44100 * 6, 2)) * np.linspace(0.02, 1, 44100 * 6)[:, None]
    soundfile.write(tmp_path / "noise.wav", wave, 44100)
    command = ["ffmpeg", "-nostats", "-i", tmp_path / "noise.wav", "-af", "ebur128", "-f", "null"]
    done = subprocess.run([*command, "-"], capture_output=True, text=True, check=True)
    theirs = float(re.findall(r"I:\s+(-[\d.]+) LUFS", done.stderr)[-1])
    assert integrated_loudness(wave.T, 44100) == pytest.approx(theirs, abs=0.1)
