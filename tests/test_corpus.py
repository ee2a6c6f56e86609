"""Malformed files, made by code: each is refused in a line that names it, or read as what it is.

More of them are where their readers are tested: test_metadata_errors.py, test_audio.py,
test_cache.py, test_checkpoint.py, test_separation.py; the knobs' bounds in test_settings.py.
"""

import gzip
import io
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from helpers import put_audio, put_table, tone
from torchvision.models import efficientnet_b0

from stemgenre import audio, checkpoint
from stemgenre.cache import STEMS, StemCache
from stemgenre.errors import UserError
from stemgenre.inference import load_best
from stemgenre.metadata import load_competition
from stemgenre.model import GenreNet, build_model
from stemgenre.separation import Separator, load_demucs
from stemgenre.settings import ModelSettings, SeparationSettings

CPU = torch.device("cpu")
HEADER = "file_name\tlabel_id\n"
TRAIN = HEADER + "train_0.wav\t0\ntrain_1.wav\t7\n"
LABELS = "label_name\tlabel_id\nblues\t0\nrock\t7\n"


def refused(action, *words):
    """The action raises a UserError with these words, soon and in few lines."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert len(message) < 2000
    for word in words:
        assert word in message
    assert time.monotonic() - started < 60


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# Tables: (file, content, words of the refusal; none if it is read as the faultless one is)


def rows(*lines):
    return TRAIN + "".join(f"{line}\n" for line in lines)


def workbook():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return data.getvalue()


TABLES = {
    "UTF-16 with a mark": ("train_master", TRAIN.encode("utf-16"), []),
    "UTF-16 without a mark": ("train_master", TRAIN.encode("utf-16-le"), ["not a text file"]),
    "UTF-32": ("train_master", TRAIN.encode("utf-32"), ["not a text file"]),
    "UTF-8 cut inside a letter": ("train_master", TRAIN.encode() + b"\xe3\x83", ["train_master"]),
    "line ends of an old Mac": ("train_master", TRAIN.replace("\n", "\r"), []),
    "no line end at the end": ("train_master", TRAIN.rstrip(), []),
    "empty lines between": ("train_master", TRAIN.replace("\n", "\n\n\n"), []),
    "everything quoted": (
        "train_master", '"file_name","label_id"\n"train_0.wav","0"\n"train_1.wav","7"\n', [],
    ),
    "capitals and spaces in the header": (
        "train_master", TRAIN.replace("file_name", " File_Name "), [],
    ),
    "separated by bars": ("train_master", TRAIN.replace("\t", "|"), ["one column file_name"]),
    "separated by spaces": ("train_master", TRAIN.replace("\t", " "), ["one column file_name"]),
    "header by commas, rows by tabs": (
        "train_master", TRAIN.replace("\t", ",", 1), ["train_master.tsv"],
    ),
    "the header twice": ("train_master", rows(HEADER.strip()), ["'label_id' is not a whole"]),
    "ids as floats": ("train_master", TRAIN.replace("7", "7.0"), []),
    "ids as powers": ("train_master", TRAIN.replace("\t7", "\t7e0"), []),
    "ids with spaces": ("train_master", TRAIN.replace("7", " 7 "), []),
    "an id with a decimal comma": ("train_master", rows("x.wav\t7,5"), ["'7,5'", "row 4"]),
    "an id in hexadecimal": ("train_master", rows("x.wav\t0x7"), ["'0x7'", "row 4"]),
    "an id that is true": ("train_master", rows("x.wav\tTrue"), ["'True'", "row 4"]),
    "an id beyond 64 bits": ("train_master", rows(f"x.wav\t{10**30}"), ["row 4"]),
    "an id of minus infinity": ("train_master", rows("x.wav\t-inf"), ["row 4"]),
    "a date as id": ("train_master", rows("x.wav\t2024-01-07"), ["row 4"]),
    "a row of 100 000 cells": ("train_master", rows("x.wav" + "\t" * 100_000), ["row 4"]),
    "a quoted cell that never ends": (
        "train_master", rows('"' + "x.wav\t0\n" * 50_000), ["train_master"],
    ),
    "a million rows": (
        "train_master", rows(*(f"x_{n}.wav\t0" for n in range(10**6))),
        ["1000000 clips", "x_0.wav, x_1.wav, x_2.wav, x_3.wav, x_4.wav, ..."],
    ),
    "one row a hundred thousand times": ("train_master", TRAIN + "train_0.wav\t0\n" * 10**5, []),
    "a network path": ("train_master", rows("\\\\host\\music\\x.wav\t0"), ["below the data"]),
    "an address": ("train_master", rows("file:///etc/hosts.wav\t0"), ["no audio", "hosts.wav"]),
    "a home folder": ("train_master", rows("~/x.wav\t0"), ["no audio", "~/x.wav"]),
    "up and down again": ("train_master", rows("a/../train_0.wav\t0"), ["below the data folder"]),
    "only slashes": ("train_master", rows("///\t0"), ["below the data folder"]),
    "a byte of zero in a name": ("train_master", rows("x\0.wav\t0"), ["not a text file"]),
    "a name in other letters' case": ("train_master", rows("TRAIN_0.WAV\t0"), ["no audio"]),
    "a folder instead of a clip": ("train_master", rows("train_sound\t0"), ["no audio"]),
    "a dot in the path": (
        "train_master", TRAIN.replace("train_0", "./train_sound/./train_0"), [],
    ),
    "two slashes in the path": (
        "train_master", TRAIN.replace("train_0", "train_sound//train_0"), [],
    ),
    "packed": ("train_master", gzip.compress(TRAIN.encode()), ["not a text file"]),
    "a workbook": ("train_master", workbook(), ["train_master.tsv"]),
    "a web page": (
        "train_master", "<!DOCTYPE html><html><body>Log in</body></html>", ["one column file_name"],
    ),
    "json": ("train_master", '[{"file_name": "train_0.wav", "label_id": 0}]', ["one column"]),
    "a genre without a name": ("label_master", LABELS + "  \t9\n", ["row 4"]),
    "a genre that no clip has": ("label_master", LABELS + "jazz\t9\n", []),
    "an id as text": ("label_master", LABELS + "jazz\tnine\n", ["'nine'", "label_master"]),
    "a submission of pictures": ("sample_submit", "test_0.png\t0\n", ["no column of audio"]),
    "a submission with rows of two lengths": ("sample_submit", "test_0.wav\t0\nx.wav\n", ["row 1"]),
    "a header alone": ("sample_submit", HEADER, ["no column of audio file names"]),
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """A competition without a fault."""
    put_audio(*(tmp_path / f"train_sound/train_{n}.wav" for n in range(2)))
    put_audio(tmp_path / "test_sound/test_0.wav")
    (tmp_path / "train_master.tsv").write_text(TRAIN)
    (tmp_path / "label_master.tsv").write_text(LABELS)
    put_table(tmp_path / "sample_submit.tsv", [("test_0.wav", 0)])
    return tmp_path


@pytest.mark.parametrize("name", TABLES)
def test_a_table(data, name):
    master, content, words = TABLES[name]
    content = content if isinstance(content, bytes) else content.encode()
    (data / f"{master}.tsv").write_bytes(content)

    def load():
        return load_competition(data, num_classes="auto", cache_dir=data / "separated")

    if words:
        refused(load, *words)
    else:
        found = load()
        clips = zip(found.train["path"], found.train["target"], strict=True)
        labels = {path.name: found.label_ids[target] for path, target in clips}
        assert labels == {"train_0.wav": 0, "train_1.wav": 7}


# Audio: (how the file is made, words of the refusal; none if stems can be made of it)


def wav(samples, *, sr=8000, subtype="FLOAT", form="WAV"):
    """A function that writes samples to a path."""
    return lambda path: soundfile.write(path, samples, sr, subtype=subtype, format=form)


def patched(offset, data, **options):
    """A function that writes half a second of sound and then `data` over it."""

    def put(path):
        wav(tone(seconds=0.5), **({"subtype": "PCM_16"} | options))(path)
        whole = bytearray(path.read_bytes())
        whole[offset : offset + len(data)] = data
        path.write_bytes(whole)

    return put


def long_flac_claim(path):
    """A flac of half a second whose header claims 2^36 - 1 samples."""
    patched(21, b"\xff" * 5, form="FLAC")(path)
    data = bytearray(path.read_bytes())
    data[21] = 0xFF
    path.write_bytes(data)


def spoilt(position, value):
    samples = tone(seconds=0.5)
    samples[position] = value
    return samples


def loop(path):
    path.symlink_to(path.name)


NOISE = np.random.default_rng(0).normal(0, 0.1, (4000, 1))
AUDIO = {
    "192 kHz": (wav(tone(seconds=0.5, sr=192000), sr=192000), []),
    "eight channels": (wav(np.tile(NOISE, 8)), []),
    "three channels, the first silent": (wav(NOISE * [0, 1, 1]), []),
    "float64": (wav(tone(seconds=0.5), subtype="DOUBLE"), []),
    "8-bit": (wav(tone(seconds=0.5), subtype="PCM_U8"), []),
    "A-law": (wav(tone(seconds=0.5), subtype="ALAW"), []),
    "4-bit ADPCM": (wav(tone(seconds=0.5), subtype="IMA_ADPCM"), []),
    "a hundredth of a second": (wav(tone(seconds=0.01)), []),
    "direct current": (wav(np.full(4000, 0.5)), []),
    "60 dB too loud": (wav(tone(seconds=0.5, peak=1000)), []),
    "16-bit numbers as floats": (wav(tone(seconds=0.5, peak=32767)), []),
    "almost silent": (wav(tone(seconds=0.5, peak=1e-6)), []),
    "denormal": (wav(tone(seconds=0.5, peak=1e-39)), []),
    "one click": (wav(np.eye(1, 4000, 100)[0]), []),
    "flac called wav": (wav(tone(seconds=0.5), subtype="PCM_16", form="FLAC"), []),
    "length not known, as streams have": (patched(8, b"\xff" * 4, form="AU"), []),
    "one sample": (wav([0.5]), ["too short: 1 samples at 8000 Hz"]),
    "a millisecond": (wav(tone(seconds=0.001)), ["too short"]),
    "louder than stems can be": (wav(tone(seconds=0.5, peak=1e6)), ["1e+06 times full scale"]),
    "beyond 32-bit floats": (
        wav(tone(seconds=0.5, peak=1e300), subtype="DOUBLE"), ["no numbers"],
    ),
    "NaN at the end": (wav(spoilt(-1, np.nan)), ["no numbers"]),
    "infinite at the start": (wav(spoilt(0, np.inf)), ["no numbers"]),
    "silent in every channel": (wav(np.zeros((4000, 8))), ["silent"]),
    "text called mp3": (lambda path: path.write_text("ID3" * 999), ["clip.wav"]),
    "a picture": (
        lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(999)), ["cannot be decoded"],
    ),
    "a header that claims 2^36 samples": (long_flac_claim, ["clip.wav"]),
    "a rate of 0": (patched(24, bytes(4)), ["clip.wav"]),
    "0 channels": (patched(22, bytes(2)), ["clip.wav"]),
    "65535 channels": (patched(22, b"\xff\xff"), ["clip.wav"]),
    "an unknown codec": (patched(20, b"\x99\x99"), ["clip.wav"]),
    "a link to itself": (loop, ["no such file"]),
    "a pipe": (os.mkfifo, ["no such file"]),
}  # fmt: skip


@pytest.fixture(scope="session")
def separator(tiny_repo):
    options = SeparationSettings(separation_repo=str(tiny_repo))
    return Separator(options, sample_rate=11025, device=CPU)


@pytest.fixture
def cache(tmp_path):
    return StemCache(tmp_path / "separated", model="htdemucs", sample_rate=11025)


@pytest.mark.parametrize("name", AUDIO)
def test_an_audio_file(tmp_path, separator, cache, name):
    put, words = AUDIO[name]
    path = tmp_path / "clip.wav"
    put(path)
    if words:
        refused(lambda: audio.decode(path), *words)
    else:
        (stems,) = separator([separator.load(path)])
        cache.write("clip", stems.numpy(), path)
        assert cache.read("clip").shape == (4, stems.shape[1])
        assert stems.shape[1] / 11025 == pytest.approx(audio.probe(path).seconds, abs=1e-3)


def test_two_hours_are_decoded_whole(tmp_path):
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 4000, 1, "PCM_16") as file:
        for _ in range(120):
            file.write(tone(seconds=60, sr=4000))
    wave, rate = audio.decode(path)
    assert wave.shape == (1, 2 * 3600 * rate)


NAMES = ["曲 1.wav", 'it\'s "it".wav', "-rf.wav", "%s{0}.wav", "a\nb.wav", "; rm x.wav", "🎸.wav"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name(tmp_path, separator, cache, name):
    put_audio(tmp_path / "blues" / name, tmp_path / "rock" / "x.wav", tmp_path / "rock" / "y.wav")
    (tmp_path / "rock" / "folder.wav").mkdir()
    found = load_competition(tmp_path, num_classes="auto", cache_dir=cache.folder).train
    assert [path.name for path in found["path"]] == [name, "x.wav", "y.wav"]
    clip, path = found["clip"][0], found["path"][0]
    cache.write(clip, separator([separator.load(path)])[0].numpy(), path)
    assert cache.is_current(clip, path)
    assert cache.read(clip).any()


# Entries of the cache: how the file is made


def npy(array):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def put_entry(path, *, method=zipfile.ZIP_STORED, names=STEMS, **members):
    good = {stem: npy(np.linspace(-1, 1, 300, dtype="f2")) for stem in names}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in (good | members).items():
            archive.writestr(f"{name}.npy", content)


def claim(path):
    """An entry whose directory claims members of 2 GB."""
    put_entry(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + 20 : start + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    path.write_bytes(data)


def encrypted(path):
    put_entry(path)
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    path.write_bytes(data)


PAIRS = np.zeros(300, dtype=[("left", "f2"), ("right", "f2")])
ENTRIES = {
    "0 bytes": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "a picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(999)),
    "an archive of nothing": lambda path: put_entry(path, names=()),
    "without the drums": lambda path: put_entry(path, names=("vocals", "bass", "other")),
    "in a folder of the archive": lambda path: put_entry(
        path, names=[f"stems/{stem}" for stem in STEMS]
    ),
    "one stem longer": lambda path: put_entry(path, bass=npy(np.zeros(301, "f2"))),
    "stereo": lambda path: put_entry(path, bass=npy(np.zeros((2, 150), "f2"))),
    "one number": lambda path: put_entry(path, bass=npy(np.array(0.5, "f2"))),
    "complex": lambda path: put_entry(path, bass=npy(np.zeros(300, "c8"))),
    "booleans": lambda path: put_entry(path, bass=npy(np.zeros(300, bool))),
    "pairs": lambda path: put_entry(path, bass=npy(PAIRS)),
    "objects": lambda path: put_entry(path, bass=npy(np.array([None] * 300))),
    "infinite": lambda path: put_entry(path, bass=npy(np.full(300, np.inf, "f2"))),
    "deep json": lambda path: put_entry(path, meta=npy(np.array("[" * 10**5))),
    "encrypted": encrypted,
    "members that claim 2 GB": claim,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_cache_entry(tmp_path, cache, name):
    path, source = cache.path("clip"), tmp_path / "clip.wav"
    source.write_bytes(b"x")
    cache.folder.mkdir()
    ENTRIES[name](path)
    refused(lambda: cache.read("clip"), "clip.npz")
    assert cache.is_current("clip", source) is False, "it is made anew"


@pytest.mark.parametrize("kind", [">f2", "<f4", ">f8"])
def test_stems_of_any_float_are_read(tmp_path, cache, kind):
    cache.folder.mkdir()
    stems = {stem: npy(np.linspace(-1, 1, 300, dtype=kind)) for stem in STEMS}
    put_entry(cache.path("clip"), method=zipfile.ZIP_DEFLATED, **stems)
    assert np.allclose(cache.read("clip"), np.linspace(-1, 1, 300), atol=1e-3)


# Models: how a good best_model.pth is spoilt


def model_content():
    torch.manual_seed(0)
    return {
        "weights": GenreNet(2).state_dict(),
        "label_ids": [0, 7],
        "label_names": ["blues", "rock"],
        "features": {"sr": 11025, "clip_seconds": 2.0, "n_fft": 1024, "hop_length": 256},
        "channels": ([-40.0] * 4, [10.0] * 4),
    }


MODELS = {
    "no weights": {"weights": None},
    "weights of another shape": {"weights": {"classifier.4.bias": torch.zeros(2)}},
    "a list for weights": {"weights": [1, 2]},
    "genres without end": {"label_ids": list(range(10**6))},
    "no genres": {"label_ids": [], "label_names": []},
    "a name too many": {"label_names": ["blues", "rock", "jazz"]},
    "pictures a mile wide": {"features": {"img_size": 10**9}},
    "features that are none": {"features": {"colour": "blue"}},
    "features in a list": {"features": ["sr"]},
    "three channels": {"channels": ([0.0] * 3, [1.0] * 3)},
    "channels in words": {"channels": "loud"},
    "no channels": {"channels": None},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model(tmp_path, name):
    path = tmp_path / "best_model.pth"
    checkpoint.save(path, "model", model_content() | MODELS[name])
    refused(lambda: load_best(path, CPU), "best_model.pth does not hold a whole model")


def test_the_model_is_faultless_until_it_is_spoilt(tmp_path):
    checkpoint.save(tmp_path / "best_model.pth", "model", model_content())
    assert load_best(tmp_path / "best_model.pth", CPU).label_names == ["blues", "rock"]


def test_a_checkpoint_that_claims_more_than_it_holds_is_refused_at_once(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, "checkpoint", {"weights": torch.zeros(10**7)})
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "x", "w", 8) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    (tmp_path / "x").replace(path)
    refused(lambda: checkpoint.load(path, "checkpoint"), "it claims to hold 40")


# ImageNet weights: how the file is made


WEIGHTS = {
    "0 bytes": lambda path: path.write_bytes(b""),
    "a folder": lambda path: path.mkdir(),
    "a web page": lambda path: path.write_text("<html>not found</html>"),
    "an empty archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "of another network": lambda path: torch.save(efficientnet_b0().state_dict(), path),
    "a list": lambda path: torch.save([torch.zeros(3)], path),
    "a number": lambda path: torch.save(7, path),
    "words for tensors": lambda path: torch.save({"features.0.0.weight": "x"}, path),
    "an older pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a torn pickle": lambda path: path.write_bytes(pickle.dumps({"a": [1] * 99})[:50]),
    "opcodes at random": lambda path: path.write_bytes(
        b"\x80\x02" + np.random.default_rng(0).bytes(500)
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weights_file(tmp_path, name):
    path = tmp_path / "weights.pth"
    WEIGHTS[name](path)
    settings = ModelSettings(weights_file=str(path))
    refused(lambda: build_model(settings, num_classes=2, seed=0), "weights.pth")


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_weights_file_does_not_run(tmp_path, as_zip):
    marker, path = tmp_path / "it ran", tmp_path / "weights.pth"
    torch.save({"x": Payload(marker)}, path, _use_new_zipfile_serialization=as_zip)
    settings = ModelSettings(weights_file=str(path))
    refused(lambda: build_model(settings, num_classes=2, seed=0), "weights.pth")
    assert not marker.exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_best_model_does_not_run(tmp_path, as_zip):
    marker, path = tmp_path / "it ran", tmp_path / "best_model.pth"
    content = {"format": checkpoint.FORMAT, "kind": "model", "label_ids": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    refused(lambda: load_best(path, CPU), "best_model.pth cannot be read")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["htdemucs.yaml", "htdemucs.safetensors", "htdemucs.th"])
def test_code_in_a_demucs_repository_does_not_run(tmp_path, name):
    marker = tmp_path / "it ran"
    tag = f"!!python/object/apply:os.mkdir ['{marker}']"
    contents = {
        "htdemucs.yaml": f"models: {tag}\n".encode(),
        "htdemucs.safetensors": pickle.dumps(Payload(marker)),
        "htdemucs.th": pickle.dumps({"klass": Payload(marker)}),
    }
    (tmp_path / name).write_bytes(contents[name])
    refused(lambda: load_demucs("htdemucs", str(tmp_path)), name)
    assert not marker.exists()


def test_the_corpus_is_as_large_as_it_is_said_to_be():
    assert len(TABLES) + len(AUDIO) + len(NAMES) + len(ENTRIES) + len(MODELS) + len(WEIGHTS) >= 120
