"""A folder with vocals, drums, bass and other is one clip with these stems, without Demucs."""

import json
import logging
import shutil

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers import SMALL_RUN, put_table, run_training
from kill_points import start_two

from stemgenre.data import audio
from stemgenre.data.competition import load_competition
from stemgenre.data.find_files import clip_names, find_clips, stem_files
from stemgenre.errors import ClipError, UserError
from stemgenre.runtime import start_runtime
from stemgenre.separation.cache import open_cache
from stemgenre.separation.separate import separate_missing
from stemgenre.settings import STEMS, load_settings

SR = 11025


def stem_waves(*, seconds=1.0, seed=0, rate=SR):
    """Four stems of noise below 2 kHz, (4, samples) float32."""
    rng = np.random.default_rng(seed)
    slow = rng.uniform(-0.2, 0.2, (4, round(seconds * 4000))).astype(np.float32)
    return librosa.resample(slow, orig_sr=4000, target_sr=rate)


def put_song(folder, waves=None, *, rate=SR, suffix=".wav", seed=0):
    """Writes waves, {stem: (samples,)} or (4, samples), as a song's folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    waves = stem_waves(seed=seed, rate=rate) if waves is None else waves
    waves = waves if isinstance(waves, dict) else dict(zip(STEMS, waves, strict=True))
    for stem, wave in waves.items():
        subtype = "FLOAT" if suffix == ".wav" else None
        soundfile.write(folder / f"{stem}{suffix}", wave, rate, subtype=subtype)
    return folder


def put_clip(path, *, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, stem_waves(seed=seed).sum(0), SR)
    return path


def load(folder, **options):
    return load_competition(
        folder, num_classes="auto", cache_dir=folder / "separated", **options
    )  # fmt: skip


# Which clips there are


def test_in_a_genres_folder_a_song_is_one_clip(tmp_path):
    for seed, name in enumerate(("blues/blues.00000", "blues/b", "rock/rock.00000", "rock/r")):
        put_song(tmp_path / name, seed=seed)
    put_clip(tmp_path / "rock" / "plain.wav", seed=5)
    put_clip(tmp_path / "test" / "mix_1.wav", seed=6)
    put_song(tmp_path / "test" / "song_2", seed=7)
    competition = load(tmp_path)
    train = competition.train
    assert competition.label_names == ["blues", "rock"]
    assert train["file_name"].tolist() == [
        "blues/b", "blues/blues.00000", "rock/plain.wav", "rock/r", "rock/rock.00000",
    ]  # fmt: skip
    assert train["clip"].tolist() == ["b", "blues.00000", "plain", "r", "rock.00000"]
    assert train["target"].tolist() == [0, 0, 1, 1, 1]
    assert competition.test["file_name"].tolist() == ["mix_1.wav", "song_2"]


def test_a_masters_clip_can_be_a_song_with_or_without_the_suffix(tmp_path):
    put_song(tmp_path / "train_sound_1" / "train_0", seed=0)
    put_song(tmp_path / "train_sound_1" / "train_1", seed=1)
    put_song(tmp_path / "stems" / "train_2", seed=2)
    put_clip(tmp_path / "train_sound_1" / "train_2.wav", seed=2)  # its mix is there as well
    put_clip(tmp_path / "train_sound_1" / "train_3.wav", seed=3)
    put_clip(tmp_path / "test_sound_1" / "test_0.wav", seed=4)
    names = ["train_0.wav", "train_1", "train_2.wav", "train_3.wav"]
    rows = [(name, index % 2) for index, name in enumerate(names)]
    put_table(tmp_path / "train_master.tsv", [("file_name", "label_id"), *rows])
    put_table(tmp_path / "label_master.tsv", [("label_name", "label_id"), ("a", 0), ("b", 1)])
    put_table(tmp_path / "sample_submit.tsv", [("test_0.wav", 0)])
    train = load(tmp_path).train.set_index("file_name")
    found = {name: path.relative_to(tmp_path).as_posix() for name, path in train["path"].items()}
    assert found == {
        "train_0.wav": "train_sound_1/train_0",
        "train_1": "train_sound_1/train_1",
        "train_2.wav": "stems/train_2",
        "train_3.wav": "train_sound_1/train_3.wav",
    }
    assert train["clip"].tolist() == ["train_0", "train_1", "train_2", "train_3"]
    put_song(tmp_path / "other_place" / "train_0", seed=9)
    with pytest.raises(UserError, match=r"train_0\.wav is ambiguous"):
        load(tmp_path)


def test_without_sample_submit_a_song_to_train_on_is_not_predicted(tmp_path):
    """Its folder may be called testing, as it may hold all clips."""
    for seed, name in enumerate(("1", "2", "3")):
        put_song(tmp_path / "testing" / name, seed=seed)
    put_table(tmp_path / "train_master.tsv", [("file_name", "label_id"), ("1", 0), ("2", 1)])
    put_table(tmp_path / "label_master.tsv", [("label_name", "label_id"), ("a", 0), ("b", 1)])
    assert load(tmp_path).test["file_name"].tolist() == ["3"]


def test_a_song_whose_name_has_a_dot_is_not_one_without_what_follows_it(tmp_path):
    for name, seed in (("take", 0), ("take.1", 1), ("test_copy/take", 0), ("test_1", 2)):
        put_song(tmp_path / name, seed=seed)
    put_table(
        tmp_path / "train_master.tsv", [("file_name", "label_id"), ("take", 0), ("take.1", 1)]
    )
    put_table(tmp_path / "label_master.tsv", [("label_name", "label_id"), ("a", 0), ("b", 1)])
    competition = load(tmp_path)
    assert [path.name for path in competition.train["path"]] == ["take", "take.1"]
    assert competition.test["file_name"].tolist() == ["test_1"]


def test_the_mix_beside_a_song_is_no_clip_of_its_own(tmp_path, caplog):
    put_song(tmp_path / "rock" / "song")
    mixture = put_clip(tmp_path / "rock" / "song" / "mixture.wav")
    put_clip(tmp_path / "rock" / "song.wav")
    with caplog.at_level(logging.WARNING):
        assert find_clips(tmp_path) == [tmp_path / "rock" / "song"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{mixture} is left out: it lies beside the stems of a song"
    ]


def test_a_clip_that_is_named_as_a_stem_stays_a_clip_among_others(tmp_path):
    paths = [put_clip(tmp_path / "jazz" / name) for name in ("a.wav", "bass.wav")]
    assert find_clips(tmp_path) == paths


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        (("vocals", "drums", "other"), "has no bass; "),
        (("vocals", "drums"), "has no bass and no other; "),
        (("vocals",), "has no drums and no bass and no other; "),
        (("vocals", "drums", "mixture"), "has no bass and no other; "),
    ],
)
def test_a_song_without_all_stems_is_refused_in_one_line(tmp_path, present, missing):
    song = put_song(tmp_path / "rock" / "song", dict.fromkeys(present, stem_waves()[0]))
    with pytest.raises(UserError) as error:
        find_clips(tmp_path)
    assert str(error.value).startswith(f"{song} {missing}")
    assert "\n" not in str(error.value)


def test_a_stem_that_is_there_twice_is_refused(tmp_path):
    song = put_song(tmp_path / "rock" / "song")
    shutil.copy(song / "bass.wav", song / "Bass.flac")
    with pytest.raises(UserError, match=r"song has bass twice, Bass\.flac and bass\.wav; keep one"):
        find_clips(tmp_path)


def test_songs_of_one_name_get_the_hash_of_their_stems(tmp_path):
    songs = [put_song(tmp_path / genre / "song", seed=n) for n, genre in enumerate("ab")]
    names = clip_names(songs)
    assert all(name.startswith("song-") for name in names)
    assert len(set(names)) == 2
    copied = shutil.copytree(songs[0], tmp_path / "elsewhere" / "song")
    assert clip_names([copied, songs[1]]) == names


# Reading


def test_a_song_is_read_as_its_stems_and_as_their_sum(tmp_path):
    waves = stem_waves(seconds=25)
    song = put_song(tmp_path / "song", waves)
    blocks, rates = zip(*audio.read_stem_blocks(song), strict=True)
    assert set(rates) == {SR}
    assert len(blocks) > 1
    assert np.allclose(np.concatenate(blocks).T, waves, atol=1e-6)
    mix, rate = audio.decode(song)
    assert rate == SR
    assert np.allclose(mix, waves.sum(0, keepdims=True), atol=1e-6)
    assert audio.probe(song).seconds == 25


def test_stems_of_other_rates_channels_and_formats_are_aligned(tmp_path):
    song = tmp_path / "song"
    waves = stem_waves(seconds=12)
    others = librosa.resample(waves, orig_sr=SR, target_sr=44100)
    put_song(song, {"vocals": waves[0]})
    put_song(song, {"drums": np.stack([others[1], others[1]], axis=1)}, rate=44100)
    put_song(song, {"bass": others[2]}, rate=44100, suffix=".flac")
    put_song(song, {"other": waves[3]}, suffix=".au")
    assert list(stem_files(song)) == list(STEMS)
    joined = np.concatenate([block for block, _ in audio.read_stem_blocks(song)]).T
    assert joined.shape == waves.shape
    assert np.abs(joined - waves)[:, 500:-500].max() < 0.005


def test_a_silent_stem_is_allowed_and_a_silent_song_is_not(tmp_path):
    waves = stem_waves()
    waves[0] = 0
    song = put_song(tmp_path / "song", waves)
    assert np.allclose(audio.decode(song)[0], waves.sum(0), atol=1e-6)
    put_song(song, 0 * waves)
    with pytest.raises(UserError, match="song is silent"):
        audio.decode(song)


@pytest.mark.parametrize("missing", [0.04, 0.09])
def test_stems_that_are_little_shorter_are_filled_with_zeros(tmp_path, missing):
    waves = stem_waves(seconds=11)
    end = waves.shape[1] - round(missing * SR)
    song = put_song(
        tmp_path / "song", {**dict(zip(STEMS, waves, strict=True)), "drums": waves[1, :end]}
    )
    joined = np.concatenate([block for block, _ in audio.read_stem_blocks(song)]).T
    waves[1, end:] = 0
    assert np.allclose(joined, waves, atol=1e-6)


@pytest.mark.parametrize("stem", [0, 2])
def test_stems_of_unequal_length_are_refused_in_one_line(tmp_path, stem):
    waves = dict(zip(STEMS, stem_waves(seconds=3), strict=True))
    waves[STEMS[stem]] = waves[STEMS[stem]][: round(2.5 * SR)]
    song = put_song(tmp_path / "song", waves)
    lengths = ["3.00 s"] * 4
    lengths[stem] = "2.50 s"
    named = ", ".join(f"{name} {length}" for name, length in zip(STEMS, lengths, strict=True))
    with pytest.raises(UserError) as error:
        audio.decode(song)
    assert str(error.value) == f"the stems of {song} differ in length: {named}; cut or fill them"


# In the cache


@pytest.fixture
def fill_cache(small_settings, tmp_path):
    """Runs separate_missing on a table of clips and returns the cache; Demucs is not there."""

    def run(clips, *words):
        words = ["SEPARATION_MODEL=htdemucs", "SEPARATION_REPO=nowhere", *words]
        settings = small_settings(*words, f"SEPARATION_CACHE_DIR={tmp_path / 'cache'}")
        cache = open_cache(settings)
        with start_runtime(settings.machine) as runtime:
            separate_missing(clips, cache, settings, runtime)
        return cache

    return run


def table(*paths):
    return pd.DataFrame({"clip": clip_names(paths), "path": paths})


def test_a_songs_stems_are_cached_at_sr_without_demucs(fill_cache, tmp_path):
    waves = stem_waves(seconds=2)
    resampled = librosa.resample(waves, orig_sr=SR, target_sr=22050)
    songs = [put_song(tmp_path / "a", waves), put_song(tmp_path / "b", resampled, rate=22050)]
    cache = fill_cache(table(*songs))
    for song in songs:
        stems = cache.read(song.name, source=song).astype(np.float32)
        assert stems.shape == waves.shape
        assert np.abs(stems - waves)[:, 200:-200].max() < 0.005
        assert cache.is_current(song.name, song)
        assert cache.made_by(song.name) == "files"
        assert cache.read(song.name).any(), "as the report reads it"
    mixes = fill_cache(table(*songs), "CHANNELS=mix")
    mix = mixes.read("a", source=songs[0])
    assert np.abs(mix - waves.sum(0)).max() < 0.005


def test_a_song_is_cached_again_when_a_stem_has_changed(fill_cache, tmp_path):
    song = put_song(tmp_path / "song")
    cache = fill_cache(table(song), "SEPARATION_MODEL=mdx")
    cache = fill_cache(table(song))
    assert cache.is_current("song", song), "whatever the model for other clips is"
    put_song(song, {"bass": stem_waves(seed=3)[2]})
    assert not cache.is_current("song", song)
    with pytest.raises(ClipError, match="was not made from"):
        cache.read("song", source=song)
    fill_cache(table(song))
    assert np.allclose(cache.read("song", source=song)[2], stem_waves(seed=3)[2], atol=1e-3)
    (song / "bass.wav").unlink()
    with pytest.raises(ClipError, match="has no bass"):
        cache.is_current("song", song)


def test_a_separated_clip_is_not_taken_for_a_song_of_its_name(fill_cache, tmp_path):
    clip = put_clip(tmp_path / "a" / "song.wav")
    song = put_song(tmp_path / "b" / "song")
    cache = fill_cache(table(song))
    assert cache.is_current("song", song)
    assert not cache.is_current("song", clip)
    cache.write("song", stem_waves(), clip)
    assert not cache.is_current("song", song)


def test_a_bad_song_is_named_and_the_others_are_cached(fill_cache, tmp_path):
    waves = dict(zip(STEMS, stem_waves(), strict=True))
    short = put_song(tmp_path / "short", {**waves, "drums": waves["drums"][:5000]})
    broken = put_song(tmp_path / "broken")
    (broken / "other.wav").write_bytes(b"RIFF????")
    with pytest.raises(UserError, match="2 clips could not be separated") as error:
        fill_cache(table(short, put_song(tmp_path / "good"), broken))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert any("short differ in length: vocals 1.00 s, drums 0.45 s" in line for line in lines)
    assert any("broken/other.wav cannot be decoded" in line for line in lines)
    assert [path.name for path in (tmp_path / "cache").glob("*.npz")] == ["good.npz"]


# A whole run


@pytest.fixture(scope="module")
def data(tmp_path_factory, small_data):
    """The clips of small_data by genre, those of train as songs with their stems."""
    folder = tmp_path_factory.mktemp("songs") / "data"
    competition = load_competition(
        small_data, num_classes="auto", cache_dir=small_data / "separated"
    )
    for row in competition.train.itertuples():
        with np.load(small_data / "separated" / f"{row.clip}.npz") as entry:
            waves = {stem: entry[stem].astype(np.float32) for stem in STEMS}
        put_song(folder / competition.label_names[row.target] / row.clip, waves)
    for row in competition.test.itertuples():
        (folder / "test").mkdir(exist_ok=True)
        shutil.copy(row.path, folder / "test")
    return folder


def test_train_on_songs_and_separate_the_test_clips(data, fast_repo, tmp_path):
    words = [f"DATA_DIR={data}", f"OUTPUT_DIR={tmp_path}", f"SEPARATION_REPO={fast_repo}"]
    settings = load_settings([*SMALL_RUN, "SEPARATION_MODEL=htdemucs", "EPOCHS=1", *words])
    run_training(settings)
    assert len((tmp_path / "submit.csv").read_text().splitlines()) == 10
    made_by = pd.Series(
        {
            path.stem: json.loads(str(np.load(path)["meta"]))["model"]
            for path in (data / "separated").glob("*.npz")
        }
    )
    assert (made_by.filter(like="train") == "files").all()
    assert (made_by.filter(like="test") == "htdemucs").all()
    assert len(made_by) == 40


def test_two_processes_cache_songs_and_mixes_once(data, tmp_path):
    words = [*SMALL_RUN, f"DATA_DIR={data}", f"OUTPUT_DIR={tmp_path}", "CHANNELS=mix", "EPOCHS=1"]
    (code, output), (other_code, _) = [rank.wait() for rank in start_two(words)]
    assert code == other_code == 0, output
    assert "40 of 40 clips are to be decoded" in output
    assert len(list((data / "separated" / "mix").glob("*.npz"))) == 40
    assert len((tmp_path / "submit.csv").read_text().splitlines()) == 10
