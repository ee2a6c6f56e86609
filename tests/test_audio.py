"""Every sound file that libsndfile or ffmpeg knows becomes a float32 wave; a bad one is named."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from helpers import ROOT, give_up, tone, wait_until

from stemgenre.data import audio, ffmpeg
from stemgenre.errors import UserError

needs_ffmpeg = pytest.mark.usefixtures("ffmpeg")
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


@needs_ffmpeg
@pytest.mark.parametrize("name", ["x.m4a", "x.aac", "x.webm", "a:b.m4a"])
@pytest.mark.parametrize("channels", [1, 2])
def test_ffmpeg_decodes_what_libsndfile_cannot(tmp_path, monkeypatch, name, channels):
    monkeypatch.chdir(tmp_path)
    source = put_tone(tmp_path / "x.wav", sr=48000, channels=channels, subtype="PCM_16")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", source, f"file:{name}"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        give_up("this ffmpeg cannot write it")
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


@needs_ffmpeg
@pytest.mark.parametrize(
    ("suffix", "rate", "channels"),
    [
        *((suffix, *form) for suffix in (".wav", ".m4a") for form in ((8000, 1), (44100, 6))),
        *((suffix, 48000, 2) for suffix in (".wav", ".mp3", ".m4a")),
        (".mp3", 8000, 1),
    ],
)
def test_blocks_joined_are_the_whole_file(tmp_path, suffix, rate, channels):
    path = tmp_path / f"long{suffix}"
    noise = np.random.default_rng(0).normal(0, 0.1, (25 * rate, channels))
    if suffix == ".m4a":
        soundfile.write(tmp_path / "x.wav", noise, rate)
        command = ["ffmpeg", "-v", "error", "-i", tmp_path / "x.wav", "-c:a", "alac", path]
        subprocess.run(command, check=True)
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


NOISE = np.random.default_rng(0).normal(0, 0.1, 3 * 22050)
CUT = [  # suffix, subtype, format
    (".au", "PCM_16", "AU"), (".au", "FLOAT", "AU"), (".wav", "PCM_16", "WAV"),
    (".wav", "FLOAT", "WAV"), (".wav", "IMA_ADPCM", "WAV"), (".wav", "PCM_16", "RF64"),
    (".w64", "PCM_16", "W64"), (".w64", "FLOAT", "W64"),
    (".aiff", "PCM_16", "AIFF"), (".aiff", "FLOAT", "AIFF"), (".ogg", "VORBIS", "OGG"),
    (".mp3", "MPEG_LAYER_III", "MP3"), (".flac", "PCM_16", "FLAC"),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "subtype", "form"), CUT)
def test_a_truncated_file_is_refused_not_shortened(tmp_path, suffix, subtype, form):
    path = tmp_path / f"x{suffix}"
    soundfile.write(path, NOISE, 22050, subtype=subtype, format=form)
    whole = path.read_bytes()
    assert audio.decode(path)[0].shape[1] >= len(NOISE)
    for fraction in (0.1, 0.5, 0.95):
        path.write_bytes(whole[: int(fraction * len(whole))])
        with pytest.raises(UserError, match=rf"x\{suffix} (is truncated|cannot be decoded)"):
            audio.decode(path)
    path.write_bytes(whole + b"TAG" + bytes(125))  # as taggers append
    assert audio.decode(path)[0].shape[1] >= len(NOISE)


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", 22050), ("OPUS", 48000)])
def test_an_ogg_cut_between_two_pages_is_refused(tmp_path, subtype, rate):
    path = tmp_path / "x.ogg"
    soundfile.write(path, np.tile(NOISE, 4), rate, subtype=subtype, format="OGG")
    whole = path.read_bytes()
    pages = [found.start() for found in re.finditer(b"OggS", whole)]
    assert len(pages) > 4
    for start in pages[3:]:
        path.write_bytes(whole[:start])
        with pytest.raises(UserError, match=r"x\.ogg (is truncated|cannot be decoded)"):
            audio.decode(path)
    for damaged in (
        whole[: pages[3]] + whole[pages[3] + 9 :],  # a page without its beginning
        whole[: pages[3]] + whole[pages[4] :],
        whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.ogg is truncated"):
            audio.decode(path)


@pytest.mark.parametrize(
    ("form", "size"),
    [("WAV", 3 * 2**30), ("RF64", 5 * 2**30), ("W64", 5 * 2**30), ("AIFF", 3 * 2**30)],
)
def test_a_header_that_promises_gigabytes_is_compared_with_the_file(tmp_path, form, size):
    path = tmp_path / "x.wav"
    soundfile.write(path, NOISE, 22050, subtype="PCM_16", format=form)
    whole = bytearray(path.read_bytes())
    if form in ("RF64", "W64"):
        at = 28 if form == "RF64" else whole.index(b"data") + 16
        whole[at : at + 8] = size.to_bytes(8, "little")
    else:
        order, name = ("little", b"data") if form == "WAV" else ("big", b"SSND")
        at = whole.index(name) + 4
        whole[at : at + 4] = size.to_bytes(4, order)
    path.write_bytes(whole)
    with pytest.raises(
        UserError, match=rf"x\.wav is truncated: its header promises {size // 10**6}"
    ):
        audio.decode(path)


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_sizes_that_stand_for_an_unknown_one_are_read_to_the_files_end(tmp_path, size):
    path = tmp_path / "x.wav"
    soundfile.write(path, NOISE, 22050, subtype="PCM_16")
    whole = bytearray(path.read_bytes())
    whole[4:8] = whole[40:44] = size.to_bytes(4, "little")
    path.write_bytes(whole)
    assert audio.decode(path)[0].shape == (1, len(NOISE))


@pytest.mark.parametrize("name", ["x.au", "x.snd", "x.AU"])
def test_what_has_no_header_is_no_audio_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    for content in (bytes(range(256)) * 20, b"file_name,label_id\n" * 300):
        path.write_bytes(content)
        for function, said in (
            (audio.decode, "cannot be decoded"),
            (audio.probe, "cannot be read"),
        ):
            with pytest.raises(UserError, match=rf"{name} {said}"):
                function(path)


@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
@pytest.mark.parametrize("form", ["AU", "WAV"])
def test_both_byte_orders_are_compared_with_their_size(tmp_path, form, endian):
    path = tmp_path / "x"
    soundfile.write(path, NOISE, 22050, subtype="PCM_16", format=form, endian=endian)
    assert len(audio.decode(path)[0][0]) == len(NOISE)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match="x is truncated"):
        audio.decode(path)


@needs_ffmpeg
@pytest.mark.parametrize("form", ["wav", "au", "flac", "ogg"])
def test_a_file_of_unknown_size_is_read_whole_and_measured(tmp_path, form):
    """As a program writes it that streams into a pipe and cannot go back to the header."""
    soundfile.write(tmp_path / "x.wav", NOISE, 22050)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "x.wav", "-f", form, "-"]
    path = tmp_path / "piped"
    path.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert audio.decode(path)[0].shape[1] == pytest.approx(len(NOISE), rel=0.01)
    assert audio.probe(path).seconds == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("rate", [0, 1, 100, 2_000_000])
def test_a_rate_that_no_music_has_is_refused(tmp_path, rate):
    path = tmp_path / "x.wav"
    soundfile.write(path, NOISE, 22050)
    whole = bytearray(path.read_bytes())
    whole[24:28] = rate.to_bytes(4, "little")
    path.write_bytes(whole)
    for function in (audio.decode, audio.probe):
        with pytest.raises(UserError, match=r"x\.wav"):
            function(path)


def test_a_length_that_the_file_cannot_hold_is_refused_by_its_header(tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, NOISE, 22050)
    whole = bytearray(path.read_bytes())
    whole[21:26] = b"\xff" * 5
    path.write_bytes(whole)
    for function in (audio.decode, audio.probe):
        with pytest.raises(UserError, match=r"x\.flac"):
            function(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it is empty"), (b"a text, not a sound. " * 99, "it holds no sound that can be read")],
)
def test_without_ffmpeg_what_is_no_sound_is_called_so(tmp_path, monkeypatch, content, said):
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "text.mp3"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"text\.mp3 cannot be decoded: {said}"):
        audio.decode(path)


@needs_ffmpeg
def test_an_mp3_that_does_not_tell_its_length_is_read_to_its_end(tmp_path, monkeypatch):
    """Of a variable bit rate: libsndfile takes the quiet beginning's for that of all."""
    sr, rng = 22050, np.random.default_rng(0)
    wave = np.concatenate([np.zeros(sr), rng.normal(0, 0.2, 9 * sr)])
    soundfile.write(tmp_path / "a.wav", wave, sr)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-q:a", "4"]
    for name, xing in (("with.mp3", "1"), ("without.mp3", "0")):
        subprocess.run([*command, "-write_xing", xing, tmp_path / name], check=True)
        wave, _ = audio.decode(tmp_path / name)
        assert wave.shape[1] / sr == pytest.approx(10, abs=0.1), name
    monkeypatch.setenv("PATH", "")
    assert audio.decode(tmp_path / "with.mp3")[0].shape[1] / sr == pytest.approx(10, abs=0.1)
    with pytest.raises(UserError, match=r"without\.mp3 .* its length is unknown; install ffmpeg"):
        audio.decode(tmp_path / "without.mp3")


def test_the_beginning_of_a_file_can_be_decoded_alone(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "x.wav", NOISE, 22050)
    whole, rate = audio.decode(tmp_path / "x.wav")
    monkeypatch.setattr(audio, "BLOCK_SECONDS", 1)
    beginning, _ = audio.decode(tmp_path / "x.wav", seconds=1.5)
    assert np.array_equal(beginning, whole[:, : round(1.5 * rate)])
    assert audio.decode(tmp_path / "x.wav", seconds=9)[0].shape == whole.shape


def test_a_name_that_is_not_utf_8_is_read(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9\x93.wav"))
    soundfile.write(tmp_path / "x.wav", NOISE, 22050)
    (tmp_path / "x.wav").rename(path)
    assert audio.decode(path)[0].shape == (1, len(NOISE))
    assert audio.probe(path).seconds == 3


@needs_ffmpeg
@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{secret}\n",  # without an end: it is live
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{secret}'\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/x.aac\n",
    ],
)
def test_a_playlist_is_no_audio_and_opens_no_other_file(tmp_path, text):
    secret = tmp_path / "secret.ts"
    soundfile.write(tmp_path / "x.wav", NOISE, 22050)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "x.wav", "-f", "mpegts", secret]
    subprocess.run(command, check=True)
    path = tmp_path / "song.mp3"
    path.write_text(text.format(secret=secret))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"song\.mp3 cannot be decoded"):
        audio.decode(path)
    assert time.monotonic() - started < 5


@needs_ffmpeg
def test_what_ffmpeg_can_only_decode_in_part_is_refused(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.tile(NOISE, 3), 22050)
    path = tmp_path / "x.m4a"
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "x.wav", "-c:a", "alac", path]
    subprocess.run(command, check=True)
    whole = bytearray(path.read_bytes())
    assert audio.decode(path)[0].shape[1] >= 3 * len(NOISE)
    middle = len(whole) // 2
    whole[middle : middle + 30_000] = bytes(30_000)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"x\.m4a cannot be decoded"):
        audio.decode(path)


def fake_ffmpeg(folder, monkeypatch):
    """A decoder in the PATH that answers nothing, ever; it leaves its process id."""
    folder.mkdir()
    (folder / "ffmpeg").write_text(f"#!/bin/sh\necho $$ > {folder}/pid\nexec sleep 1000\n")
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "pid"


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_decoder_that_hangs_is_ended_and_the_file_named(tmp_path, monkeypatch):
    pid = fake_ffmpeg(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(ffmpeg, "FFMPEG_SECONDS", 0.5)
    (tmp_path / "x.m4a").write_bytes(b"no sound" * 100)
    with pytest.raises(UserError, match=r"x\.m4a cannot be decoded: ffmpeg gave nothing for"):
        audio.decode(tmp_path / "x.m4a")
    assert not is_alive(int(pid.read_text()))


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="what ends a child with its parent")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_decoder_ends_with_the_run(tmp_path, monkeypatch, number):
    pid = fake_ffmpeg(tmp_path / "bin", monkeypatch)
    (tmp_path / "x.m4a").write_bytes(b"no sound" * 100)
    code = "import sys\nfrom stemgenre.data import audio\naudio.decode(sys.argv[1])"
    run = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x.m4a"], cwd=ROOT)
    wait_until(lambda: pid.exists() and pid.read_text().strip())
    run.send_signal(number)
    run.wait()
    wait_until(lambda: not is_alive(int(pid.read_text())))


def test_running_out_of_memory_is_that_files_error(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    soundfile.write(path, NOISE, 22050)

    def read(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    with pytest.raises(UserError, match=r"x\.wav cannot be decoded: not enough memory"):
        audio.decode(path)
