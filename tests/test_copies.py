"""The same recording is found whatever was done to it; another song on the same beat is not."""

import subprocess

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile

from stemgenre import audio, copies
from stemgenre.band import GENRES, render
from stemgenre.copies import SAME, find_copies
from stemgenre.fingerprint import RATE, fingerprint, similarity

SR = 11025


def heard(wave, rate=SR):
    """A wave as it is compared: mono at RATE."""
    return audio.resample(np.asarray(wave, np.float32), from_rate=rate, to_rate=RATE)


def pairs_of(waves, **options):
    return find_copies([fingerprint(wave) for wave in waves], waves.__getitem__, **options)


@pytest.fixture(scope="module")
def song():
    return render("pop", seed=5, seconds=24.0, sr=SR).sum(axis=0)


def through(wave, path, rate=SR):
    """The wave as it comes out of a file of that kind."""
    soundfile.write(path, wave, rate)
    wave, rate = audio.decode(path)
    return heard(wave[0], rate)


ALTERED = {
    "softer": lambda cut, folder: heard(0.5 * cut),
    "louder": lambda cut, folder: heard(2 * cut),
    "upside down": lambda cut, folder: heard(-cut),
    "mp3": lambda cut, folder: through(0.5 * cut, folder / "cut.mp3"),
    "vorbis": lambda cut, folder: through(cut, folder / "cut.ogg"),
    "8 bit": lambda cut, folder: through(cut, folder / "cut.au"),
    "another rate": lambda cut, folder: through(
        librosa.resample(cut, orig_sr=SR, target_sr=16000), folder / "cut.wav", 16000
    ),
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_overlapping_cut_is_found_with_its_offset(song, tmp_path, how):
    late = 13.337  # s: 10.7 are shared, and it is on no frame's border
    cut = ALTERED[how](song[round(late * SR) :], tmp_path)
    pairs = pairs_of([cut, heard(song)])
    assert pairs[["first", "second"]].to_numpy().tolist() == [[0, 1]]
    assert pairs["offset_seconds"][0] == pytest.approx(-late, abs=0.06)  # an encoder may delay
    assert pairs["overlap_seconds"][0] == pytest.approx(len(cut) / RATE, abs=0.06)
    assert pairs["similarity"][0] > 0.95


def test_two_cuts_with_ends_of_their_own_are_found(song):
    pairs = pairs_of([heard(song[: SR * 17]), heard(song[round(5.5 * SR) :])])
    assert pairs["offset_seconds"].tolist() == pytest.approx([5.5], abs=0.001)
    assert pairs["overlap_seconds"].tolist() == pytest.approx([11.5], abs=0.01)


def machine(seed, *, drums, seconds=24):
    """A melody of its own over the same drum machine at the same tempo."""
    notes, hits = np.random.default_rng(seed), np.random.default_rng(0)
    time = np.arange(RATE // 4) / RATE
    kick = np.sin(2 * np.pi * 55 * time) * np.exp(-12 * time)
    snare = hits.normal(0, 0.5, len(time)) * np.exp(-20 * time)
    wave = np.zeros(seconds * RATE)
    for step in range(seconds * 4):
        hertz = 220 * 2 ** (notes.choice([0, 3, 5, 7, 10, 12]) / 12)
        tone = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in (1, 2, 3))
        beat = (kick, 0 * kick, snare, 0 * kick)[step % 4]
        part = slice(step * len(time), (step + 1) * len(time))
        wave[part] = 0.3 * tone * np.exp(-3 * time) + drums * beat
    return (0.1 * wave).astype(np.float32)


@pytest.mark.parametrize("drums", [0.5, 2.0])
def test_two_songs_of_one_drum_machine_at_one_tempo_are_two(drums, monkeypatch):
    monkeypatch.setattr(copies, "WORTH_A_LOOK", 0.1)  # the waves have to tell
    waves = [machine(seed, drums=drums) for seed in range(4)]
    assert not len(pairs_of(waves))
    alike, _ = similarity(waves[0], waves[1], 0.0)  # even where the beats are laid on each other
    assert alike < SAME - 0.1


def test_songs_of_one_band_are_told_apart(monkeypatch):
    monkeypatch.setattr(copies, "WORTH_A_LOOK", 0.15)  # compare the waves of many
    waves = [
        heard(render(genre, seed=seed, seconds=8.0, sr=SR).sum(axis=0))
        for genre in GENRES
        for seed in range(2)
    ]
    assert not len(pairs_of(waves))


def test_noise_tones_silence_and_very_short_clips_are_no_copies():
    rng = np.random.default_rng(0)
    time = np.arange(12 * RATE) / RATE
    waves = [
        *rng.normal(0, 0.1, (2, 12 * RATE)),
        0.5 * np.sin(2 * np.pi * 440 * time),
        0.5 * np.sin(2 * np.pi * 440.5 * time),
        np.r_[np.zeros(6 * RATE), rng.normal(0, 0.1, 6 * RATE)],
        np.r_[np.zeros(6 * RATE), rng.normal(0, 0.1, 6 * RATE)],
        rng.normal(0, 0.1, 40),
        rng.normal(0, 0.1, 1),
    ]
    assert not len(pairs_of([wave.astype(np.float32) for wave in waves]))


def test_nothing_and_one_clip_have_no_pairs(song):
    assert list(pairs_of([]).columns) == list(pairs_of([heard(song)]).columns)
    assert not len(pairs_of([heard(song)]))


def test_many_clips_of_different_lengths_are_all_compared():
    """More than go through at once, and each finds its partner at its place."""
    rng = np.random.default_rng(1)
    waves, truth = [], []
    for seed in range(copies.ROWS + 4):
        whole = rng.normal(0, 0.1, 14 * RATE).astype(np.float32)
        late = int(rng.integers(0, 3 * RATE))
        waves += [whole[: len(whole) - seed * 700], whole[late:]]
        truth.append((2 * seed, 2 * seed + 1, late / RATE))
    found = pairs_of(waves, threads=2)
    assert sorted(zip(found["first"], found["second"], strict=True)) == [t[:2] for t in truth]
    offsets = found.sort_values("first")["offset_seconds"].to_numpy()
    assert offsets == pytest.approx(np.array([t[2] for t in truth]), abs=0.001)


def test_a_stop_is_heard(song):
    waves = [heard(song), heard(song)]
    assert not len(pairs_of(waves, stopped=lambda: True))


@pytest.fixture
def cuts(music):
    """The real clips, and each as an altered cut of its own: waves, and a table of the truth."""
    truth = pd.read_csv(music / "provenance.tsv", sep="\t")
    paths = {path.name: path for path in music.rglob("*.au")}
    rng = np.random.default_rng(0)
    waves, rows = [], []
    for number, row in enumerate(truth.itertuples()):
        wave, rate = audio.decode(paths[row.file_name])
        begin, start = rng.uniform(0, 8), row.start_seconds
        cut = wave[0, round(begin * rate) :] * (0.5 if number % 2 else 2)
        soundfile.write(music / "cut.mp3", np.clip(cut, -1, 1), rate)
        altered, altered_rate = audio.decode(music / "cut.mp3")
        waves += [heard(wave[0], rate), heard(altered[0], altered_rate)]
        stop = start + wave.shape[1] / rate
        rows += [(row.source, start, stop), (row.source, start + begin, stop)]
    return waves, pd.DataFrame(rows, columns=["source", "start", "stop"])


def test_real_recordings_pair_when_they_overlap_and_with_no_other(cuts):
    waves, truth = cuts
    pairs = pairs_of(waves, threads=2)
    found = {(row.first, row.second): row.offset_seconds for row in pairs.itertuples()}
    assert all(truth["source"][one] == truth["source"][two] for one, two in found)
    must = 0
    for one in range(len(truth)):
        for two in range(one + 1, len(truth)):
            shared = truth["stop"][[one, two]].min() - truth["start"][[one, two]].max()
            if truth["source"][one] == truth["source"][two] and shared >= 10:
                must += 1
                offset = truth["start"][two] - truth["start"][one]
                assert found[one, two] == pytest.approx(offset, abs=0.06)
    assert must > 50


def test_the_program_that_encodes_does_not_matter(song, tmp_path):
    """ffmpeg's mp3 at 64 kbit/s and another rate, if there is one."""
    soundfile.write(tmp_path / "song.wav", song, SR)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "song.wav", "-ar", "44100", "-b:a", "64k"]
    try:
        subprocess.run([*command, tmp_path / "song.mp3"], check=True)
    except FileNotFoundError:
        pytest.skip("ffmpeg is not installed")
    wave, rate = audio.decode(tmp_path / "song.mp3")
    assert pairs_of([heard(song), heard(wave[0], rate)])["similarity"].min() > 0.95
