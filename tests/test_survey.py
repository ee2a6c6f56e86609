"""What is measured of a file is true, kept, and measured anew once the file has changed."""

import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers import tone

from stemgenre import audio
from stemgenre.errors import UserError
from stemgenre.fingerprint import RATE
from stemgenre.survey import MEASURES, Survey, clipped_samples, survey_clips


@pytest.fixture
def survey(tmp_path):
    return Survey(tmp_path / "measured", seconds=2.0)


def measures(survey, path, wave, rate=8000, **options):
    soundfile.write(path, wave, rate, **options)
    return survey.measures(path.stem, path)


def test_the_measures_of_a_known_wave(survey, tmp_path):
    wave = np.concatenate([tone(seconds=3, sr=22050, peak=0.5), np.zeros(22050)]) + 0.1
    found = measures(survey, tmp_path / "a.wav", np.stack([wave, 0 * wave], axis=1), 22050)
    assert found["seconds"] == pytest.approx(4)
    assert (found["sample_rate"], found["channels"], found["codec"]) == (22050, 2, "PCM_16")
    assert found["peak_db"] == pytest.approx(20 * np.log10(0.6), abs=0.01)
    assert found["dc"] == pytest.approx(0.1, abs=0.001)
    assert found["clipped_samples"] == 0
    assert found["loudness_lufs"] == pytest.approx(-9.7, abs=0.3)  # 10 lg 0.125 - 0.69


def test_silence_and_clipping_are_counted(survey, tmp_path):
    wave = np.concatenate([tone(seconds=3, sr=22050, peak=2.0).clip(-1, 1), np.zeros(22050)])
    found = measures(survey, tmp_path / "a.wav", wave, 22050)
    assert found["silent_share"] == pytest.approx(0.25, abs=0.02)
    share = found["clipped_samples"] / (3 * 22050)
    assert share == pytest.approx(2 / 3, abs=0.02)  # a sine is above half its peak for so long


def test_peaks_that_only_touch_full_scale_are_not_clipped():
    wave = np.zeros((1, 30), dtype=np.float32)
    wave[0, [3, 4, 10]] = 1, 1, -1
    assert clipped_samples(wave) == 0
    wave[0, [0, 1, 2, 27, 28, 29]] = -1
    assert clipped_samples(wave) == 5 + 3


def test_a_second_look_decodes_nothing(survey, tmp_path, monkeypatch):
    first = measures(survey, tmp_path / "a.flac", tone(seconds=3))
    monkeypatch.setattr(audio, "decode", None)
    assert survey.measures("a", tmp_path / "a.flac") == first
    assert set(first) == set(MEASURES)


def test_what_is_kept_to_compare_is_the_beginning_at_its_rate(survey, tmp_path):
    measures(survey, tmp_path / "a.wav", tone(seconds=3, peak=0.1), subtype="FLOAT")
    wave = survey.wave("a")
    assert len(wave) == 2 * RATE
    assert np.abs(wave).max() == pytest.approx(1, abs=1e-3)
    assert survey.fingerprint("a").shape[1] == pytest.approx(2 * RATE / 256, abs=1)


@pytest.mark.parametrize("damage", ["changed", "torn", "empty", "other seconds"])
def test_what_no_longer_fits_is_measured_anew(survey, tmp_path, damage):
    path = tmp_path / "a.wav"
    measures(survey, path, tone(seconds=3))
    entry = survey.path("a")
    if damage == "changed":
        soundfile.write(path, tone(seconds=2), 8000)
    elif damage == "torn":
        entry.write_bytes(entry.read_bytes()[:1000])
    elif damage == "empty":
        entry.write_bytes(b"")
    else:
        survey = Survey(survey.folder, seconds=1.0)
    found = survey.measures("a", path)
    assert found["seconds"] == pytest.approx(2 if damage == "changed" else 3)
    assert len(survey.wave("a")) == RATE * (1 if damage == "other seconds" else 2)


def test_files_that_cannot_be_read_are_listed_beside_the_others(survey, tmp_path):
    soundfile.write(tmp_path / "good.wav", tone(seconds=1), 8000)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    soundfile.write(tmp_path / "silent.wav", np.zeros(800), 8000)
    names = ["good", "bad", "silent", "gone"]
    clips = pd.DataFrame({"clip": names, "path": [tmp_path / f"{name}.wav" for name in names]})
    found = survey_clips(clips, survey, threads=2).set_index("clip")
    assert found["error"]["good"] == ""
    assert found["seconds"]["good"] == pytest.approx(1)
    for name, reason in {"bad": "decoded", "silent": "silent", "gone": "no such file"}.items():
        assert reason in found["error"][name]
        assert np.isnan(found["seconds"][name])


def test_a_damaged_entry_is_named_with_the_way_out(survey, tmp_path):
    measures(survey, tmp_path / "a.wav", tone(seconds=3))
    data = bytearray(survey.path("a").read_bytes())
    data[-4000] ^= 255  # in the wave
    survey.path("a").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npz cannot be read.*delete it"):
        survey.wave("a")
