"""Cached stems become wav files that sum to the mix: all clips, or those named."""

import logging

import numpy as np
import pytest
import soundfile
from helpers import run_python, run_with_full_disk, tone

from export_separated_wav import export_wavs
from stemgenre.errors import UserError
from stemgenre.separation.cache import StemCache
from stemgenre.settings import STEMS

SR = 8000
LSB = 1 / 32768  # one step of 16-bit samples


def stems_of(*, peak):
    """Four stems of different pitch: (4, samples) float32, the loudest at `peak`."""
    peaks = peak * np.array([1, 0.5, 0.25, 0.1])
    return np.stack(
        [tone(frequency=200 + 100 * n, peak=p) for n, p in enumerate(peaks)]
    ).astype(np.float32)  # fmt: skip


@pytest.fixture
def cache(tmp_path):
    """A cache with two quiet clips and one that would clip."""
    source = tmp_path / "x.au"
    source.write_bytes(b"sound")
    cache = StemCache(tmp_path / "separated", model="htdemucs", sample_rate=SR)
    for clip, peak in {"train_2": 0.5, "train_10": 0.9, "loud": 2.0}.items():
        cache.write(clip, stems_of(peak=peak), source)
    return cache


def written(out):
    """Relative paths of all files below `out`."""
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def read(out, clip):
    """The clip's wavs: (4, samples)."""
    waves = []
    for stem in STEMS:
        wave, rate = soundfile.read(out / clip / f"{stem}.wav")
        assert rate == SR
        assert soundfile.info(out / clip / f"{stem}.wav").subtype == "PCM_16"
        waves.append(wave)
    return np.stack(waves)


def test_without_a_name_every_clip_is_written(cache, tmp_path):
    out = tmp_path / "wav"
    export_wavs(cache, [], stems=STEMS, out=out)
    assert written(out) == {
        f"{clip}/{stem}.wav" for clip in ("train_2", "train_10", "loud") for stem in STEMS
    }


@pytest.mark.parametrize(
    ("names", "stems", "expected"),
    [
        (["train_2"], STEMS, {f"train_2/{stem}.wav" for stem in STEMS}),
        (["train_2", "loud"], ["bass"], {"train_2/bass.wav", "loud/bass.wav"}),
        (["train_10"], ["other", "vocals"], {"train_10/other.wav", "train_10/vocals.wav"}),
        (["{folder}/train_10.npz"], ["drums"], {"train_10/drums.wav"}),
        (["train_10.au"], ["drums"], {"train_10/drums.wav"}),
    ],
)
def test_only_the_named_clips_and_stems_are_written(cache, tmp_path, names, stems, expected):
    out = tmp_path / "deep" / "wav"
    names = [name.format(folder=cache.folder) for name in names]
    export_wavs(cache, names, stems=stems, out=out)
    assert written(out) == expected


def test_a_name_with_a_dot_is_not_that_of_another_clip(cache, tmp_path):
    with pytest.raises(UserError, match=r"train_10\.v2\.npz does not exist"):
        export_wavs(cache, ["train_10.v2"], stems=STEMS, out=tmp_path / "wav")


def test_each_wav_holds_its_own_stem_at_its_own_level(cache, tmp_path):
    export_wavs(cache, ["train_2"], stems=STEMS, out=tmp_path)
    assert np.allclose(read(tmp_path, "train_2"), stems_of(peak=0.5), atol=2 * LSB)


def test_stems_that_would_clip_are_attenuated_equally(cache, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        export_wavs(cache, [], stems=STEMS, out=tmp_path)
    stems, waves = stems_of(peak=2.0), read(tmp_path, "loud")
    gain = np.abs(waves).max() / np.abs(stems).max()
    assert np.abs(waves).max() == pytest.approx(1, abs=1e-3)
    assert np.allclose(waves, gain * stems, atol=0.001)
    assert np.allclose(waves.sum(axis=0), gain * stems.sum(axis=0), atol=0.002)
    (line,) = [line for line in caplog.messages if "attenuated equally" in line]
    assert "loud by 6.0 dB" in line


def test_a_damaged_entry_is_named_and_the_others_are_written(cache, tmp_path):
    cache.path("train_2").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"train_2\.npz cannot be read"):
        export_wavs(cache, [], stems=["bass"], out=tmp_path / "wav")
    assert written(tmp_path / "wav") == {"loud/bass.wav", "train_10/bass.wav"}


def test_a_clip_that_is_named_twice_is_one_clip(cache, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        export_wavs(cache, ["train_2", "train_2"], stems=["bass"], out=tmp_path / "wav")
    assert "1 clips written" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["DATA_DIR={tmp}", "--out", "{tmp}/wav"], "choose another folder"),
        (["DATA_DIR={tmp}/gone"], "there is no data folder"),
    ],
)
def test_what_would_become_clips_or_finds_none_is_refused(tmp_path, words, said):
    words = [word.format(tmp=tmp_path) for word in words]
    done = run_python("export_separated_wav.py", *words)
    assert done.returncode == 2 and said in done.stderr


def test_an_empty_cache_says_how_to_fill_it(tmp_path):
    cache = StemCache(tmp_path / "none", model="htdemucs", sample_rate=SR)
    with pytest.raises(UserError, match=r"train\.py"):
        export_wavs(cache, [], stems=STEMS, out=tmp_path)


def test_a_full_disk_is_named_and_leaves_no_partial_wav(cache, tmp_path):
    cache.write("long", np.tile(stems_of(peak=0.5), 30), tmp_path / "x.au")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from stemgenre.separation.cache import StemCache\n"
        "from export_separated_wav import export_wavs\n"
        "cache = StemCache(sys.argv[1], model='htdemucs', sample_rate=8000)\n"
        "export_wavs(cache, ['long'], stems=['bass'], out=Path(sys.argv[2]))\n"
    )
    done = run_with_full_disk(code, cache.folder, tmp_path / "wav", limit=10_000)
    assert "UserError" in done.stderr
    assert "bass.wav cannot be written" in done.stderr
    assert written(tmp_path / "wav") == set()


def test_the_script_writes_what_it_is_told_and_names_a_missing_clip(cache, tmp_path):
    script = ["export_separated_wav.py", f"SEPARATION_CACHE_DIR={cache.folder}", f"SR={SR}"]
    out = tmp_path / "wav"
    done = run_python(*script, "train_2", "--stems", "bass", "drums", "--out", out)
    assert done.returncode == 0
    assert written(out) == {"train_2/bass.wav", "train_2/drums.wav"}
    done = run_python(*script, "--out", out, "--stems", "vocals", "loud")
    assert done.returncode == 0, done.stderr
    assert written(out) == {"train_2/bass.wav", "train_2/drums.wav", "loud/vocals.wav"}
    done = run_python(*script, "--stems", "voice")
    assert done.returncode == 2 and "--stems voice is unknown" in done.stderr
    done = run_python(*script, "train_3", "--out", out)
    assert done.returncode == 2
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert line.startswith("error: ")
    assert "train_3.npz does not exist" in line


def test_an_export_never_leaves_its_folder(cache, tmp_path):
    (cache.folder / "...npz").write_bytes(cache.path("train_2").read_bytes())
    (tmp_path / "wav").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine.wav").write_bytes(b"mine")
    (tmp_path / "wav" / "train_2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "wav" / "train_10").mkdir()
    (tmp_path / "wav" / "train_10" / "bass.wav").symlink_to(tmp_path / "mine.wav")
    with pytest.raises(UserError) as caught:
        export_wavs(cache, [], stems=["bass"], out=tmp_path / "wav")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all("outside" in line for line in lines)
    assert (tmp_path / "wav" / "loud" / "bass.wav").is_file()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "mine.wav").read_bytes() == b"mine"
    assert not (tmp_path / "bass.wav").exists()


def test_entries_of_one_name_do_not_replace_each_other(cache, tmp_path):
    other = tmp_path / "other" / "train_2.npz"
    other.parent.mkdir()
    other.write_bytes(cache.path("loud").read_bytes())
    with pytest.raises(UserError, match=r"other/train_2\.npz has the name of another"):
        export_wavs(cache, ["train_2", str(other)], stems=["bass"], out=tmp_path / "wav")
    wave, _ = soundfile.read(tmp_path / "wav" / "train_2" / "bass.wav")
    assert np.abs(wave).max() < 0.5


def test_without_stems_channels_mix_says_why_there_are_none(cache, tmp_path):
    out = tmp_path.with_name(f"{tmp_path.name}_wav")
    words = [f"DATA_DIR={tmp_path}", "CHANNELS=mix", "--out", out]
    done = run_python("export_separated_wav.py", *words, f"SEPARATION_CACHE_DIR={tmp_path}/empty")
    assert done.returncode == 2
    (line,) = [
        line for line in done.stderr.splitlines() if "CHANNELS=mix separates nothing" in line
    ]
    assert "CHANNELS=vocals,drums,bass,other" in line
    done = run_python("export_separated_wav.py", *words)
    assert done.returncode == 0, done.stderr
    assert len(written(out)) == 12
