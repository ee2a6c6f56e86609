"""Stems: the same for the same file, however batched; bad clips and repositories are named."""

import json
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import TINY
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from demucs.states import save_with_checksum
from safetensors.torch import load_file, save_file

from stemgenre import runtime
from stemgenre.band import render
from stemgenre.cache import STEMS, StemCache
from stemgenre.errors import UserError
from stemgenre.separation import Separator, load_demucs
from stemgenre.settings import MachineSettings, SeparationSettings
from stemgenre.stems import separate_fitting, separate_missing

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def separator(tiny_repo):
    return make_separator(tiny_repo)


def make_separator(repo, **changes):
    options = SeparationSettings(separation_repo=str(repo), **changes)
    return Separator(options, sample_rate=22050, device=CPU)


def noise(seconds, channels=2, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0, 0.1, (channels, int(seconds * 44100))).astype("f4"))


def test_stems_are_named_right_mono_and_of_the_clips_length(separator, tiny_model):
    wave = noise(5)
    (stems,) = separator([wave])
    assert stems.shape == (4, 5 * 22050)
    assert stems.dtype == torch.float32


def test_stems_equal_demucs_own_separation_brought_down_to_sr(separator, tiny_model):
    wave = torch.from_numpy(
        np.ascontiguousarray(render("pop", seed=1, seconds=4, sr=44100)[[1, 3]])
    )
    wave = wave[:, : 2 * int(0.79 * 88200)]  # whole windows: nothing is filled up
    reference = wave.mean(0)
    mixture = (wave - reference.mean()) / (reference.std() + 1e-8)
    plain = apply_model(tiny_model, mixture[None], shifts=0, overlap=0.21)[0] * reference.std()
    order = [tiny_model.sources.index(stem) for stem in STEMS]
    plain = librosa.resample(plain.mean(1)[order].numpy(), orig_sr=44100, target_sr=22050)
    (stems,) = separator([wave])
    assert stems.shape == plain.shape
    inner = slice(1000, -1000)  # the two resamplers differ at the ends
    error = (stems.numpy() - plain)[:, inner].std() / plain[:, inner].std()
    assert 20 * np.log10(error) < -30


def test_batching_does_not_change_the_stems(separator):
    waves = [noise(5, seed=1), noise(4.9, seed=2), noise(4.8, seed=3)]
    assert len({separator.windows(wave.shape[-1]) for wave in waves}) == 1
    together = separator(waves)
    for stems, wave in zip(together, waves, strict=True):
        (alone,) = separator([wave])
        assert stems.shape == alone.shape
        assert (stems - alone).abs().max() < 1e-5


def test_the_same_file_gives_the_same_bytes(separator, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(3).T.numpy(), 44100)
    first, second = (separator([separator.load(path)])[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("rate", "channels"), [(22050, 1), (44100, 2), (8000, 1), (48000, 6)])
def test_any_rate_and_channels_come_out_as_four_stems(separator, tmp_path, rate, channels):
    path = tmp_path / "clip.wav"
    rng = np.random.default_rng(0)
    soundfile.write(path, rng.normal(0, 0.1, (3 * rate, channels)), rate)
    wave = separator.load(path)
    assert wave.shape == (2, 3 * 44100)
    assert separator([wave])[0].shape == (4, 3 * 22050)


def test_thirty_second_clips_take_five_windows_of_the_real_model():
    separator = Separator.__new__(Separator)
    separator.overlap = SeparationSettings().separation_overlap
    separator.model = HTDemucs(**TINY | {"segment": Fraction(39, 5)})
    assert separator.windows(int(30.8 * 44100)) == 5
    separator.overlap = 0.25
    assert separator.windows(30 * 44100) == 6


def test_out_of_memory_halves_the_batch_and_goes_on(separator, caplog):
    class Card:
        """The real separator on a card that has room for one clip."""

        batch_size = 4

        def __call__(self, waves):
            if len(waves) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return separator(waves)

    waves = [noise(1, seed=seed) for seed in range(3)]
    stems = separate_fitting(Card(), waves)
    assert [len(s) for s in stems] == [4, 4, 4]
    assert torch.equal(stems[2], separator([waves[2]])[0])


def test_half_precision_is_taken_only_where_it_is_near_enough(separator, monkeypatch):
    wave = torch.from_numpy(render("rock", seed=1, seconds=2, sr=44100)[[1, 3]])
    separator.choose_precision(wave)
    assert separator.half
    assert separator([wave])[0].dtype == torch.float32
    monkeypatch.setattr("stemgenre.separation.HALF_ERROR_DB", -120.0)
    separator.choose_precision(wave)
    assert not separator.half


def clips_in(folder, **files):
    rows = []
    for name, content in files.items():
        path = folder / f"{name}.wav"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            soundfile.write(path, content, 22050)
        rows.append({"clip": name, "path": path})
    return pd.DataFrame(rows)


@pytest.fixture
def separate(tiny_repo, small_settings, tmp_path):
    """Runs separate_missing on a table of clips and returns the cache."""
    cache = StemCache(tmp_path / "cache", model="htdemucs", sample_rate=11025)
    settings = small_settings("SEPARATION_MODEL=htdemucs", f"SEPARATION_REPO={tiny_repo}")

    def run(clips):
        with runtime.start(MachineSettings(device="cpu")) as process:
            separate_missing(clips, cache, settings, process)
        return cache

    run.cache = cache
    return run


def test_bad_clips_are_all_named_and_the_good_ones_stay_cached(separate, tmp_path):
    wave = noise(1, channels=1)[0].numpy()
    clips = clips_in(tmp_path, good=wave, broken=b"RIFF????", silent=0 * wave, fine=wave[::-1])
    with pytest.raises(UserError) as error:
        separate(clips)
    assert "broken.wav" in str(error.value)
    assert "silent.wav" in str(error.value)
    assert "2 clips" in str(error.value)
    assert separate.cache.read("good").shape == separate.cache.read("fine").shape
    assert {path.name for path in separate.cache.folder.iterdir()} == {"good.npz", "fine.npz"}


def test_a_second_run_does_only_what_is_missing(separate, tmp_path):
    wave = noise(1, channels=1)[0].numpy()
    cache = separate(clips_in(tmp_path, one=wave))
    before = cache.path("one").stat().st_mtime_ns
    separate(clips_in(tmp_path, one=wave, two=wave[::-1]))
    assert cache.path("one").stat().st_mtime_ns == before
    clips_in(tmp_path, one=wave[:-100])
    separate(clips_in(tmp_path, one=wave[:-100], two=wave[::-1]))
    assert cache.path("one").stat().st_mtime_ns != before


def test_with_every_clip_cached_demucs_is_not_imported(small_data):
    code = f"""
import sys, pandas as pd, config
from pathlib import Path
from stemgenre import runtime
from stemgenre.band import render
from stemgenre.cache import StemCache
from stemgenre.settings import load_settings
from stemgenre.stems import separate_missing
settings = load_settings(config, ["SR=11025", "SEPARATION_MODEL=synthesised", "DEVICE=cpu"])
cache = StemCache(Path({str(small_data)!r}) / "separated", model="synthesised", sample_rate=11025)
path = next(Path({str(small_data)!r}).rglob("train_0.au"))
with runtime.start(settings.machine) as run:
    separate_missing(pd.DataFrame([{{"clip": "train_0", "path": path}}]), cache, settings, run)
assert not any(name.split(".")[0] in ("demucs", "julius") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_older_th_files_load_with_their_checksum(tmp_path, tiny_model):
    package = {
        "klass": HTDemucs,
        "args": (),
        "kwargs": TINY | {"segment": Fraction(2)},
        "state": {k: v.half() for k, v in tiny_model.state_dict().items()},
        "training_args": {"lr": 0.1},
    }
    save_with_checksum(package, tmp_path / "0123abcd.th")
    (tmp_path / "htdemucs.yaml").write_text("models: ['0123abcd']")
    stems = make_separator(tmp_path)([noise(1)])[0]
    assert stems.shape == (4, 22050)
    (path,) = tmp_path.glob("*.th")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"checksum"):
        load_demucs("htdemucs", str(tmp_path))


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_th_file_with_a_payload_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"klass": HTDemucs, "state": Payload(marker)}, tmp_path / "htdemucs.th")
    (tmp_path / "pickled.th").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("htdemucs", "pickled"):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_demucs(name, str(tmp_path))
    assert not marker.exists()


def test_a_safetensors_file_naming_another_class_is_refused(tmp_path, tiny_repo):
    state = load_file(tiny_repo / "0123abcd.safetensors")
    meta = {"klass": "os.system", "args": json.dumps(["touch ran"]), "kwargs": "{}"}
    save_file(state, tmp_path / "htdemucs.safetensors", metadata=meta)
    with pytest.raises(UserError, match="not a plain Demucs model"):
        load_demucs("htdemucs", str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no htdemucs.safetensors or .th"),
        ({"htdemucs.yaml": "models: ['feed']"}, "holds no feed.safetensors or .th"),
        ({"htdemucs.yaml": "nothing: 1"}, "names no models"),
        ({"htdemucs.yaml": "models: ['/etc/passwd']"}, "is not a plain name"),
        ({"htdemucs.yaml": "models: ['../0123abcd']"}, "is not a plain name"),
        ({"htdemucs.yaml": "a: ["}, "is not a Demucs model's yaml"),
        ({"htdemucs.safetensors": "junk"}, "cannot be loaded"),
    ],
)
def test_a_bad_repository_says_what_it_needs(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_demucs("htdemucs", str(tmp_path))


def test_a_missing_repository_or_another_set_of_stems_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        load_demucs("htdemucs", str(tmp_path / "nowhere"))
    torch.manual_seed(0)
    arguments = TINY | {"sources": ["vocals", "rest"]}
    state = {k: v.contiguous() for k, v in HTDemucs(**arguments).state_dict().items()}
    meta = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(arguments)}
    save_file(state, tmp_path / "two.safetensors", metadata=meta)
    with pytest.raises(UserError, match="separates vocals, rest"):
        load_demucs("two", str(tmp_path))


def test_without_a_network_the_message_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="SEPARATION_REPO"):
        load_demucs("htdemucs")
