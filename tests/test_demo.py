"""The demo: genres that differ in their music, in files laid out like the competition's."""

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

from stemgenre.cli import parse_settings
from stemgenre.data.competition import load_competition
from stemgenre.data.source_hashes import HASHES_FILE
from stemgenre.demo import demo as demo_module
from stemgenre.demo.demo import (
    HARD_TEST,
    HARD_TRAIN,
    MANIFEST_NAME,
    make_hard_demo,
    sample_clips,
    write_demo,
)
from stemgenre.demo.styles import STYLES
from stemgenre.demo.synth import GENRES, generate_score, render
from stemgenre.demo.variation import Variation
from stemgenre.errors import UserError
from stemgenre.separation.cache import StemCache
from stemgenre.settings import STEMS

SR = 11025
SMALL = {"seed": 7, "train_per_genre": 2, "test_per_genre": 1, "seconds": 1.0, "sr": SR}


def make_demo(folder, **changes):
    """The demo written to `folder`, and its stem cache."""
    cache = StemCache(folder / "separated", model="htdemucs", sample_rate=SR)
    write_demo(folder, **(SMALL | changes), cache=cache)
    return folder, cache


def snapshot(folder):
    """{relative path: (bytes, time of modification)} of all files but the cache's hashes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != HASHES_FILE)
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def read_tsv(path):
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small demo and its stem cache; read-only."""
    return make_demo(tmp_path_factory.mktemp("demo"))


def render_clips(per_genre, **options):
    """Label ids and stems (4, samples) of clips of 4 s."""
    sampled = sample_clips("train", per_genre, seconds=4.0, seed=[1, 0])
    stems = [
        render(clip.genre, seed=clip.seed, seconds=clip.seconds, sr=SR, **options)
        for clip in sampled
    ]
    return np.array([clip.label_id for clip in sampled]), stems


@pytest.fixture(scope="module")
def clips():
    """Label ids and stems (4, samples) of seven clips per genre."""
    return render_clips(7)


def log_mel_statistics(stems):
    """Mean and standard deviation over time of each stem's log-mel bands, in dB."""
    mel = librosa.feature.melspectrogram(y=stems, sr=SR, n_fft=1024, n_mels=20)  # (4, 20, frames)
    db = librosa.power_to_db(mel, ref=mel.max(), top_db=None).clip(-80, 0)
    return np.concatenate([db.mean(axis=2), db.std(axis=2)]).ravel()


def max_correlation(excerpt, clip):
    """The largest normalised correlation of `excerpt` with any part of `clip`, 0 to 1."""
    correlation = signal.correlate(clip, excerpt, mode="valid")
    energy = signal.convolve(clip**2, np.ones(len(excerpt)), mode="valid")
    energy = np.maximum(energy, 0.1 * energy.max())  # near silence correlates with nothing
    return np.max(np.abs(correlation) / np.sqrt(energy * np.sum(excerpt**2)))


def cumulative_power(wave, hz, sr):
    """Fraction of the power below each of the frequencies `hz`."""
    bins_hz, power = signal.periodogram(wave, sr)
    return np.interp(hz, bins_hz, np.cumsum(power) / power.sum())


def frame_levels(wave, frame_s, sr):
    """Level in dB of each frame of `frame_s` seconds, at least -30 relative to the loudest."""
    starts = [int(start) for start in np.arange(0, len(wave) - frame_s * sr, frame_s * sr)]
    power = np.add.reduceat(wave.astype(float) ** 2, starts)[:-1]
    return 10 * np.log10(power + 1e-3 * power.max())


def test_a_clip_is_four_finite_stems_with_headroom(clips):
    for stems in clips[1]:
        assert stems.shape[0] == len(STEMS) and stems.dtype == np.float32
        assert np.isfinite(stems).all()
        assert 0.05 < np.abs(stems.sum(axis=0)).max() < 1
    assert render("jazz", seed=1, seconds=1.5, sr=8000).shape == (4, 12000)


def test_a_clip_is_a_function_of_its_seed():
    first = render("rock", seed=5, seconds=1, sr=SR)
    np.testing.assert_array_equal(first, render("rock", seed=5, seconds=1, sr=SR))
    assert not np.allclose(first, render("rock", seed=6, seconds=1, sr=SR))


def test_genres_can_be_classified(clips):
    labels, stems = clips
    features = np.array([log_mel_statistics(clip) for clip in stems])
    forest = RandomForestClassifier(100, random_state=0)
    assert cross_val_score(forest, features, labels, cv=3).mean() > 0.9


@pytest.mark.heavy
def test_genres_of_the_hard_demo_are_learnt_less_well_but_can_be():
    """Of which the last test finds more than 0.9 with ordinary clips."""
    labels, features = [], []
    for variation, per_genre in ((HARD_TRAIN, 3), (HARD_TEST, 3)):
        found, stems = render_clips(per_genre, variation=variation)
        labels.append(found)
        features.append(np.array([log_mel_statistics(clip) for clip in stems]))
    forest = RandomForestClassifier(100, random_state=0).fit(features[0], labels[0])
    assert 0.3 < forest.score(features[1], labels[1]) < 0.8


def test_loudness_and_length_do_not_leak_the_genre(clips):
    labels, stems = clips
    mixes = [clip.sum(axis=0) for clip in stems]
    features = [(np.log(mix.std()), len(mix)) for mix in mixes]
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    assert cross_val_score(classifier, features, labels, cv=4).mean() < 0.3


def test_clips_of_a_genre_have_no_bar_in_common(clips):
    labels, stems = clips
    for label_id in range(len(GENRES)):
        mixes = [stems[i].sum(axis=0) for i in np.flatnonzero(labels == label_id)[:4]]
        bar = mixes[0][SR : 3 * SR]
        assert max_correlation(bar, mixes[0]) > 0.99
        assert all(max_correlation(bar, other) < 0.5 for other in mixes[1:])


@pytest.mark.parametrize("genre", GENRES)
def test_an_octave_up_doubles_the_frequencies_and_keeps_the_timing(genre):
    hz = np.geomspace(30, 11000, 100)
    low, high = (render(genre, seed=3, seconds=2, sr=44100, semitones=n) for n in (0, 12))
    for stem, octave in zip(low, high, strict=True):
        assert stem.any() == octave.any()
        if stem.any():
            power = cumulative_power(stem, hz, 44100)
            assert np.abs(power - cumulative_power(octave, 2 * hz, 44100)).mean() < 0.03
            assert np.abs(power - cumulative_power(octave, hz, 44100)).mean() > 0.08
            difference = frame_levels(stem, 0.04, 44100) - frame_levels(octave, 0.04, 44100)
            assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("genre", GENRES)
def test_a_faster_tempo_keeps_the_score_and_the_pitch(genre):
    hz = np.geomspace(30, SR / 2, 100)
    slow = render(genre, seed=3, seconds=4, sr=SR)
    fast = render(genre, seed=3, seconds=4, sr=SR, rate=1.25)
    assert fast.shape == slow.shape
    assert fast[:, -SR // 2 :].std() > 0.3 * fast.std()  # the score is long enough
    same_score = fast[:, : round(fast.shape[1] / 1.25)]
    for stem, faster in zip(slow, same_score, strict=True):
        if stem.any():
            difference = cumulative_power(stem, hz, SR) - cumulative_power(faster, hz, SR)
            assert np.abs(difference).mean() < 0.02
            difference = frame_levels(stem, 0.05, SR)[:78] - frame_levels(faster, 0.04, SR)[:78]
            assert np.abs(difference).mean() < 2.5


def test_a_variation_limits_keys_tempi_and_instruments():
    rng = np.random.default_rng(0)
    for key in (0, 6):
        limits = Variation(keys=(key, key + 1), tempi=(0.5, 0.5), instruments=(-1, None))
        notes = generate_score(STYLES["country"], seconds=8, rng=rng, variation=limits)
        bass = [note for note in notes if note.stem == "bass"]
        tones = {round(12 * np.log2(note.hz / 440) + 9) % 12 for note in bass}
        roots = {(tone + key) % 12 for tone in (0, 2, 4, 5, 7, 9, 11)}  # and approach notes
        assert len(tones & roots) >= 0.6 * len(tones)
        kicks = sorted({round(n.start_s, 2) for n in notes if n.stem == "drums" and n.hz})
        steps = np.diff(kicks) / (240 / 121 / 16)  # sixteenths at the middle of 92 to 150 bpm
        assert np.abs(steps - steps.round()).max() < 0.25


def test_an_unknown_genre_or_too_fast_a_tempo_is_refused():
    with pytest.raises(ValueError, match="polka.*blues"):
        render("polka", seed=0, seconds=1)
    with pytest.raises(ValueError, match="rate 1.3"):
        render("pop", seed=0, seconds=1, rate=1.3)


def test_the_demo_loads_as_a_competition(demo):
    folder, cache = demo
    competition = load_competition(folder, num_classes=10, cache_dir=cache.folder)
    assert competition.label_names == list(GENRES) and competition.label_ids == list(range(10))
    assert np.bincount(competition.train["target"]).tolist() == [2] * 10
    assert np.bincount(competition.test["target"]).tolist() == [1] * 10
    assert competition.template.header is None and competition.template.rows[0][1] == "0"
    for table in (competition.train, competition.test):
        assert all(cache.is_current(row.clip, row.path) for row in table.itertuples())


def test_the_layout_is_the_competitions(demo):
    folder, _ = demo
    audio = {path.relative_to(folder).as_posix() for path in folder.rglob("*.au")}
    train = {f"train_sound_{1 + i // 10}/train_sound_{1 + i // 10}/train_{i}.au" for i in range(20)}
    test = {f"test_sound_{1 + i // 5}/test_sound_{1 + i // 5}/test_{i}.au" for i in range(10)}
    assert audio == train | test
    assert read_tsv(folder / "train_master.tsv")[0] == ["file_name", "label_id"]
    assert read_tsv(folder / "label_master.tsv")[:2] == [["label_name", "label_id"], ["blues", "0"]]
    assert read_tsv(folder / "sample_submit.tsv")[0] == ["test_0.au", "0"]
    labels = read_tsv(folder / "test_master.tsv")
    assert [row[0] for row in labels[1:]] == [f"test_{i}.au" for i in range(10)]
    order = [int(row[1]) for row in read_tsv(folder / "train_master.tsv")[1:]]
    assert order != sorted(order)


def test_the_stems_add_up_to_the_mix(demo):
    folder, cache = demo
    paths = list(folder.rglob("*.au"))
    assert len(paths) == 30
    for path in paths:
        info = soundfile.info(path)
        assert (info.format, info.subtype) == ("AU", "PCM_16")
        assert (info.channels, info.samplerate) == (1, SR)
        assert 0.94 <= info.duration <= 1.06
        mix, _ = soundfile.read(path)
        assert np.abs(mix).max() < 0.99
        np.testing.assert_allclose(cache.read(path.stem).astype(float).sum(axis=0), mix, atol=1e-3)


def test_a_complete_demo_is_not_written_again(demo):
    before = snapshot(demo[0])
    make_demo(demo[0])
    assert snapshot(demo[0]) == before


def test_the_same_parameters_give_the_same_bytes(demo, tmp_path):
    again, _ = make_demo(tmp_path)
    written = [path for path in again.rglob("*") if path.suffix in (".au", ".tsv", ".json")]
    names = [path.relative_to(again) for path in written]
    assert len(names) == 30 + 4 + 1
    assert filecmp.cmpfiles(demo[0], again, names, shallow=False)[0] == names


def test_an_incomplete_demo_is_completed(tmp_path):
    small = {"train_per_genre": 1, "test_per_genre": 0, "seconds": 0.5}
    folder, cache = make_demo(tmp_path, **small)
    audio = next(folder.rglob("train_3.au"))
    original = audio.read_bytes()
    for file in (audio, cache.path("train_3"), folder / "label_master.tsv"):
        file.unlink()
        make_demo(tmp_path, **small)
        assert audio.read_bytes() == original
        assert cache.is_current("train_3", audio) and file.is_file()
    (folder / MANIFEST_NAME).write_text('{"format"')  # truncated
    make_demo(tmp_path, **small)
    before = snapshot(folder)
    make_demo(tmp_path, **small)
    assert snapshot(folder) == before


def test_a_demo_that_was_stopped_is_written_the_next_time(tmp_path):
    small = {"train_per_genre": 1, "test_per_genre": 0, "seconds": 0.5}
    stops = iter([False, False, True])
    make_demo(tmp_path, **small, should_stop=lambda: next(stops))
    assert len(list(tmp_path.rglob("*.au"))) == 2
    make_demo(tmp_path, **small)
    assert len(list(tmp_path.rglob("*.au"))) == 10


def test_other_parameters_replace_the_demo_without_leftovers(tmp_path):
    make_demo(tmp_path, train_per_genre=2, test_per_genre=1, seconds=0.5)
    folder, _ = make_demo(tmp_path, train_per_genre=1, test_per_genre=1, seconds=0.5, seed=8)
    assert len(list(folder.rglob("*.au"))) == 20
    assert len(read_tsv(folder / "train_master.tsv")) == 11


@pytest.mark.parametrize("name", ["train_master.csv", "train_sound_1/train_0.au"])
def test_data_that_is_not_a_demo_is_never_deleted(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("file_name,label_id\n")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=name.partition("/")[0]):
        make_demo(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "train_sound_1/train_sound_1/train_0.au",
        "train_sound_3/train_sound_3/train_900.au",
        "train_master.tsv",
        "label_master.csv",
    ],
)
def test_real_data_copied_over_a_demo_is_never_deleted(name, tmp_path):
    small = {"train_per_genre": 1, "test_per_genre": 1, "seconds": 0.5}
    make_demo(tmp_path, **small)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a real file")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=rf"{name}.*another folder"):
        make_demo(tmp_path, **small, seed=8)
    assert snapshot(tmp_path) == before


def test_a_changed_table_is_not_taken_for_the_demos(tmp_path):
    small = {"train_per_genre": 1, "test_per_genre": 1, "seconds": 0.5}
    make_demo(tmp_path, **small)
    (tmp_path / "train_master.tsv").write_text("file_name\tlabel_id\ntrain_0.au\t3\n")
    with pytest.raises(UserError, match="train_master.tsv"):
        make_demo(tmp_path, **small)


def test_other_files_in_the_demos_folders_stay(tmp_path):
    small = {"train_per_genre": 1, "test_per_genre": 0, "seconds": 0.5}
    make_demo(tmp_path, **small)
    note = tmp_path / "train_sound_1" / "train_sound_1" / "notes.txt"
    note.write_text("mine")
    make_demo(tmp_path, **small, seed=8)
    assert note.read_text() == "mine"
    assert len(list(tmp_path.rglob("*.au"))) == 10


def test_stems_of_a_real_competition_in_a_shared_cache_are_not_replaced(tmp_path):
    source, cache_dir = tmp_path / "train_0.au", tmp_path / "stems"
    soundfile.write(source, np.full(SR, 0.1), SR)
    real = StemCache(cache_dir, model="htdemucs", sample_rate=SR)
    real.write("train_0", np.full((4, SR), 0.1), source)
    small = SMALL | {"train_per_genre": 1, "test_per_genre": 0, "seconds": 0.5}
    cache = StemCache(cache_dir, model="synthesised", sample_rate=SR)
    with pytest.raises(UserError, match=r"train_0\.npz .*htdemucs.*SEPARATION_CACHE_DIR"):
        write_demo(tmp_path / "demo", **small, cache=cache)
    assert real.is_current("train_0", source)
    assert not (tmp_path / "demo").exists()
    real.path("train_0").write_bytes(b"damaged")
    write_demo(tmp_path / "demo", **small, cache=cache)
    assert cache.read("train_0").any()


def test_the_hard_demo_has_few_training_clips_and_imperfect_stems(tmp_path):
    small = {"seconds": 0.5, "train_per_genre": 1, "test_per_genre": 1}
    folder, cache = make_demo(tmp_path / "a", **small, variations=(HARD_TRAIN, HARD_TEST))
    for path in folder.rglob("*.au"):
        stems, (mix, _) = cache.read(path.stem).astype(float), soundfile.read(path)
        np.testing.assert_allclose(stems.sum(axis=0), mix, atol=1e-3)
        assert (np.abs(stems).max(axis=1) > 1e-3).all(), "every stem has a part of the others"
    again, _ = make_demo(tmp_path / "b", **small, variations=(HARD_TRAIN, HARD_TEST))
    names = [path.relative_to(folder) for path in folder.rglob("*.au")]
    assert filecmp.cmpfiles(folder, again, names, shallow=False)[0] == names
    ordinary, _ = make_demo(tmp_path / "b", **small)  # in its place
    assert filecmp.cmpfiles(folder, ordinary, names, shallow=False)[1] == names


def test_train_py_finds_the_hard_demo_and_its_stems(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "HARD_TRAIN_PER_GENRE", 1)
    monkeypatch.setattr(demo_module, "HARD_TEST_PER_GENRE", 1)
    make_hard_demo(tmp_path)
    settings = parse_settings([f"DATA_DIR={tmp_path}"], demo=True)
    cache = StemCache(settings.cache_folder, model="synthesised", sample_rate=settings.features.sr)
    competition = load_competition(tmp_path, num_classes=10, cache_dir=cache.folder)
    for table in (competition.train, competition.test):
        assert len(table) == 10 and set(table["target"]) == set(range(10))
        assert all(cache.is_current(row.clip, row.path) for row in table.itertuples())
