"""The same recording is found whatever was done to it; another song on the same beat is not."""

import subprocess

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers import MUSIC, give_up

from stemgenre.data import audio
from stemgenre.data.duplicates import ROWS, SIMILARITY_THRESHOLD, find_duplicates
from stemgenre.data.fingerprint import SAMPLE_RATE, fingerprint, similarity
from stemgenre.demo.styles import GENRES
from stemgenre.demo.synth import render

SR = 11025


def to_compared_rate(wave, rate=SR):
    """A wave as it is compared: mono at SAMPLE_RATE."""
    return audio.resample(np.asarray(wave, np.float32), from_rate=rate, to_rate=SAMPLE_RATE)


def duplicates_of(waves, **options):
    return find_duplicates([fingerprint(wave) for wave in waves], waves.__getitem__, **options)


@pytest.fixture(scope="module")
def song():
    return render("pop", seed=5, seconds=24.0, sr=SR).sum(axis=0)


def encode(wave, path, rate=SR):
    """The wave as it comes out of a file of that kind."""
    soundfile.write(path, wave, rate)
    wave, rate = audio.decode(path)
    return to_compared_rate(wave[0], rate)


ALTERED = {
    "softer": lambda cut, folder: to_compared_rate(0.5 * cut),
    "louder": lambda cut, folder: to_compared_rate(2 * cut),
    "inverted polarity": lambda cut, folder: to_compared_rate(-cut),
    "mp3": lambda cut, folder: encode(0.5 * cut, folder / "cut.mp3"),
    "vorbis": lambda cut, folder: encode(cut, folder / "cut.ogg"),
    "8 bit": lambda cut, folder: encode(cut, folder / "cut.au"),
    "another rate": lambda cut, folder: encode(
        librosa.resample(cut, orig_sr=SR, target_sr=16000), folder / "cut.wav", 16000
    ),
}


@pytest.mark.parametrize("alteration", ALTERED)
def test_an_overlapping_cut_is_found_with_its_offset(song, tmp_path, alteration):
    start = 13.337  # s: 10.7 s overlap, and the start is on no frame's border
    cut = ALTERED[alteration](song[round(start * SR) :], tmp_path)
    pairs = duplicates_of([cut, to_compared_rate(song)])
    assert pairs[["first", "second"]].to_numpy().tolist() == [[0, 1]]
    assert pairs["offset_seconds"][0] == pytest.approx(-start, abs=0.06)  # an encoder may delay
    assert pairs["overlap_seconds"][0] == pytest.approx(len(cut) / SAMPLE_RATE, abs=0.06)
    assert pairs["similarity"][0] > 0.95


def test_queries_are_compared_with_the_others_only():
    rng = np.random.default_rng(0)
    first, second, third = (rng.normal(0, 0.1, 8 * SAMPLE_RATE) for _ in range(3))
    waves = [third, first, first, *rng.normal(0, 0.1, (ROWS, 8 * SAMPLE_RATE)), second, second]
    waves += [first, third[SAMPLE_RATE:]]
    pairs = duplicates_of(waves, num_queries=2 + ROWS)[["first", "second"]].to_numpy().tolist()
    last = len(waves) - 1
    assert pairs == [[0, last], [1, last - 1], [2, last - 1]]


def test_two_cuts_of_which_neither_contains_the_other_are_found(song):
    first, second = song[: SR * 17], song[round(5.5 * SR) :]
    pairs = duplicates_of([to_compared_rate(first), to_compared_rate(second)])
    assert pairs["offset_seconds"].tolist() == pytest.approx([5.5], abs=0.001)
    assert pairs["overlap_seconds"].tolist() == pytest.approx([11.5], abs=0.01)


def melody_over_drums(seed, *, drum_gain, seconds=24):
    """A melody that depends on `seed` over the same drum machine at the same tempo."""
    notes, noise = np.random.default_rng(seed), np.random.default_rng(0)
    time = np.arange(SAMPLE_RATE // 4) / SAMPLE_RATE
    kick = np.sin(2 * np.pi * 55 * time) * np.exp(-12 * time)
    snare = noise.normal(0, 0.5, len(time)) * np.exp(-20 * time)
    wave = np.zeros(seconds * SAMPLE_RATE)
    for step in range(seconds * 4):
        hertz = 220 * 2 ** (notes.choice([0, 3, 5, 7, 10, 12]) / 12)
        tone = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in (1, 2, 3))
        drum = (kick, 0 * kick, snare, 0 * kick)[step % 4]
        part = slice(step * len(time), (step + 1) * len(time))
        wave[part] = 0.3 * tone * np.exp(-3 * time) + drum_gain * drum
    return (0.1 * wave).astype(np.float32)


@pytest.mark.parametrize("drum_gain", [0.5, 2.0])
def test_two_songs_on_one_drum_machine_are_no_duplicates(drum_gain):
    waves = [melody_over_drums(seed, drum_gain=drum_gain) for seed in range(4)]
    assert not len(duplicates_of(waves, candidate_threshold=0.1))  # the waveforms decide
    aligned, _ = similarity(waves[0], waves[1], 0.0)  # beat on beat
    assert aligned < SIMILARITY_THRESHOLD - 0.1


def test_songs_with_the_same_instruments_are_no_duplicates():
    waves = [
        to_compared_rate(render(genre, seed=seed, seconds=8.0, sr=SR).sum(axis=0))
        for genre in GENRES
        for seed in range(2)
    ]
    assert not len(duplicates_of(waves, candidate_threshold=0.15))  # many waveforms are compared


def test_noise_tones_silence_and_very_short_clips_are_no_duplicates():
    rng = np.random.default_rng(0)
    time = np.arange(12 * SAMPLE_RATE) / SAMPLE_RATE
    half_silent = [
        np.concatenate([np.zeros(6 * SAMPLE_RATE), rng.normal(0, 0.1, 6 * SAMPLE_RATE)])
        for _ in range(2)
    ]
    waves = [
        *rng.normal(0, 0.1, (2, 12 * SAMPLE_RATE)),
        0.5 * np.sin(2 * np.pi * 440 * time),
        0.5 * np.sin(2 * np.pi * 440.5 * time),
        *half_silent,
        rng.normal(0, 0.1, 40),
        rng.normal(0, 0.1, 1),
    ]
    assert not len(duplicates_of([wave.astype(np.float32) for wave in waves]))


def test_no_clip_and_a_single_clip_have_no_duplicates(song):
    for waves in ([], [to_compared_rate(song)]):
        pairs = duplicates_of(waves)
        assert not len(pairs)
        assert "offset_seconds" in pairs


def test_many_clips_of_different_lengths_are_all_compared():
    """More than are compared at once, and each finds its duplicate at its offset."""
    rng = np.random.default_rng(1)
    waves, expected = [], []
    for number in range(ROWS // 2 + 4):
        whole = rng.normal(0, 0.1, 14 * SAMPLE_RATE).astype(np.float32)
        start = int(rng.integers(0, 3 * SAMPLE_RATE))
        waves += [whole[: len(whole) - number * 700], whole[start:]]
        expected.append((2 * number, 2 * number + 1, start / SAMPLE_RATE))
    found = duplicates_of(waves, threads=2).sort_values("first")
    assert list(zip(found["first"], found["second"], strict=True)) == [e[:2] for e in expected]
    assert found["offset_seconds"].to_list() == pytest.approx([e[2] for e in expected], abs=0.001)


def test_a_stop_request_ends_the_search(song):
    waves = [to_compared_rate(song), to_compared_rate(song)]
    assert not len(duplicates_of(waves, stopped=lambda: True))


@pytest.fixture
def real_cuts(tmp_path):
    """Real clips, and for every second one an altered cut: (waves, where they come from)."""
    if not MUSIC.is_dir():
        give_up("no real clips beside this checkout")
    paths = {path.name: path for path in MUSIC.rglob("*.au")}
    rng = np.random.default_rng(0)
    waves, origins = [], []
    clips = pd.read_csv(MUSIC / "provenance.tsv", sep="\t").itertuples()
    for number, clip in enumerate(clips):
        wave, rate = audio.decode(paths[clip.file_name])
        stop = clip.start_seconds + wave.shape[1] / rate
        waves.append(to_compared_rate(wave[0], rate))
        origins.append((clip.source, clip.start_seconds, stop))
        if number % 2 == 0:
            trim = rng.uniform(0, 8)
            cut = wave[0, round(trim * rate) :] * (0.5 if number % 4 else 2)
            waves.append(encode(np.clip(cut, -1, 1), tmp_path / "cut.mp3", rate))
            origins.append((clip.source, clip.start_seconds + trim, stop))
    return waves, pd.DataFrame(origins, columns=["source", "start", "stop"])


def test_real_recordings_pair_where_they_overlap_and_with_no_other(real_cuts):
    """0 missed, 0 false: clips of one recording that overlap by 10 s, trimmed, as mp3, +-6 dB."""
    waves, origins = real_cuts
    pairs = duplicates_of(waves, threads=2)
    found = {(row.first, row.second): row.offset_seconds for row in pairs.itertuples()}
    assert all(origins["source"][i] == origins["source"][j] for i, j in found)
    required = 0
    for i in range(len(origins)):
        for j in range(i + 1, len(origins)):
            overlap = origins["stop"][[i, j]].min() - origins["start"][[i, j]].max()
            if origins["source"][i] == origins["source"][j] and overlap >= 10:
                required += 1
                offset = origins["start"][j] - origins["start"][i]
                assert found[i, j] == pytest.approx(offset, abs=0.06)
    assert required > 25


@pytest.mark.usefixtures("ffmpeg")
def test_the_encoder_does_not_matter(song, tmp_path):
    """ffmpeg's mp3 at 64 kbit/s and another rate."""
    soundfile.write(tmp_path / "song.wav", song, SR)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "song.wav", "-ar", "44100", "-b:a", "64k"]
    subprocess.run([*command, tmp_path / "song.mp3"], check=True)
    wave, rate = audio.decode(tmp_path / "song.mp3")
    pairs = duplicates_of([to_compared_rate(song), to_compared_rate(wave[0], rate)])
    assert pairs["similarity"].min() > 0.95
