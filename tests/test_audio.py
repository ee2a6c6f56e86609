"""Every sound file that libsndfile or ffmpeg knows becomes a float32 wave; a bad one is named."""

import shutil
import subprocess
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from helpers import tone

from stemgenre.data import audio
from stemgenre.errors import UserError

LOSSLESS, LOSSY = 1e-3, 0.1  # how far a decoded peak may be off


def put_tone(path, *, sr, channels, subtype):
    """Half a second of 440 Hz at half of full scale; each channel a little softer."""
    wave = tone(seconds=0.5, sr=sr)[:, None] * 0.9 ** np.arange(channels)
    soundfile.write(path, wave, sr, subtype=subtype)
    return path


def loudest_frequency(wave, rate):
    return np.fft.rfftfreq(wave.shape[-1], 1 / rate)[np.abs(np.fft.rfft(wave)).argmax()]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("sr", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        (".au", "PCM_16", LOSSLESS),
        (".au", "ULAW", 0.02),
        (".au", "FLOAT", LOSSLESS),
        (".wav", "PCM_U8", 0.02),
        (".wav", "PCM_16", LOSSLESS),
        (".wav", "PCM_24", LOSSLESS),
        (".wav", "PCM_32", LOSSLESS),
        (".wav", "FLOAT", LOSSLESS),
        (".wav", "DOUBLE", LOSSLESS),
        (".aiff", "PCM_16", LOSSLESS),
        (".flac", "PCM_16", LOSSLESS),
        (".flac", "PCM_24", LOSSLESS),
        (".ogg", "VORBIS", LOSSY),
        (".mp3", "MPEG_LAYER_III", LOSSY),
    ],
)
def test_what_was_written_is_what_is_decoded(tmp_path, suffix, subtype, tolerance, sr, channels):
    path = put_tone(tmp_path / f"x{suffix}", sr=sr, channels=channels, subtype=subtype)
    wave, rate = audio.decode(path)
    assert wave.dtype == np.float32
    assert rate == sr
    assert wave.shape == (channels, sr // 2)
    for channel, samples in enumerate(wave):
        assert np.abs(samples).max() == pytest.approx(0.5 * 0.9**channel, abs=tolerance)
        assert loudest_frequency(samples, rate) == pytest.approx(440, abs=3)
    assert audio.probe(path).sample_rate == sr
    assert audio.probe(path).channels == channels
    assert audio.probe(path).seconds == pytest.approx(0.5, abs=1e-3)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
@pytest.mark.parametrize("name", ["x.m4a", "x.aac", "x.webm", "a:b.m4a"])
@pytest.mark.parametrize("channels", [1, 2])
def test_ffmpeg_decodes_what_libsndfile_cannot(tmp_path, monkeypatch, name, channels):
    monkeypatch.chdir(tmp_path)
    source = put_tone(tmp_path / "x.wav", sr=48000, channels=channels, subtype="PCM_16")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", source, f"file:{name}"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this ffmpeg cannot write it")
    wave, rate = audio.decode(Path(name))
    assert (wave.dtype, wave.shape[0], rate) == (np.float32, channels, 48000)
    assert wave.shape[1] / rate == pytest.approx(0.5, abs=0.06)
    assert np.abs(wave[0, 6000:-6000]).max() == pytest.approx(0.5, abs=LOSSY)
    assert loudest_frequency(wave[0], rate) == pytest.approx(440, abs=3)


def put_samples(path, samples):
    soundfile.write(path, np.asarray(samples, dtype=np.float32), 8000, subtype="FLOAT")


def put_header_only(path):
    put_samples(path, tone())
    path.write_bytes(path.read_bytes()[:44])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (put_header_only, "x.wav"),
        (lambda path: put_samples(path, []), "x.wav"),
        (lambda path: path.write_text("file_name\tlabel_id\n" * 50), "cannot be decoded"),
        (lambda path: path.write_bytes(bytes(range(256)) * 20), "cannot be decoded"),
        (lambda path: path.mkdir(), "cannot be decoded"),
        (lambda path: path.symlink_to("nowhere.wav"), "cannot be decoded"),
        (lambda path: None, "cannot be decoded"),
        (lambda path: put_samples(path, [0.1, np.nan, 0.1]), "NaN or infinite"),
        (lambda path: put_samples(path, [0.1, -np.inf, 0.1]), "NaN or infinite"),
        (lambda path: put_samples(path, np.zeros(4000)), "silent"),
    ],
    ids=["0 bytes", "header only", "no samples", "text", "junk", "folder", "dangling link",
         "missing", "NaN", "infinite", "silent"],
)  # fmt: skip
def test_a_bad_file_is_named_in_one_line(tmp_path, make, said):
    path = tmp_path / "x.wav"
    make(path)
    with pytest.raises(UserError) as caught:
        audio.decode(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"no sound at all"])
def test_a_file_without_a_header_cannot_be_probed(tmp_path, content):
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.wav cannot be read"):
        audio.probe(tmp_path / "x.wav")


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("from_rate", "to_rate"), [(8000, 44100), (44100, 22050), (48000, 44100), (22050, 22050)]
)
def test_resampling_keeps_duration_pitch_and_loudness(from_rate, to_rate, channels):
    wave = np.tile(tone(seconds=0.5, sr=from_rate), (channels, 1)).astype(np.float32)
    before = wave.copy()
    result = audio.resample(wave, from_rate=from_rate, to_rate=to_rate)
    assert np.array_equal(wave, before)
    assert result.dtype == np.float32
    assert result.shape == (channels, to_rate // 2)
    for samples in result:
        assert loudest_frequency(samples, to_rate) == pytest.approx(440, abs=3)
        assert np.abs(samples[500:-500]).max() == pytest.approx(0.5, abs=0.01)


def test_what_the_new_rate_cannot_hold_is_gone_instead_of_mirrored():
    wave = tone(frequency=9000, seconds=0.5, sr=44100)
    result = audio.resample(wave, from_rate=44100, to_rate=11025)
    assert np.abs(result[500:-500]).max() < 1e-3


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (48000, 2), (44100, 6)])
@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".m4a"])
def test_blocks_joined_are_the_whole_file(tmp_path, suffix, rate, channels):
    path = tmp_path / f"long{suffix}"
    noise = np.random.default_rng(0).normal(0, 0.1, (25 * rate, channels))
    if suffix == ".m4a" and shutil.which("ffmpeg"):
        soundfile.write(tmp_path / "x.wav", noise, rate)
        command = ["ffmpeg", "-v", "error", "-i", tmp_path / "x.wav", "-c:a", "alac", path]
        subprocess.run(command, check=True)
    elif suffix == ".m4a" or (suffix, channels) == (".mp3", 6):
        pytest.skip("this cannot be written")
    else:
        soundfile.write(path, noise, rate)
    blocks, rates = zip(*audio.read_blocks(path), strict=True)
    wave, _ = audio.decode(path)
    assert len(blocks) == 3
    assert set(rates) == {rate}
    assert np.array_equal(np.concatenate(blocks).T, wave)
    resampled = audio.resample_blocks(zip(blocks, rates, strict=True), to_rate=22050)
    whole = audio.resample(wave, from_rate=rate, to_rate=22050)
    assert whole.shape == (channels, 25 * 22050)
    assert np.array_equal(np.concatenate(list(resampled)).T, whole)


def test_resampling_is_as_librosas():
    wave = np.random.default_rng(0).normal(0, 0.1, (2, 9999)).astype(np.float32)
    for rate in (22050, 8000, 96000):
        expected = librosa.resample(wave, orig_sr=44100, target_sr=rate, res_type="soxr_hq")
        assert np.array_equal(audio.resample(wave, from_rate=44100, to_rate=rate), expected)


def test_a_file_cut_in_half_is_refused_not_shortened(tmp_path):
    path = tmp_path / "half.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 200000), 22050)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"half\.flac"):
        audio.decode(path)
