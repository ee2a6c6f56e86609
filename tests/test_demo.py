"""The demo is music that can be told apart by ear, in files a competition could have handed out."""

import csv
import filecmp

import librosa
import numpy as np
import pytest
import soundfile
from scipy import signal
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stemgenre.band import GENRES, STEMS, render
from stemgenre.cache import StemCache
from stemgenre.demo import RECEIPT, draw_clips, write_demo
from stemgenre.errors import UserError
from stemgenre.metadata import load_competition

SR = 11025
SMALL = {"seed": 7, "train_per_genre": 2, "test_per_genre": 1, "seconds": 2.0, "sr": SR}


def make_demo(folder, **changes):
    """The demo written into `folder`, and its cache."""
    cache = StemCache(folder / "separated", model="htdemucs", sample_rate=SR)
    write_demo(folder, **(SMALL | changes), cache=cache)
    return folder, cache


def contents(folder):
    """{relative path: (bytes, time of writing)} of all files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def rows(path):
    """The cells of a .tsv."""
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small demo and its cache; tests leave it as it is."""
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def clips():
    """Seven drawn clips per genre: label ids, and stems of each, (4, samples)."""
    drawn = draw_clips("train", 7, seconds=4.0, seed=[1, 0])
    stems = [render(clip.genre, seed=clip.seed, seconds=clip.seconds, sr=SR) for clip in drawn]
    return np.array([clip.label_id for clip in drawn]), stems


def describe(stems):
    """Mean and spread over time of the log-mel bands of each stem, in dB below the loudest cell."""
    mel = librosa.feature.melspectrogram(y=stems, sr=SR, n_fft=1024, n_mels=20)  # (4, 32, frames)
    decibels = librosa.power_to_db(mel, ref=mel.max(), top_db=None).clip(-80, 0)
    return np.concatenate([decibels.mean(axis=2), decibels.std(axis=2)]).ravel()


def likeness(piece, clip):
    """The largest normalised correlation of `piece` with any stretch of `clip`, 0 to 1."""
    match = signal.correlate(clip, piece, mode="valid")
    energy = signal.convolve(clip**2, np.ones(len(piece)), mode="valid")
    energy = np.maximum(energy, 0.1 * energy.max())  # near silence is like nothing
    return np.max(np.abs(match) / np.sqrt(energy * np.sum(piece**2)))


def power_below(wave, hz, sr):
    """The share of the power that lies below each of the frequencies `hz`."""
    bins_hz, power = signal.periodogram(wave, sr)
    return np.interp(hz, bins_hz, np.cumsum(power) / power.sum())


def levels(wave, frame_s, sr):
    """Decibels of every frame of `frame_s` seconds, not below -30 of the loudest."""
    frame = [int(edge) for edge in np.arange(0, len(wave) - frame_s * sr, frame_s * sr)]
    power = np.add.reduceat(wave.astype(float) ** 2, frame)[:-1]
    return 10 * np.log10(power + 1e-3 * power.max())


def test_a_clip_is_four_finite_stems_that_leave_headroom(clips):
    for stems in clips[1]:
        assert stems.shape[0] == len(STEMS) and stems.dtype == np.float32
        assert np.isfinite(stems).all()
        assert 0.05 < np.abs(stems.sum(axis=0)).max() < 1
    assert render("jazz", seed=1, seconds=1.5, sr=8000).shape == (4, 12000)


def test_a_seed_names_one_clip():
    first = render("rock", seed=5, seconds=2, sr=SR)
    np.testing.assert_array_equal(first, render("rock", seed=5, seconds=2, sr=SR))
    assert not np.allclose(first, render("rock", seed=6, seconds=2, sr=SR))


def test_genres_can_be_told_apart(clips):
    labels, stems = clips
    features = np.array([describe(clip) for clip in stems])
    forest = RandomForestClassifier(150, random_state=0)
    assert cross_val_score(forest, features, labels, cv=4).mean() > 0.9


def test_loudness_and_length_do_not_give_the_genre_away(clips):
    labels, stems = clips
    mixes = [clip.sum(axis=0) for clip in stems]
    features = [(np.log(mix.std()), len(mix)) for mix in mixes]
    guess = make_pipeline(StandardScaler(), LogisticRegression())
    assert cross_val_score(guess, features, labels, cv=4).mean() < 0.3


def test_no_two_clips_share_a_bar(clips):
    labels, stems = clips
    for label_id in range(len(GENRES)):
        mixes = [stems[i].sum(axis=0) for i in np.flatnonzero(labels == label_id)[:4]]
        bar = mixes[0][SR : 3 * SR]
        assert likeness(bar, mixes[0]) > 0.99
        assert all(likeness(bar, other) < 0.5 for other in mixes[1:])


@pytest.mark.parametrize("genre", GENRES)
def test_an_octave_up_doubles_every_frequency_and_moves_no_note(genre):
    hz = np.geomspace(30, 11000, 100)
    low, high = (render(genre, seed=3, seconds=2, sr=44100, semitones=n) for n in (0, 12))
    for one, other in zip(low, high, strict=True):
        assert one.any() == other.any()
        if one.any():
            below = power_below(one, hz, 44100)
            assert np.abs(below - power_below(other, 2 * hz, 44100)).mean() < 0.03
            assert np.abs(below - power_below(other, hz, 44100)).mean() > 0.08
            moved = levels(one, 0.04, 44100) - levels(other, 0.04, 44100)
            assert np.abs(moved).mean() < 3


@pytest.mark.parametrize("genre", GENRES)
def test_a_faster_clip_is_the_same_score_sooner_and_no_higher(genre):
    hz = np.geomspace(30, SR / 2, 100)
    slow = render(genre, seed=3, seconds=4, sr=SR)
    fast = render(genre, seed=3, seconds=4, sr=SR, rate=1.25)
    assert fast.shape == slow.shape
    assert fast[:, -SR // 2 :].std() > 0.3 * fast.std()  # the score is long enough
    same_score = fast[:, : round(fast.shape[1] / 1.25)]
    for one, other in zip(slow, same_score, strict=True):
        if one.any():
            assert np.abs(power_below(one, hz, SR) - power_below(other, hz, SR)).mean() < 0.02
            moved = levels(one, 0.05, SR)[:78] - levels(other, 0.04, SR)[:78]
            assert np.abs(moved).mean() < 2.5


def test_a_clip_that_cannot_be_played_is_refused():
    with pytest.raises(ValueError, match="polka.*blues"):
        render("polka", seed=0, seconds=1)
    with pytest.raises(ValueError, match="rate 1.3"):
        render("pop", seed=0, seconds=1, rate=1.3)


def test_the_demo_is_read_like_a_competition(demo):
    folder, cache = demo
    competition = load_competition(folder, num_classes=10, cache_dir=cache.folder)
    assert competition.label_names == list(GENRES) and competition.label_ids == list(range(10))
    assert np.bincount(competition.train["target"]).tolist() == [2] * 10
    assert np.bincount(competition.test["target"]).tolist() == [1] * 10
    assert competition.form.header is None and competition.form.rows[0][1] == "0"
    for table in (competition.train, competition.test):
        assert all(cache.is_current(row.clip, row.path) for row in table.itertuples())


def test_the_layout_is_the_competitions(demo):
    folder, _ = demo
    sounds = {path.relative_to(folder).as_posix() for path in folder.rglob("*.au")}
    train = {f"train_sound_{1 + i // 10}/train_sound_{1 + i // 10}/train_{i}.au" for i in range(20)}
    test = {f"test_sound_{1 + i // 5}/test_sound_{1 + i // 5}/test_{i}.au" for i in range(10)}
    assert sounds == train | test
    assert rows(folder / "train_master.tsv")[0] == ["file_name", "label_id"]
    assert rows(folder / "label_master.tsv")[:2] == [["label_name", "label_id"], ["blues", "0"]]
    assert rows(folder / "sample_submit.tsv")[0] == ["test_0.au", "0"]
    truth = rows(folder / "test_master.tsv")
    assert [row[0] for row in truth[1:]] == [f"test_{i}.au" for i in range(10)]
    order = [int(row[1]) for row in rows(folder / "train_master.tsv")[1:]]
    assert order != sorted(order)


def test_the_stems_add_up_to_the_written_mix(demo):
    folder, cache = demo
    for path in folder.rglob("*.au"):
        info = soundfile.info(path)
        assert (info.format, info.subtype) == ("AU", "PCM_16")
        assert (info.channels, info.samplerate) == (1, SR)
        assert 1.88 <= info.duration <= 2.12
        mix, _ = soundfile.read(path)
        assert np.abs(mix).max() < 0.99
        np.testing.assert_allclose(cache.read(path.stem).astype(float).sum(axis=0), mix, atol=1e-3)


def test_a_demo_that_is_whole_is_left_as_it_is(demo):
    before = contents(demo[0])
    make_demo(demo[0])
    assert contents(demo[0]) == before


def test_the_same_parameters_give_the_same_files(demo, tmp_path):
    again, _ = make_demo(tmp_path)
    written = [path for path in again.rglob("*") if path.suffix in (".au", ".tsv", ".json")]
    names = [path.relative_to(again) for path in written]
    assert len(names) == 30 + 4 + 1
    assert filecmp.cmpfiles(demo[0], again, names, shallow=False)[0] == names


def test_a_demo_that_is_not_whole_is_written_anew(tmp_path):
    few = {"train_per_genre": 1, "test_per_genre": 0, "seconds": 1.0}
    folder, cache = make_demo(tmp_path, **few)
    sound = next(folder.rglob("train_3.au"))
    original = sound.read_bytes()
    for part in (sound, cache.path("train_3"), folder / "label_master.tsv"):
        part.unlink()
        make_demo(tmp_path, **few)
        assert sound.read_bytes() == original
        assert cache.is_current("train_3", sound) and part.is_file()
    (folder / RECEIPT).write_text('{"whole"')
    make_demo(tmp_path, **few)
    assert '"whole": true' in (folder / RECEIPT).read_text()


def test_other_parameters_leave_nothing_of_the_demo_before(tmp_path):
    make_demo(tmp_path, train_per_genre=2, test_per_genre=1, seconds=0.5)
    folder, _ = make_demo(tmp_path, train_per_genre=1, test_per_genre=1, seconds=0.5, seed=8)
    assert len(list(folder.rglob("*.au"))) == 20
    assert len(rows(folder / "train_master.tsv")) == 11


def test_data_that_is_not_a_demo_is_never_touched(tmp_path):
    (tmp_path / "train_master.csv").write_text("file_name,label_id\n")
    with pytest.raises(UserError, match="train_master.csv"):
        make_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train_master.csv"]
