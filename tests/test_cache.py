"""A cache entry gives back the stems it was given, or is refused: never other stems.

The clip is separated again when the source file, the model or the sample rate has changed; older
forms of entries are still read.
"""

import io
import json
import os
import pickle
import re
import struct
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import run_with_full_disk, tone

from stemgenre.data import source_hashes
from stemgenre.errors import ClipError, UserError
from stemgenre.separation.cache import HASHES_FILE, StemCache, open_cache
from stemgenre.separation.entry_reader import CacheError, cached_blocks
from stemgenre.separation.entry_writer import EntryWriter, StemSpool
from stemgenre.settings import STEMS, load_settings

SR = 22050


@pytest.fixture
def source(tmp_path):
    """An audio file as long as the stems of noise()."""
    path = tmp_path / "train_0.au"
    soundfile.write(path, tone(seconds=300 / SR, sr=SR), SR)
    return path


@pytest.fixture
def cache(tmp_path):
    return StemCache(tmp_path / "separated", model="htdemucs", sample_rate=SR)


def noise(*, samples=300, level_db=-20.0, seed=0):
    """Four stems of noise at a level in dBFS (RMS): (4, samples) float32."""
    wave = np.random.default_rng(seed).standard_normal((len(STEMS), samples))
    return (wave * 10 ** (level_db / 20)).astype(np.float32)


def entries(cache):
    """Names of all files in the cache but for the hashes, which are remembered after 2 s."""
    return sorted(path.name for path in cache.folder.iterdir() if path.name != HASHES_FILE)


def read_meta(path):
    with np.load(path) as entry:
        return json.loads(str(entry["meta"]))


def put_old_entry(cache, stems, *, save=np.savez, names=STEMS, extra=()):
    """An entry as the older pipeline wrote it: float32, no meta."""
    cache.folder.mkdir(exist_ok=True)
    arrays = dict(zip(names, stems, strict=True)) | {name: stems.sum(axis=0) for name in extra}
    save(cache.path("train_0"), **arrays)


# What is written and read


@pytest.mark.parametrize("level_db", [-6, -20, -40, -60, -80])
def test_stems_keep_70_db_snr_at_any_level_of_music(cache, source, level_db):
    stems = noise(level_db=level_db, samples=5000)
    cache.write("train_0", stems, source)
    error = cache.read("train_0").astype(np.float32) - stems
    assert 10 * np.log10((stems**2).sum() / (error**2).sum()) >= 70


def test_the_error_of_very_quiet_stems_is_below_minus_144_db(cache, source):
    stems = noise(level_db=-100, samples=5000)
    cache.write("train_0", stems, source)
    error = cache.read("train_0").astype(np.float32) - stems
    assert np.abs(error).max() < 10 ** (-144 / 20)


def test_a_written_entry_is_current_small_and_in_order(cache, source):
    stems = noise()
    cache.write("train_0", stems, source)
    assert cache.is_current("train_0", source)
    assert cache.read("train_0").shape == (4, 300)
    assert np.allclose(cache.read("train_0"), stems, rtol=1e-3)
    assert cache.read_file(cache.path("train_0"))[1] == SR
    assert cache.path("train_0").stat().st_size < stems.size * 2 + 3000
    assert entries(cache) == ["train_0.npz"]


def test_the_same_stems_and_source_give_the_same_bytes(cache, source):
    entries = []
    for _ in range(2):
        cache.write("train_0", noise(), source)
        entries.append(cache.path("train_0").read_bytes())
        later = source.stat().st_mtime_ns + 10**9
        os.utime(source, ns=(later, later))
    assert entries[0] == entries[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_stems_that_float16_cannot_hold_are_not_stored(cache, source, value):
    stems = noise()
    stems[2, 7] = value
    with np.errstate(over="ignore"), pytest.raises(ClipError, match=r"train_0\.au .*infinite"):
        cache.write("train_0", stems, source)
    assert not cache.path("train_0").exists()


def test_a_source_that_has_vanished_is_named(cache, source):
    cache.write("train_0", noise(), source)
    source.unlink()
    for action in (cache.is_current, lambda *args: cache.write("train_0", noise(), args[1])):
        with pytest.raises(ClipError, match=r"train_0\.au can no longer be read: No such file"):
            action("train_0", source)


def test_the_precision_of_the_separation_is_recorded(cache, source):
    cache.write("train_0", noise(), source)
    assert read_meta(cache.path("train_0"))["precision"] == "float32"
    cache.write("train_0", noise(), source, precision="float16")
    assert read_meta(cache.path("train_0"))["precision"] == "float16"
    assert cache.is_current("train_0", source)


def test_an_entry_written_before_precision_was_recorded_is_current(cache, source):
    cache.write("train_0", noise(), source)
    with np.load(cache.path("train_0")) as entry:
        arrays = {name: entry[name] for name in entry.files}
    meta = json.loads(str(arrays["meta"]))
    del meta["precision"]
    np.savez(cache.path("train_0"), **arrays | {"meta": np.array(json.dumps(meta))})
    assert cache.is_current("train_0", source)
    assert np.allclose(cache.read("train_0"), noise(), rtol=1e-3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("extra", [(), ("original",)])
def test_older_forms_are_current_and_read(cache, source, save, extra):
    stems = noise()
    put_old_entry(cache, stems, save=save, extra=extra)
    assert cache.is_current("train_0", source)
    assert np.array_equal(cache.read("train_0"), stems)
    assert cache.read_file(cache.path("train_0"))[1] == SR


@pytest.mark.parametrize("dtype", [">f2", "<f4", ">f8"])
def test_stems_of_any_float_type_are_read(cache, dtype):
    put_old_entry(cache, noise().astype(dtype), save=np.savez_compressed)
    assert np.allclose(cache.read("train_0"), noise(), atol=1e-3)


def test_the_three_channel_form_is_separated_again(cache, source):
    names = ("original", "accompaniment", "vocals")
    put_old_entry(cache, noise()[:3], names=names)
    assert not cache.is_current("train_0", source)
    with pytest.raises(CacheError, match=r"train_0\.npz cannot be read"):
        cache.read("train_0")


# Which entries are current


def rewrite(path, content, *, keep_time=False):
    before = path.stat()
    path.write_bytes(content)
    later = before.st_mtime_ns + (0 if keep_time else 10**9)
    os.utime(path, ns=(later, later))


@pytest.mark.parametrize(
    ("change", "current"),
    [
        (lambda path: None, True),
        (lambda path: rewrite(path, path.read_bytes()), True),
        (lambda path: rewrite(path, path.read_bytes()[::-1]), False),
        (lambda path: rewrite(path, path.read_bytes() + b"x"), False),
        (lambda path: rewrite(path, path.read_bytes() + b"x", keep_time=True), False),
    ],
    ids=["untouched", "touched", "same size", "longer", "longer, old time"],
)
def test_an_entry_is_current_as_long_as_its_source_has_the_same_content(
    cache, source, change, current
):
    cache.write("train_0", noise(), source)
    change(source)
    assert cache.is_current("train_0", source) is current


def test_an_entry_of_another_model_rate_or_file_is_not_current(cache, source):
    cache.write("train_0", noise(), source)
    other = source.with_name("other.au")
    other.write_bytes(source.read_bytes())
    assert not StemCache(cache.folder, model="mdx", sample_rate=SR).is_current("train_0", source)
    assert not StemCache(cache.folder, model="htdemucs", sample_rate=44100).is_current(
        "train_0", source
    )
    assert not cache.is_current("train_0", other)
    assert not cache.is_current("train_1", source)


def put_clips(folder, cache, *names):
    """Audio files of equal length and different content, with an entry each."""
    paths = [folder / f"{name}.wav" for name in names]
    for number, path in enumerate(paths):
        soundfile.write(path, tone(frequency=300 + 50 * number, seconds=0.1, sr=SR), SR)
        cache.write(path.stem, noise(seed=number), path)
        assert cache.is_current(path.stem, path)
    return paths


def exchange_contents(first, second):
    """Swaps the contents of two files, each of which keeps its inode and its time."""
    contents, times = [(p.read_bytes(), p.stat().st_mtime_ns) for p in (first, second)], []
    for path, (content, _), (_, time_ns) in zip(
        (first, second), contents[::-1], contents, strict=True
    ):
        path.write_bytes(content)
        os.utime(path, ns=(time_ns, time_ns))
        times.append(path.stat().st_mtime_ns)
    assert times == [time_ns for _, time_ns in contents]


def exchange_names(first, second):
    """Swaps the names of two files of the same time."""
    os.utime(first, ns=(10**18, 10**18))
    os.utime(second, ns=(10**18, 10**18))
    third = first.with_name("third")
    first.rename(third)
    second.rename(first)
    third.rename(second)


@pytest.mark.parametrize("exchange", [exchange_contents, exchange_names])
@pytest.mark.parametrize("settled_seconds", [2.0, -1.0], ids=["new files", "old files"])
def test_clips_that_were_swapped_do_not_keep_each_others_stems(
    cache, tmp_path, monkeypatch, exchange, settled_seconds
):
    monkeypatch.setattr(source_hashes, "SETTLED_SECONDS", settled_seconds)
    paths = put_clips(tmp_path, cache, "a", "b")
    exchange(*paths)
    for again in (cache, StemCache(cache.folder, model="htdemucs", sample_rate=SR)):
        assert not any(again.is_current(path.stem, path) for path in paths)
    exchange(*paths)
    assert all(cache.is_current(path.stem, path) for path in paths)


def test_a_clip_that_was_corrected_with_its_old_time_is_separated_again(cache, source):
    cache.write("train_0", noise(), source)
    rewrite(source, source.read_bytes()[::-1], keep_time=True)
    assert not cache.is_current("train_0", source)


def test_a_large_file_is_hashed_once_for_all_runs(cache, source, monkeypatch):
    monkeypatch.setattr(source_hashes, "SETTLED_SECONDS", -1.0)
    os.truncate(source, 300_000_000)
    cache.write("train_0", noise(), source)
    seconds = []
    for _ in range(2):
        (cache.folder / HASHES_FILE).unlink(missing_ok=True)
        started = time.monotonic()
        assert StemCache(cache.folder, model="htdemucs", sample_rate=SR).is_current(
            "train_0", source
        )
        seconds.append(time.monotonic() - started)
    started = time.monotonic()
    assert StemCache(cache.folder, model="htdemucs", sample_rate=SR).is_current("train_0", source)
    assert time.monotonic() - started < 0.2 * min(seconds)


def test_a_damaged_list_of_hashes_is_no_fault(cache, source, monkeypatch):
    monkeypatch.setattr(source_hashes, "SETTLED_SECONDS", -1.0)
    cache.write("train_0", noise(), source)
    assert cache.is_current("train_0", source)
    hashes = cache.folder / HASHES_FILE
    valid = hashes.read_bytes()
    for damaged in (b"", b"\xff\x00", b"[[1], 2]\n{}\n7\n", valid[:-20], b"[" * 10**5 + valid):
        hashes.write_bytes(damaged)
        again = StemCache(cache.folder, model="htdemucs", sample_rate=SR)
        assert again.is_current("train_0", source)


def test_an_entry_that_was_checked_before_is_not_opened_again(cache, source, monkeypatch):
    monkeypatch.setattr(source_hashes, "SETTLED_SECONDS", -1.0)
    cache.write("train_0", noise(), source)
    assert cache.is_current("train_0", source)
    monkeypatch.setattr("zipfile.ZipFile", None)
    for again in (cache, StemCache(cache.folder, model="htdemucs", sample_rate=SR)):
        assert again.is_current("train_0", source)


@pytest.mark.parametrize("change", ["cut", "another model's", "overwritten", "source"])
def test_an_entry_that_was_checked_before_is_not_trusted_once_it_has_changed(
    cache, source, monkeypatch, change
):
    monkeypatch.setattr(source_hashes, "SETTLED_SECONDS", -1.0)
    cache.write("train_0", noise(), source)
    assert cache.is_current("train_0", source)
    path = cache.path("train_0")
    if change == "cut":
        rewrite(path, path.read_bytes()[:-10], keep_time=True)
    elif change == "another model's":
        other = StemCache(cache.folder, model="HTDEMUCS", sample_rate=SR)
        other.write("train_0", noise(), source)
    elif change == "overwritten":
        rewrite(path, bytes(path.stat().st_size), keep_time=True)
    else:
        rewrite(source, source.read_bytes()[::-1], keep_time=True)
    for again in (cache, StemCache(cache.folder, model="htdemucs", sample_rate=SR)):
        assert not again.is_current("train_0", source)


def test_an_entry_that_was_found_to_be_another_files_stays_so(cache, source, monkeypatch):
    """A run that is stopped before it separates the clip again leaves it to the next one."""
    monkeypatch.setattr(source_hashes, "SETTLED_SECONDS", -1.0)
    cache.write("train_0", noise(), source)
    rewrite(source, source.read_bytes()[::-1])
    for again in (cache, cache, StemCache(cache.folder, model="htdemucs", sample_rate=SR)):
        assert not again.is_current("train_0", source)


def test_stems_of_a_file_that_changed_after_it_was_hashed_are_separated_again(cache, source):
    digest = cache.hash_source(source)  # before it is decoded
    source.write_bytes(source.read_bytes() + b"still being unpacked")
    cache.write("train_0", noise(), source, source_sha256=digest)
    assert not cache.is_current("train_0", source)
    spool = StemSpool(cache)
    spool.add(torch.from_numpy(noise().astype(np.float16)))
    spool.store("train_0", source, source_sha256=digest)
    spool.close()
    assert not cache.is_current("train_0", source)


# Entries of another run, which shares the cache


@pytest.mark.parametrize(
    ("other", "named"),
    [({"sample_rate": 44100}, "44100 Hz"), ({"model": "mdx"}, "mdx at")],
)
def test_stems_of_a_run_with_another_rate_or_model_are_not_read(cache, source, other, named):
    options = {"model": "htdemucs", "sample_rate": SR} | other
    StemCache(cache.folder, **options).write("train_0", noise(), source)
    before = cache.path("train_0").read_bytes()
    with pytest.raises(CacheError, match=rf"train_0\.npz .*{named}.*SEPARATION_CACHE_DIR"):
        cache.read("train_0")
    assert cache.path("train_0").read_bytes() == before, "it is the other run's"


def test_stems_of_another_file_of_the_same_name_are_not_read(cache, source, tmp_path):
    other = tmp_path / "elsewhere" / source.name
    other.parent.mkdir()
    other.write_bytes(source.read_bytes()[:-2] + b"xx")
    cache.write("train_0", noise(), other)
    with pytest.raises(CacheError, match=r"train_0\.npz .*SEPARATION_CACHE_DIR"):
        cache.read("train_0", source=source)
    assert cache.read("train_0", source=other).any()
    other.unlink()
    assert cache.read("train_0", source=other).any(), "a run needs no clip any more to train"


# Older entries, without meta


OLDER = {  # stems of a clip of 2 s that an older pipeline may have left
    "the other rate": noise(samples=2 * 44100),
    "cut": noise(samples=SR),
    "stereo": np.zeros((4, 2, 2 * SR), np.float32),
    "in a row": np.zeros((4, 1, 2 * SR), np.float32),
    "integers": np.zeros((4, 2 * SR), np.int16),
    "complex": np.zeros((4, 2 * SR), np.complex64),
}


@pytest.mark.parametrize("name", OLDER)
def test_an_older_entry_that_does_not_fit_its_clip_is_separated_again(cache, source, name):
    soundfile.write(source, tone(seconds=2, sr=SR), SR)
    put_old_entry(cache, OLDER[name])
    assert not cache.is_current("train_0", source)


@pytest.mark.parametrize("samples", [2 * SR, 2 * SR - 7, 2 * SR + 300])
@pytest.mark.parametrize("source_rate", [8000, SR, 44100])
def test_an_older_entry_of_about_the_clips_length_is_current(cache, source, samples, source_rate):
    soundfile.write(source, tone(seconds=2, sr=source_rate), source_rate)
    put_old_entry(cache, noise(samples=samples))
    assert cache.is_current("train_0", source)


def test_an_older_entry_of_a_clip_without_a_known_length_is_separated_again(cache, tmp_path):
    source = tmp_path / "train_0.m4a"
    source.write_bytes(b"only ffmpeg reads this")
    put_old_entry(cache, noise())
    assert not cache.is_current("train_0", source)


# Pipes and devices


def in_time(action, seconds=10):
    """What `action` returns or raises; fails instead of waiting for a pipe for ever."""
    outcome = []

    def run():
        try:
            outcome.append(action())
        except UserError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, "it hangs"
    return outcome[0]


@pytest.mark.parametrize("kind", ["pipe", "device", "link to itself"])
def test_what_is_no_file_is_neither_a_clip_nor_an_entry(cache, source, tmp_path, kind):
    def put(path):
        path.unlink(missing_ok=True)
        make = {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero")}
        make.get(kind, lambda p: p.symlink_to(p))(path)

    cache.write("train_0", noise(), source)
    put(source)
    assert isinstance(in_time(lambda: cache.is_current("train_0", source)), ClipError)
    assert isinstance(in_time(lambda: cache.write("train_0", noise(), source)), ClipError)
    put(cache.path("train_0"))
    assert in_time(lambda: cache.is_current("train_0", source)) is False
    assert isinstance(in_time(lambda: cache.read("train_0")), UserError)


# Damaged entries


def read_outcome(cache, stems):
    """What reading gives: the same stems, other stems, or a refusal."""
    try:
        found = cache.read("train_0")
    except CacheError as error:
        assert "was removed, run again" in str(error)
        assert "\n" not in str(error)
        return "refused"
    return "same" if np.array_equal(found, stems) else "other stems"


@pytest.mark.parametrize("form", ["current", "old", "compressed"])
def test_an_entry_with_a_damaged_byte_is_refused_or_still_right(cache, source, form):
    stems = noise(samples=20).astype(np.float16)
    if form == "current":
        cache.write("train_0", stems, source)
    else:
        save = np.savez if form == "old" else np.savez_compressed
        put_old_entry(cache, stems.astype(np.float32), save=save)
    path = cache.path("train_0")
    valid_bytes = path.read_bytes()
    rng, outcomes = np.random.default_rng(0), set()
    for offset in range(0, len(valid_bytes), 2):
        damaged = bytearray(valid_bytes)
        damaged[offset + rng.integers(2)] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        cache.is_current("train_0", source)  # raises nothing
        outcomes.add(outcome := read_outcome(cache, stems))
        if outcome == "refused":
            assert not cache.is_current("train_0", source), "the next run separates it again"
    assert outcomes == {"same", "refused"}


def test_a_truncated_entry_is_separated_again(cache, source):
    stems = noise(samples=100).astype(np.float16)
    cache.write("train_0", stems, source)
    path = cache.path("train_0")
    valid_bytes = path.read_bytes()
    for length in range(0, len(valid_bytes), 7):
        path.write_bytes(valid_bytes[:length])
        assert not cache.is_current("train_0", source)
        assert read_outcome(cache, stems) == "refused"


def npy(array, *, shape=None, version=(1, 0)):
    """The bytes of an .npy member, with another shape in its header if given."""
    stream = io.BytesIO()
    if shape is None:
        np.lib.format.write_array(stream, array, allow_pickle=True, version=version)
        return stream.getvalue()
    header = np.lib.format.header_data_from_array_1_0(array) | {"shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + array.tobytes()


def put_members(cache, *, names=STEMS, **members):
    """A valid entry of 300 samples without meta, but for some members' bytes."""
    cache.folder.mkdir(exist_ok=True)
    valid = {name: npy(wave) for name, wave in zip(names, noise(), strict=False)}
    with zipfile.ZipFile(cache.path("train_0"), "w") as archive:
        for name, data in (valid | members).items():
            archive.writestr(f"{name}.npy", data)


def patch(cache, offset, data, **members):
    """An entry with these bytes at `offset` of each record of the zip file's directory."""
    put_members(cache, **members)
    content = bytearray(cache.path("train_0").read_bytes())
    for record in re.finditer(rb"PK\x01\x02", bytes(content)):
        start = record.start() + offset
        content[start : start + len(data)] = data
    cache.path("train_0").write_bytes(content)


BASS = noise()[1]
GIGABYTE = npy(BASS, shape=(2**28,))
INVALID_MEMBERS = {
    "a shape of terabytes": {"bass": npy(BASS, shape=(10**12,))},
    "a shape of gigabytes": {"bass": npy(BASS, shape=(10**9,))},
    "all stems of gigabytes": {stem: npy(BASS, shape=(10**9,)) for stem in STEMS},
    "a shape beyond 64 bits": {"bass": npy(BASS, shape=(2**40, 2**40))},
    "a shape that overflows to 0": {"bass": npy(BASS, shape=(2**62, 4))},
    "a negative shape": {"bass": npy(BASS, shape=(-1,))},
    "two dimensions": {"bass": npy(BASS, shape=(30, 10))},
    "stereo": {"bass": npy(np.zeros((2, 150), "f2"))},
    "no dimension": {"bass": npy(np.array(0.5, "f2"))},
    "one stem shorter": {"bass": npy(BASS[:-1])},
    "one stem longer": {"bass": npy(np.zeros(301, "f4"))},
    "one stem empty": {"bass": npy(BASS[:0])},
    "all stems empty": {stem: npy(BASS[:0]) for stem in STEMS},
    "NaN": {"bass": npy(np.full(300, np.nan, "f4"))},
    "infinite": {"bass": npy(np.full(300, np.inf, "f4"))},
    "integers": {"bass": npy(np.arange(300))},
    "booleans": {"bass": npy(np.zeros(300, bool))},
    "complex": {"bass": npy(np.zeros(300, "c8"))},
    "text": {"bass": npy(np.array(["x"] * 300))},
    "records": {"bass": npy(np.zeros(300, dtype=[("left", "f2"), ("right", "f2")]))},
    "objects": {"bass": npy(np.array([None] * 300))},
    "no bytes": {"bass": b""},
    "an unclosed header": {"bass": b"\x93NUMPY\x01\x00\x0c\x00{'shape': (\n" + bytes(100)},
    "an invalid number": {"bass": b"\x93NUMPY\x01\x00\x10\x00{'shape': 007,}\n" + bytes(100)},
    "another .npy version": {"bass": npy(BASS, version=(3, 0))},
    "an invalid .npy version": {"bass": b"\x93NUMPY\x09\x00\x10\x00" + bytes(100)},
    "meta that is no JSON": {"meta": npy(np.array("not json"))},
    "meta that is a list": {"meta": npy(np.array("[1, 2]"))},
    "meta that is a number": {"meta": npy(np.array(3.0))},
    "meta that is empty": {"meta": npy(np.array([], "U1"))},
    "meta of deep JSON": {"meta": npy(np.array("[" * 10**5))},
}
INVALID_ENTRIES = {
    "0 bytes": lambda cache: cache.path("train_0").write_bytes(b""),
    "a folder": lambda cache: cache.path("train_0").mkdir(),
    "an image": lambda cache: cache.path("train_0").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)),
    "an .npy": lambda cache: cache.path("train_0").write_bytes(npy(BASS)),
    "an empty archive": lambda cache: put_members(cache, names=()),
    "no drums": lambda cache: put_members(cache, names=("vocals", "bass", "other")),
    "in a folder": lambda cache: put_members(cache, names=[f"stems/{stem}" for stem in STEMS]),
    "encrypted": lambda cache: patch(cache, 8, b"\x01"),
    "an unknown compression": lambda cache: patch(cache, 10, b"\x63"),
    "a directory that claims gigabytes": lambda cache: patch(
        cache, 20, struct.pack("<II", 2**31, 2**31)
    ),
    "a directory and headers that claim gigabytes": lambda cache: patch(
        cache, 20, struct.pack("<II", 2**30 + 128, 2**30 + 128), **dict.fromkeys(STEMS, GIGABYTE)
    ),
}


def assert_refused(cache, action):
    """A UserError of one line with the path, soon and without allocating what the file claims."""
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^[^\n]*train_0\.npz[^\n]*$"):
        action()
    assert time.monotonic() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("name", INVALID_MEMBERS)
def test_an_entry_with_an_invalid_member_is_refused(cache, source, name):
    put_members(cache, **INVALID_MEMBERS[name])
    if name not in ("NaN", "infinite"):  # not seen in headers
        assert not cache.is_current("train_0", source)
    assert_refused(cache, lambda: next(cached_blocks(cache.path("train_0"), samples=100)))
    assert_refused(cache, lambda: cache.read("train_0"))
    assert not cache.path("train_0").exists(), "the next run separates the clip again"


@pytest.mark.parametrize("name", INVALID_ENTRIES)
def test_a_file_that_is_no_entry_is_refused_and_separated_again(cache, source, name):
    cache.folder.mkdir()
    INVALID_ENTRIES[name](cache)
    assert_refused(cache, lambda: cache.read("train_0"))
    assert not cache.is_current("train_0", source)


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("member", ["vocals", "meta"])
def test_code_in_an_entry_does_not_run(cache, source, tmp_path, member):
    marker = tmp_path / "it ran"
    pickled = npy(np.zeros(0, dtype=object), shape=(0,)) + pickle.dumps(Payload(marker))
    put_members(cache, **{member: pickled})
    with pytest.raises(CacheError):
        cache.read("train_0")
    cache.is_current("train_0", source)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload itself works"


def test_a_failing_write_leaves_the_old_entry_and_no_other_file(cache, source):
    cache.write("train_0", noise(seed=1), source)
    before = cache.path("train_0").read_bytes()
    with pytest.raises(ValueError, match="zip"):
        cache.write("train_0", noise()[:3], source)
    code = (
        "import sys, numpy\n"
        "from stemgenre.separation.cache import StemCache\n"
        "cache = StemCache(sys.argv[1], model='htdemucs', sample_rate=22050)\n"
        "cache.write('train_0', numpy.ones((4, 50_000)), sys.argv[2])\n"
    )
    done = run_with_full_disk(code, cache.folder, source)
    assert "UserError" in done.stderr
    assert "train_0.npz cannot be written" in done.stderr
    assert entries(cache) == ["train_0.npz"]
    assert cache.path("train_0").read_bytes() == before


@pytest.mark.parametrize("section", [None, lambda length: (5, 9)])
@pytest.mark.parametrize("old_time", [False, True])
def test_damage_to_an_entry_that_was_already_read_is_noticed(
    cache, source, monkeypatch, section, old_time
):
    monkeypatch.setattr(source_hashes, "SETTLED_SECONDS", -1.0)
    cache.write("train_0", noise(), source)
    stems = cache.read("train_0", section=section)
    assert np.array_equal(cache.read("train_0", section=section), stems)
    before = cache.path("train_0").stat()
    time.sleep(0.05)  # so that the file's times change
    with cache.path("train_0").open("r+b") as file:
        file.seek(1200)  # among the values of the second stem
        file.write(b"\x55")
    if old_time:  # as a copy of a damaged disk may have it
        os.utime(cache.path("train_0"), ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CacheError, match="Bad CRC-32"):
        cache.read("train_0", section=section)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what is read")
def test_an_epoch_reads_only_a_window_of_an_entry_that_is_known_to_be_undamaged(
    cache, source, monkeypatch
):
    def bytes_read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    monkeypatch.setattr(source_hashes, "SETTLED_SECONDS", -1.0)
    cache.write("train_0", noise(samples=200_000), source)
    for expected in (1_600_000, 0):
        before = bytes_read()
        cache.read("train_0", section=lambda length: (1000, 2000))
        assert expected <= bytes_read() - before < expected + 100_000


# Stems too long for memory


@pytest.mark.parametrize("samples", [1, 128, 300, 1000])
def test_an_entry_can_be_read_in_blocks(cache, source, samples):
    cache.write("train_0", noise(), source)
    blocks = list(cached_blocks(cache.path("train_0"), samples=samples))
    assert max(block.shape[1] for block in blocks) <= samples
    assert torch.equal(torch.cat(blocks, dim=1), torch.from_numpy(cache.read("train_0")))


def test_a_damaged_entry_gives_no_block(cache, source):
    cache.write("train_0", noise(samples=20_000), source)
    content = bytearray(cache.path("train_0").read_bytes())
    content[-1500] ^= 1  # near the end of the last stem
    cache.path("train_0").write_bytes(content)
    with pytest.raises(CacheError, match="Bad CRC-32"):
        next(cached_blocks(cache.path("train_0"), samples=10))
    with pytest.raises(CacheError, match="it was removed, run again to separate the clip"):
        next(cache.blocks("train_0", samples=10))
    assert not cache.is_current("train_0", source)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_file_that_came_in_blocks_is_stored_with_its_hash_and_precision(cache, source, blocks):
    digest = cache.hash_source(source)
    rewrite(source, source.read_bytes()[::-1])  # after it was decoded
    writer = EntryWriter(cache, "train_0", source, source_sha256=digest)
    for _ in range(blocks):
        writer.add(torch.ones(4, 100, dtype=torch.float16))
    writer.finish("float16")
    assert cache.read("train_0").shape == (4, 100 * blocks)
    assert read_meta(cache.path("train_0"))["precision"] == "float16"
    assert not cache.is_current("train_0", source)


def test_stems_of_which_a_block_found_no_disk_space_are_not_kept(cache, source, monkeypatch):
    add, calls = StemSpool.add, []

    def find_the_disk_full_once(spool, waves):
        calls.append(waves)
        if len(calls) == 2:
            raise UserError("the disk is full")
        add(spool, waves)

    monkeypatch.setattr(StemSpool, "add", find_the_disk_full_once)
    writer = EntryWriter(cache, "train_0", source)
    block = torch.zeros(4, 100, dtype=torch.float16)
    writer.add(block)
    with pytest.raises(UserError):
        writer.add(block)
    writer.add(block)
    with pytest.raises(UserError, match="the disk is full"):
        writer.finish("float32")
    assert entries(cache) == []


def test_spooled_blocks_become_the_same_entry_as_whole_stems(cache, source):
    stems = noise().astype(np.float16)
    cache.write("train_0", stems, source, precision="float16")
    expected = cache.path("train_0").read_bytes()
    spool = StemSpool(cache)
    for start in range(0, 300, 77):
        spool.add(torch.from_numpy(stems[:, start : start + 77]))
    spool.store("train_1", source, precision="float16")
    spool.close()
    assert cache.path("train_1").read_bytes() == expected
    assert entries(cache) == ["train_0.npz", "train_1.npz"]


# The mix alone


@pytest.fixture
def mix_cache(tmp_path):
    settings = load_settings([f"DATA_DIR={tmp_path}", "CHANNELS=mix"])
    return open_cache(settings)


def test_a_mix_is_written_and_read_as_stems_are(mix_cache, source):
    mix = noise()[:1]
    mix_cache.write("train_0", mix, source)
    assert mix_cache.is_current("train_0", source)
    assert np.allclose(mix_cache.read("train_0", source=source), mix, rtol=1e-3)
    assert mix_cache.path("train_0").stat().st_size < mix.size * 2 + 2000
    with np.load(mix_cache.path("train_0")) as entry:
        assert sorted(entry.files) == ["meta", "mix"]
    assert read_meta(mix_cache.path("train_0"))["model"] == "none"
    blocks = list(cached_blocks(mix_cache.path("train_0"), samples=77, waves=mix_cache.waves))
    assert [block.shape for block in blocks] == [(1, 77)] * 3 + [(1, 69)]
    spool = StemSpool(mix_cache)
    for block in blocks:
        spool.add(block)
    spool.store("train_1", source)
    spool.close()
    assert np.array_equal(mix_cache.read("train_1"), mix_cache.read("train_0"))
    rewrite(source, source.read_bytes()[::-1])
    assert not mix_cache.is_current("train_0", source)


def test_mixes_and_stems_leave_each_others_entries(mix_cache, source, tmp_path):
    stem_cache = open_cache(load_settings([f"DATA_DIR={tmp_path}"]))
    stem_cache.write("train_0", noise(), source)
    assert not mix_cache.is_current("train_0", source)
    mix_cache.write("train_0", noise()[:1], source)
    both = open_cache(load_settings([f"DATA_DIR={tmp_path}", "CHANNELS=mix,vocals"]))
    assert both.is_current("train_0", source), "the mix is the sum of the stems"
    assert stem_cache.read("train_0").shape == (4, 300)
    assert mix_cache.read("train_0").shape == (1, 300)


def test_a_damaged_mix_is_removed_and_decoded_again(mix_cache, source):
    mix_cache.write("train_0", noise()[:1], source)
    mix_cache.path("train_0").write_bytes(mix_cache.path("train_0").read_bytes()[:300])
    assert not mix_cache.is_current("train_0", source)
    with pytest.raises(CacheError, match="run again to decode the clip"):
        mix_cache.read("train_0")
    assert not mix_cache.path("train_0").exists()
