"""Stems: the same for the same file, however batched; bad clips and repositories are named."""

import json
import os
import pickle
import shutil
import time
from fractions import Fraction
from types import SimpleNamespace

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from demucs.states import save_with_checksum
from helpers import stop_after_first_entry
from safetensors.torch import load_file, save_file
from tiny_demucs import TINY_DEMUCS, put_repo

from stemgenre.data import audio
from stemgenre.data.audio import decode
from stemgenre.demo.synth import render
from stemgenre.errors import Interrupted, UserError
from stemgenre.files import sha256
from stemgenre.runtime import Runtime, StopRequest, start_runtime
from stemgenre.separation.cache import STEMS, StemCache
from stemgenre.separation.demucs_model import Separator, load_demucs
from stemgenre.separation.entry_writer import StemSpool
from stemgenre.separation.separate import (
    EndOfFile,
    read_chunks,
    separate_files,
    separate_missing,
)
from stemgenre.settings import MachineSettings, SeparationSettings

CPU = torch.device("cpu")


def make_separator(repo, *, sample_rate=22050, **changes):
    options = SeparationSettings.from_config(separation_repo=str(repo), **changes)
    return Separator(options, sample_rate=sample_rate, device=CPU)


@pytest.fixture(scope="module")
def separator(tiny_repo):
    """The tiny Demucs; not to be changed."""
    return make_separator(tiny_repo)


def noise(seconds, channels=2, seed=0, rate=44100):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(0, 0.1, (channels, int(seconds * rate))).astype("f4"))


def stems_of(separator, wave):
    ((stems, precision),) = separator([wave])
    assert precision == "float32"
    return stems


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
    stems = stems_of(separator, wave)
    assert stems.dtype == torch.float32
    assert stems.shape == plain.shape
    inner = slice(1000, -1000)  # the two resamplers differ at the ends
    error = (stems.numpy() - plain)[:, inner].std() / plain[:, inner].std()
    assert 20 * np.log10(error) < -30


def test_at_demucs_own_rate_stems_are_those_of_the_untouched_model(tiny_repo, tiny_model):
    wave = noise(2 * 1.58)[:, : 2 * int(0.79 * 88200)]
    reference = wave.mean(0)
    mixture = (wave - reference.mean()) / (reference.std() + 1e-8)
    plain = apply_model(tiny_model, mixture[None], shifts=0, overlap=0.21)[0].mean(1)
    plain = plain[[tiny_model.sources.index(stem) for stem in STEMS]] * reference.std()
    stems = stems_of(make_separator(tiny_repo, sample_rate=44100), wave)
    assert (stems - plain).std() < 1e-5 * plain.std()
    assert torch.backends.mha.get_fastpath_enabled()  # other models find PyTorch as it was


def test_batching_does_not_change_the_stems(fast_repo):
    separator = make_separator(fast_repo)
    waves = [
        noise(3.1, seed=1, rate=4410),
        noise(3, seed=2, rate=4410),
        noise(2.9, seed=3, rate=4410),
    ]
    assert len({separator.windows(wave.shape[-1]) for wave in waves}) == 1
    for (stems, _), wave in zip(separator(waves), waves, strict=True):
        alone = stems_of(separator, wave)
        assert stems.shape == alone.shape
        assert (stems - alone).abs().max() < 1e-5


def separated(separator, *paths):
    """{path: (stems, EndOfFile)} of files, as separate_files gives them."""
    found = {path: ([], []) for path in paths}
    for path, value in separate_files(((path, path) for path in paths), separator, threads=2):
        found[path][isinstance(value, EndOfFile)].append(value)
    return {path: (torch.cat(blocks, 1), *end) for path, (blocks, end) in found.items()}


@pytest.mark.parametrize(("rate", "channels"), [(22050, 1), (44100, 2), (8000, 1), (48000, 6)])
def test_any_rate_and_channels_come_out_as_four_stems(separator, tmp_path, rate, channels):
    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(2, channels, rate=rate).T.numpy(), rate)
    first, second = (separated(separator, path)[path] for _ in range(2))
    assert first[0].shape == (4, 2 * 22050)
    assert torch.equal(first[0], second[0])
    assert first[1] == EndOfFile("float32")


def test_of_surround_sound_the_front_channels_are_separated(separator, tmp_path):
    surround, stereo = tmp_path / "surround.wav", tmp_path / "stereo.wav"
    wave = noise(2, 6).T.numpy()
    soundfile.write(surround, wave, 44100)
    soundfile.write(stereo, wave[:, :2], 44100)
    found = separated(separator, surround, stereo)
    assert torch.equal(found[surround][0], found[stereo][0])


def test_a_file_of_one_chunk_has_the_stems_of_its_whole_wave(separator, tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, noise(3).T.numpy(), 44100, subtype="FLOAT")
    wave = torch.from_numpy(decode(path)[0])
    assert torch.equal(separated(separator, path)[path][0], stems_of(separator, wave).half())


@pytest.mark.parametrize("overlap", [0.2, 0.6])
def test_the_stems_of_chunks_are_those_of_the_whole_file(overlap, fast_repo, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(27.3, rate=4410).T.numpy(), 4410, subtype="FLOAT")
    separator = make_separator(fast_repo, sample_rate=2205, separation_overlap=overlap)
    wave = torch.from_numpy(decode(path)[0])
    whole = stems_of(separator, wave)
    chunks = list(read_chunks(path, separator))
    assert len(chunks) > 2
    assert max(chunk.wave.shape[1] for chunk in chunks) < 0.7 * wave.shape[1]
    joined = separated(separator, path)[path][0].float()
    assert joined.shape == whole.shape
    # Each chunk is normalised by itself, which leaves a constant offset far below hearing.
    assert (joined - whole).diff(dim=1).std() < 0.01 * whole.diff(dim=1).std()
    assert (joined - whole).abs().max() < 0.01 * wave.std()


def test_files_of_any_length_keep_their_order_and_stems_whatever_is_separated_with_them(
    fast_repo, tmp_path
):
    separator = make_separator(fast_repo, sample_rate=2205, separation_batch=3)
    seconds = (3, 19, 3, 2.9, 1, 0.1, 14)
    paths = [tmp_path / f"{number}.wav" for number in range(len(seconds))]
    for number, path in enumerate(paths):
        soundfile.write(path, noise(seconds[number], seed=number, rate=4410).T.numpy(), 4410)
    paths.insert(2, tmp_path / "bad.wav")
    paths[2].write_text("no audio")
    keys = []
    stems = {path: [] for path in paths}
    for path, value in separate_files(((p, p) for p in paths), separator, threads=2):
        keys.append(path)
        if not isinstance(value, EndOfFile):
            stems[path].append(value)
        elif value.error:
            assert path == paths[2]
            assert "bad.wav cannot be decoded" in str(value.error)
    assert list(dict.fromkeys(keys)) == paths
    alone = make_separator(fast_repo, sample_rate=2205)
    for path in (paths[0], paths[1], paths[4]):
        expected = separated(alone, path)[path][0]
        assert (torch.cat(stems[path], 1).float() - expected.float()).abs().max() < 1e-3


def test_thirty_second_clips_take_five_windows_of_the_real_models_length(tmp_path):
    repo = put_repo(tmp_path, segment=7.8)
    assert make_separator(repo).windows(int(30.8 * 44100)) == 5
    assert make_separator(repo, separation_overlap=0.25).windows(30 * 44100) == 6


def test_out_of_memory_halves_the_batch_and_the_separation_continues(fast_repo):
    exact = make_separator(fast_repo)
    small = make_separator(fast_repo, separation_batch=4)

    def limited_memory(module, arguments):
        """As on a GPU that has room for one clip."""
        if len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = small.model.models[0].register_forward_pre_hook(limited_memory)
    waves = [noise(1, seed=seed, rate=4410) for seed in range(3)]
    results = small(waves)
    assert small.micro_batch.size == 1
    assert torch.equal(results[2][0], stems_of(exact, waves[2]))
    handle.remove()

    def no_memory(module, arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    small.model.models[0].register_forward_pre_hook(no_memory)
    with pytest.raises(UserError, match="a single clip exceeds GPU memory"):
        small(waves)


def test_cudnn_searches_only_for_the_size_that_comes_again(fast_repo, monkeypatch):
    """Its search for the fastest convolutions takes longer than a batch."""
    separator, sizes = make_separator(fast_repo, separation_batch=2), []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    separator.model.models[0].register_forward_pre_hook(
        lambda model, mix: sizes.append((len(mix[0]), torch.backends.cudnn.benchmark))
    )
    separator([torch.randn(2, 1000) for _ in range(5)])
    assert set(sizes) == {(2, True), (1, False)}
    assert torch.backends.cudnn.benchmark


def test_only_a_clip_that_overflows_in_half_precision_is_done_in_float32(fast_repo):
    exact = make_separator(fast_repo)
    half = make_separator(fast_repo, separation_batch=3)
    half.half = True  # as on CUDA
    waves = [noise(1, seed=seed, rate=4410) for seed in range(3)]
    undisturbed = half(waves)
    assert [precision for _, precision in undisturbed] == ["float16"] * 3

    def overflow(module, arguments, output):
        """The second clip of a batch becomes infinite in half precision."""
        if torch.is_autocast_enabled("cpu") and len(output) > 1:
            output[1] = torch.inf

    half.model.models[0].register_forward_hook(overflow)
    results = half(waves)
    assert [precision for _, precision in results] == ["float16", "float32", "float16"]
    assert torch.equal(results[0][0], undisturbed[0][0])
    assert torch.equal(results[2][0], undisturbed[2][0])
    assert torch.equal(results[1][0], stems_of(exact, waves[1]))
    assert not torch.equal(results[0][0], stems_of(exact, waves[0]))


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
def separate(fast_repo, small_settings, tmp_path):
    """Runs separate_missing on a table of clips and returns the cache."""
    cache = StemCache(tmp_path / "cache", model="htdemucs", sample_rate=11025)

    def run(clips):
        settings = small_settings("SEPARATION_MODEL=htdemucs", f"SEPARATION_REPO={fast_repo}")
        with start_runtime(MachineSettings.from_config(device="cpu")) as runtime:
            separate_missing(clips, cache, settings, runtime)
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
    assert {path.name for path in separate.cache.folder.glob("*.npz")} == {"good.npz", "fine.npz"}


def test_a_disk_without_room_for_the_stems_is_named_before_any_work(
    separate, tmp_path, monkeypatch
):
    clips = clips_in(tmp_path, one=noise(1, 1)[0].numpy())  # two seconds
    needed, free = 2 * 11025 * 4 * 2, []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free[-1]))
    free.append(needed - 1)
    with pytest.raises(UserError, match="needs 0.2 MB, 0.2 MB are free; free disk space or set"):
        separate(clips)
    assert not list(separate.cache.folder.glob("*.npz"))
    free.append(needed)
    assert separate(clips).read("one").shape == (4, 22050)


def test_a_second_run_does_only_what_is_missing(separate, tmp_path):
    wave = noise(1, channels=1)[0].numpy()
    cache = separate(clips_in(tmp_path, one=wave))
    before = cache.path("one").stat().st_mtime_ns
    separate(clips_in(tmp_path, one=wave, two=wave[::-1]))
    assert cache.path("one").stat().st_mtime_ns == before
    clips_in(tmp_path, one=wave[:-100])
    separate(clips_in(tmp_path, one=wave[:-100], two=wave[::-1]))
    assert cache.path("one").stat().st_mtime_ns != before


def test_another_run_that_fills_the_cache_leaves_no_clip_to_neither_process(
    small_settings, fast_repo, tmp_path, monkeypatch
):
    """Which clips are missing is said by the first process; this is the second one."""
    wave = noise(0.5, channels=1)[0].numpy()
    clips = clips_in(tmp_path, **dict.fromkeys("abcd", wave))
    cache = StemCache(tmp_path / "cache", model="htdemucs", sample_rate=11025)
    cache.write("a", np.zeros((4, 5512)), clips["path"][0])  # since the first one has looked
    answers = iter([[[True] * 4, None], [[], []]])
    monkeypatch.setattr(Runtime, "all_gather", lambda runtime, value: next(answers))
    monkeypatch.setattr(Runtime, "all_reduce_max", lambda runtime, *numbers: numbers)
    settings = small_settings("SEPARATION_MODEL=htdemucs", f"SEPARATION_REPO={fast_repo}")
    separate_missing(clips, cache, settings, Runtime(torch.device("cpu"), 1, 2, StopRequest()))
    assert {path.stem for path in cache.folder.glob("*.npz")} == {"a", "b", "d"}


def test_a_clip_that_is_replaced_while_it_is_separated_is_separated_again(
    separate, tmp_path, monkeypatch
):
    clips = clips_in(tmp_path, one=noise(1, 1)[0].numpy())

    def read_and_replace(path, separator):
        yield from read_chunks(path, separator)
        clips_in(tmp_path, one=noise(2, 1, seed=1)[0].numpy())

    monkeypatch.setattr("stemgenre.separation.separate.read_chunks", read_and_replace)
    cache = separate(clips)
    assert not cache.is_current("one", clips["path"][0])
    monkeypatch.undo()
    assert separate(clips).read("one").shape == (4, 2 * 22050)


def test_a_file_whose_stems_are_nan_is_named_and_the_others_are_separated(fast_repo, tmp_path):
    paths = [tmp_path / f"{number}.wav" for number in range(3)]
    for number, path in enumerate(paths):
        soundfile.write(path, noise(0.5, seed=number, rate=4410).T.numpy(), 4410)  # a window
    separator, calls = make_separator(fast_repo), []

    def fail_once(module, arguments, output):
        calls.append(module)
        return output * torch.nan if len(calls) == 2 else output

    separator.model.models[0].register_forward_hook(fail_once)
    found = {path: [] for path in paths}
    for path, value in separate_files(((path, path) for path in paths), separator, threads=1):
        found[path].append(value)
    (end,) = found[paths[1]]
    assert "1.wav produced NaN or infinite samples" in str(end.error)
    for path in (paths[0], paths[2]):
        stems, end = found[path]
        assert stems.isfinite().all() and end == EndOfFile("float32")


def test_with_every_clip_cached_demucs_is_not_needed(small_data, small_settings):
    cache = StemCache(small_data / "separated", model="synthesised", sample_rate=11025)
    path = next(small_data.rglob("train_0.au"))
    settings = small_settings("SEPARATION_REPO=nowhere")
    with start_runtime(settings.machine) as runtime:
        separate_missing(
            pd.DataFrame([{"clip": "train_0", "path": path}]), cache, settings, runtime
        )


def test_a_long_clip_and_its_precision_are_cached(separate, tmp_path):
    clips = clips_in(tmp_path, short=noise(1, 1)[0].numpy(), long=noise(16, 1)[0].numpy())
    cache = separate(clips)  # the long one takes two chunks
    assert cache.read("short").shape == (4, 22050)
    assert cache.read("long").shape == (4, 16 * 22050)
    for clip in ("short", "long"):
        meta = json.loads(str(np.load(cache.path(clip))["meta"]))
        assert meta["precision"] == "float32"


@pytest.mark.parametrize("place", ["StemCache.write", "StemSpool.add"])
def test_without_memory_to_store_a_clips_stems_that_clip_is_named(
    separate, tmp_path, monkeypatch, place
):
    monkeypatch.setattr("stemgenre.separation.separate.KEPT_STRIDES", 3)
    waves = {name: noise(5, 1, seed=n)[0].numpy() for n, name in enumerate("abc")}
    clips = clips_in(tmp_path, **waves)  # of two chunks each
    owner, method = place.split(".")
    owner, calls = {"StemCache": StemCache, "StemSpool": StemSpool}[owner], []
    function = getattr(owner, method)

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return function(*arguments, **options)

    monkeypatch.setattr(owner, method, failing)
    with pytest.raises(UserError, match=r"1 clips could not") as error:
        separate(clips)
    named = [
        name for name in waves if f"{name}.wav cannot be stored: not enough" in str(error.value)
    ]
    assert len(named) == 1
    assert {path.stem for path in separate.cache.folder.glob("*.npz")} == set(waves) - set(named)
    separate(clips)
    assert separate.cache.read(named[0]).shape == (4, 5 * 22050)


def test_stopping_keeps_what_is_separated(separate, tmp_path, monkeypatch):
    clips = clips_in(tmp_path, **{f"c{n}": noise(1, 1, seed=n)[0].numpy() for n in range(6)})
    stop_after_first_entry(monkeypatch)
    with pytest.raises(Interrupted):
        separate(clips)
    monkeypatch.undo()
    done = {path.stem for path in separate.cache.folder.glob("*.npz")}
    assert 1 <= len(done) < 6
    separate(clips)
    assert len(list(separate.cache.folder.glob("*.npz"))) == 6


def test_older_th_files_load_with_their_checksum(tmp_path, tiny_model):
    package = {
        "klass": HTDemucs,
        "args": (),
        "kwargs": TINY_DEMUCS | {"segment": Fraction(2)},
        "state": {k: v.half() for k, v in tiny_model.state_dict().items()},
        "training_args": {"lr": 0.1},
    }
    save_with_checksum(package, tmp_path / "0123abcd.th")
    (tmp_path / "htdemucs.yaml").write_text("models: ['0123abcd']")
    stems = stems_of(make_separator(tmp_path), noise(1))
    assert stems.shape == (4, 22050)
    (path,) = tmp_path.glob("*.th")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="SHA-256"):
        load_demucs("htdemucs", str(tmp_path))


@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
def test_a_hash_in_the_name_of_weights_is_compared(tmp_path, tiny_repo, suffix):
    (tmp_path / "htdemucs.yaml").write_text("models: ['0123abcd']")
    path = tmp_path / f"0123abcd-00000000{suffix}"
    path.write_bytes((tiny_repo / "0123abcd.safetensors").read_bytes())
    with pytest.raises(UserError, match=rf"{path.name} is damaged or another file: its SHA-256"):
        load_demucs("htdemucs", str(tmp_path))
    path.rename(tmp_path / f"0123abcd-{sha256(path)[:8]}{suffix}")
    if suffix == ".safetensors":
        load_demucs("htdemucs", str(tmp_path))


def test_a_changed_weight_in_a_th_file_is_noticed_without_a_hash_in_its_name(tmp_path, tiny_model):
    path = tmp_path / "htdemucs.th"
    state = tiny_model.state_dict()
    torch.save({"klass": HTDemucs, "args": (), "kwargs": TINY_DEMUCS, "state": state}, path)
    load_demucs("htdemucs", str(tmp_path))
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data), len(data) // 4):
        damaged = data.copy()
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"htdemucs\.th cannot be read as a Demucs model"):
            load_demucs("htdemucs", str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segment": float("nan")}, "segment"),
        ({"segment": 0}, "segment"),
        ({"segment": "x"}, "cannot be loaded"),
        ({"samplerate": 0}, "cannot be loaded"),
        ({"samplerate": 44100.5}, "sample rate"),
        ({"audio_channels": 0}, "cannot be loaded"),
        ({"sources": ["drums", "bass", "other", 7]}, "sources are not names"),
        ({"depth": 12}, "cannot be loaded"),  # 5 GB
        ({"depth": 2**63}, "it has depth 9223372036854775808"),
        ({"t_layers": 10**9}, "it has t_layers 1000000000"),
    ],
)
def test_a_model_whose_file_says_what_no_model_is_is_refused(tmp_path, tiny_model, changes, said):
    kwargs = TINY_DEMUCS | changes
    package = {"klass": HTDemucs, "args": (), "kwargs": kwargs, "state": tiny_model.state_dict()}
    torch.save(package, tmp_path / "htdemucs.th")
    started = time.monotonic()
    with pytest.raises(UserError, match=said) as error:
        load_demucs("htdemucs", str(tmp_path))
    assert "htdemucs.th" in str(error.value)
    assert time.monotonic() - started < 20


def test_weights_that_are_nan_are_refused(tmp_path, tiny_repo):
    state = load_file(tiny_repo / "0123abcd.safetensors")
    next(iter(state.values())).flatten()[0] = torch.nan
    meta = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(TINY_DEMUCS)}
    save_file(state, tmp_path / "htdemucs.safetensors", metadata=meta)
    with pytest.raises(UserError, match=r"htdemucs\.safetensors .*NaN or infinite"):
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
        with pytest.raises(UserError, match="cannot be read as a Demucs model"):
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
    arguments = TINY_DEMUCS | {"sources": ["vocals", "rest"]}
    state = {k: v.contiguous() for k, v in HTDemucs(**arguments).state_dict().items()}
    meta = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(arguments)}
    save_file(state, tmp_path / "two.safetensors", metadata=meta)
    with pytest.raises(UserError, match="separates vocals, rest"):
        load_demucs("two", str(tmp_path))


def test_the_models_of_a_bag_are_mixed_by_its_weights_in_windows_of_its_segment(tmp_path):
    weights = {"one": [1, 1, 0, 0.5], "other": [0, 0, 1, 0.5]}  # of drums, bass, other, vocals
    names = {**dict.fromkeys(weights), "bag": [*weights.values()]}
    for name in weights:
        put_repo(tmp_path, samplerate=4410, channels=8 if name == "one" else 4)
        (tmp_path / "0123abcd.safetensors").rename(tmp_path / f"{name}.safetensors")
    for name, rows in names.items():
        models = [*weights] if rows else [name]
        bag = {"models": models, "weights": rows, "segment": 0.5}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(bag))
    wave = noise(2, rate=4410)
    stems = {}
    for name in names:
        separator = make_separator(tmp_path, separation_model=name)
        assert separator.stride() == int(0.79 * 2205)
        stems[name] = stems_of(separator, wave)
    one, other = stems["one"], stems["other"]
    expected = torch.stack([(one[0] + other[0]) / 2, one[1], one[2], other[3]])
    assert (one - other).std(1).min() > 0.1 * one.std()
    torch.testing.assert_close(stems["bag"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"samplerate": 8820}, {"sources": TINY_DEMUCS["sources"][::-1]}]
)
def test_a_bag_of_models_that_do_not_fit_each_other_is_refused(changes, fast_repo, tmp_path):
    put_repo(tmp_path, **{"samplerate": 4410, **changes})
    (tmp_path / "0123abcd.safetensors").rename(tmp_path / "feed.safetensors")
    shutil.copy(fast_repo / "0123abcd.safetensors", tmp_path)
    (tmp_path / "htdemucs.yaml").write_text("models: ['0123abcd', feed]")
    with pytest.raises(UserError, match="mixes models of different stems or sample rates"):
        load_demucs("htdemucs", tmp_path)


def test_without_a_network_the_message_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="SEPARATION_REPO"):
        load_demucs("htdemucs")


def test_a_clip_that_takes_too_much_memory_is_named_and_the_others_are_separated(
    separator, tmp_path, monkeypatch
):
    paths = [tmp_path / f"{number}.wav" for number in range(3)]
    for number, path in enumerate(paths):
        soundfile.write(path, noise(1, rate=8000 + 1000 * number).T.numpy(), 8000 + 1000 * number)
    resample = audio.resample_blocks

    def failing(blocks, *, to_rate):
        for block, rate in blocks:
            if rate == 9000:
                raise MemoryError
            yield from resample([(block, rate)], to_rate=to_rate)

    monkeypatch.setattr(audio, "resample_blocks", failing)
    ends = {
        path: value
        for path, value in separate_files(((p, p) for p in paths), separator, threads=1)
        if isinstance(value, EndOfFile)
    }
    assert "not enough memory" in str(ends[paths[1]].error)
    assert "1.wav" in str(ends[paths[1]].error)
    assert ends[paths[0]].error is None
    assert ends[paths[2]].error is None


@pytest.mark.parametrize("rate", [22051, 11027])
def test_a_rate_whose_resampling_kernel_would_be_huge_is_resampled_all_the_same(tiny_repo, rate):
    wave = noise(2)
    expected = stems_of(make_separator(tiny_repo, sample_rate=22050), wave)
    began = time.monotonic()
    stems = stems_of(make_separator(tiny_repo, sample_rate=rate), wave)
    assert time.monotonic() - began < 20
    assert stems.shape == (4, round(wave.shape[1] * rate / 44100))
    assert stems.std().item() == pytest.approx(expected.std().item(), rel=0.3)
    assert torch.equal(stems, stems_of(make_separator(tiny_repo, sample_rate=rate), wave))
