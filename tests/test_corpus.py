"""Malformed files: each is refused in a line that names it, or read as what it is.

Others are where their readers are tested: tables in test_competition_errors.py, cache entries in
test_cache.py, audio in test_audio.py, checkpoints in test_checkpoint.py.
"""

import json
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT, put_audio, run_python, tone
from torchvision.models import efficientnet_b0, efficientnet_b3

from stemgenre.data import audio
from stemgenre.data.competition import load_competition
from stemgenre.errors import UserError
from stemgenre.files import sha256
from stemgenre.separation.cache import StemCache
from stemgenre.separation.demucs_model import Separator, load_demucs
from stemgenre.separation.separate import EndOfFile, separate_files
from stemgenre.settings import FeatureSettings, ModelSettings, SeparationSettings
from stemgenre.training import backbones, checkpoint
from stemgenre.training.backbones import imagenet_weights
from stemgenre.training.inference import load_models
from stemgenre.training.model import GenreNet, build_model

CPU = torch.device("cpu")
NOT_OPENED = "it holds more than weights and is not opened"


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
        wav(tone(seconds=0.5, peak=1e300), subtype="DOUBLE"), ["NaN or infinite"],
    ),
    "NaN at the end": (wav(spoilt(-1, np.nan)), ["NaN or infinite"]),
    "infinite at the start": (wav(spoilt(0, np.inf)), ["NaN or infinite"]),
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
def separator(fast_repo):
    options = SeparationSettings.from_config(separation_repo=str(fast_repo))
    return Separator(options, sample_rate=11025, device=CPU)


def separate(separator, path):
    """The stems of an audio file, (4, samples) float16."""
    *blocks, (_, end) = separate_files([(path, path)], separator, threads=1)
    assert end == EndOfFile("float32")
    return torch.cat([stems for _, stems in blocks], dim=1)


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
        stems = separate(separator, path)
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
    cache.write(clip, separate(separator, path).numpy(), path)
    assert cache.is_current(clip, path)
    assert cache.read(clip).any()


# Models: how an intact best_model.pth is changed


FEATURES = FeatureSettings.from_config(sr=11025, clip_seconds=2.0).model_dump()


def model_content():
    torch.manual_seed(0)
    return {
        "weights": GenreNet(2).state_dict(),
        "label_ids": [0, 7],
        "label_names": ["blues", "rock"],
        "features": FEATURES,
        "channel_stats": ([-40.0] * 4, [10.0] * 4),
    }


MODELS = {
    "no weights": {"weights": None},
    "weights of another shape": {"weights": {"classifier.4.bias": torch.zeros(2)}},
    "a list for weights": {"weights": [1, 2]},
    "a million genres": {"label_ids": list(range(10**6))},
    "no genres": {"label_ids": [], "label_names": []},
    "a name too many": {"label_names": ["blues", "rock", "jazz"]},
    "ids in a tensor": {"label_ids": torch.tensor([0, 7])},
    "names in a tensor": {"label_names": torch.tensor([0, 7])},
    "a separation model in a tensor": {"separation_model": torch.tensor([0, 7])},
    "huge images": {"features": FEATURES | {"img_size": 10**9}},
    "unknown features": {"features": FEATURES | {"colour": "blue"}},
    "features in a list": {"features": ["sr"]},
    "three channels": {"channel_stats": ([0.0] * 3, [1.0] * 3)},
    "a number beyond floats": {"channel_stats": ([10**400] * 4, [1.0] * 4)},
    "channels as text": {"channel_stats": "loud"},
    "no channels": {"channel_stats": None},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model(tmp_path, name):
    path = tmp_path / "best_model.pth"
    checkpoint.save(path, "model", model_content() | MODELS[name])
    refused(lambda: load_models(path, device=CPU), "best_model.pth does not hold a complete model")


def test_the_model_loads_before_it_is_changed(tmp_path):
    checkpoint.save(tmp_path / "best_model.pth", "model", model_content())
    (model,) = load_models(tmp_path / "best_model.pth", device=CPU)
    assert model.label_names == ["blues", "rock"]


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
    "text for tensors": lambda path: torch.save({"features.0.0.weight": "x"}, path),
    "an older pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a truncated pickle": lambda path: path.write_bytes(pickle.dumps({"a": [1] * 99})[:50]),
    "random opcodes": lambda path: path.write_bytes(
        b"\x80\x02" + np.random.default_rng(0).bytes(500)
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weights_file(tmp_path, name):
    path = tmp_path / "weights.pth"
    WEIGHTS[name](path)
    settings = ModelSettings.from_config(weights_file=str(path))
    refused(lambda: build_model(settings, num_classes=2, seed=0), "weights.pth")


def test_weights_that_are_nan_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    weights = backbones.torchvision_network("efficientnet_b3", 0.2).state_dict()
    weights["features.0.0.weight"][0, 0, 0, 0] = torch.nan
    torch.save(weights, path)
    settings = ModelSettings.from_config(weights_file=str(path))
    refused(lambda: build_model(settings, num_classes=2, seed=0), str(path), "NaN or infinite")


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_weights_file_does_not_run(tmp_path, as_zip):
    marker, path = tmp_path / "it ran", tmp_path / "weights.pth"
    torch.save({"x": Payload(marker)}, path, _use_new_zipfile_serialization=as_zip)
    settings = ModelSettings.from_config(weights_file=str(path))
    refused(lambda: build_model(settings, num_classes=2, seed=0), "weights.pth", NOT_OPENED)
    assert not marker.exists()


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_best_model_does_not_run(tmp_path, as_zip):
    marker, path = tmp_path / "it ran", tmp_path / "best_model.pth"
    content = {"format": checkpoint.FORMAT, "kind": "model", "label_ids": Payload(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    refused(lambda: load_models(path, device=CPU), "best_model.pth cannot be read", NOT_OPENED)
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


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_demucs_file_with_more_than_weights_is_not_opened(tmp_path, as_zip):
    marker, path = tmp_path / "it ran", tmp_path / "htdemucs.th"
    torch.save({"x": Payload(marker)}, path, _use_new_zipfile_serialization=as_zip)
    refused(lambda: load_demucs("htdemucs", str(tmp_path)), "htdemucs.th", NOT_OPENED)
    assert not marker.exists()


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        f"{ALIASES}models: *i\n",
        f"{ALIASES}models: ['0123abcd']\nweights: *i\n",
        f"{ALIASES}models: ['0123abcd']\nsegment: *i\n",
        "models: &m [*m]\n",
        "models: " + "[" * 5000 + "]" * 5000,
        "models: ['0123abcd']\nweights: [[1, 1]]\n",
        "models: ['0123abcd']\nweights: [[1, 1, 1, .nan]]\n",
        "models: ['0123abcd']\nsegment: -1\n",
        "models: ['0123abcd']\nsegment: long\n",
        "models: [1.5]\n",
        "models: [!!binary x]\n",
        "models: [2020-99-99]\n",
    ],
)
def test_a_yaml_of_another_form_is_refused_at_once(tiny_repo, tmp_path, text):
    (tmp_path / "0123abcd.safetensors").symlink_to(tiny_repo / "0123abcd.safetensors")
    (tmp_path / "htdemucs.yaml").write_text(text)
    started = time.monotonic()
    refused(lambda: load_demucs("htdemucs", str(tmp_path)), "htdemucs.yaml")
    assert time.monotonic() - started < 20


def test_weights_whose_hash_is_not_the_one_in_their_name_are_refused(tmp_path, full_backbone):
    path = tmp_path / "efficientnet_b3_rwightman-b3899882.pth"
    torch.save(efficientnet_b3().state_dict(), path)  # whole, but other weights
    settings = ModelSettings.from_config(weights_file=str(path))
    refused(lambda: build_model(settings, num_classes=2, seed=0), str(path), "SHA-256")
    named = tmp_path / f"mine-{sha256(path)[:8]}.pth"
    path.rename(named)
    settings = ModelSettings.from_config(weights_file=str(named))
    build_model(settings, num_classes=2, seed=0)


def test_damaged_weights_in_the_download_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "efficientnet_b3_rwightman-b3899882.pth"
    path.parent.mkdir()
    for content in (b"", b"<html>", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        refused(lambda: imagenet_weights("efficientnet_b3"), str(path), "SHA-256")


@pytest.mark.heavy
@pytest.mark.usefixtures("ffmpeg")
def test_files_damaged_at_random_are_refused_or_read_the_same():
    done = run_python(ROOT / "benchmarks" / "fuzz.py", "--files", 14, "--audio", 1, "--seed", 5)
    assert done.returncode == 0, done.stdout
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends["files"] == 14 + 10, "of fourteen kinds of models and ten of sound"
    assert ends["refused"] > ends["files"] / 2
