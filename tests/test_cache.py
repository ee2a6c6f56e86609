"""A cache entry gives back the stems it was given, or is refused: never other stems.

It is made anew when the file, the model or the rate is another; older forms are still read.
"""

import io
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
from helpers import run_with_full_disk

from stemgenre.cache import STEMS, CacheError, StemCache

SR = 22050


@pytest.fixture
def source(tmp_path):
    """An audio file; the cache looks at its bytes only."""
    path = tmp_path / "train_0.au"
    path.write_bytes(b".snd" + bytes(500))
    return path


@pytest.fixture
def cache(tmp_path):
    return StemCache(tmp_path / "separated", model="htdemucs", sample_rate=SR)


def noise(*, samples=300, level_db=-20.0, seed=0):
    """Four stems of noise at a level in dBFS (rms): (4, samples) float32."""
    wave = np.random.default_rng(seed).standard_normal((len(STEMS), samples))
    return (wave * 10 ** (level_db / 20)).astype(np.float32)


def put_old_form(cache, stems, *, save=np.savez, names=STEMS, extra=()):
    """An entry as the older pipeline wrote it: float32, no meta."""
    cache.folder.mkdir(exist_ok=True)
    arrays = dict(zip(names, stems, strict=True)) | {name: stems.sum(axis=0) for name in extra}
    save(cache.path("train_0"), **arrays)


@pytest.mark.parametrize("level_db", [-6, -20, -40, -60, -80])
def test_stems_come_back_with_70_db_at_any_level_of_music(cache, source, level_db):
    stems = noise(level_db=level_db, samples=5000)
    cache.write("train_0", stems, source)
    found = cache.read("train_0").astype(np.float32)
    error = found - stems
    assert 10 * np.log10((stems**2).sum() / (error**2).sum()) >= 70


def test_below_any_level_of_music_the_error_stays_under_144_db(cache, source):
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
    assert [path.name for path in cache.folder.iterdir()] == ["train_0.npz"]


def test_the_same_stems_and_source_give_the_same_bytes(cache, source):
    entries = []
    for _ in range(2):
        cache.write("train_0", noise(), source)
        entries.append(cache.path("train_0").read_bytes())
        time.sleep(0.01)
    assert entries[0] == entries[1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("extra", [(), ("original",)])
def test_the_older_forms_are_current_and_read(cache, source, save, extra):
    stems = noise()
    put_old_form(cache, stems, save=save, extra=extra)
    assert cache.is_current("train_0", source)
    assert np.array_equal(cache.read("train_0"), stems)
    assert cache.read_file(cache.path("train_0"))[1] == SR


def test_the_three_channel_form_is_made_anew(cache, source):
    names = ("original", "accompaniment", "vocals")
    put_old_form(cache, noise()[:3], names=names)
    assert not cache.is_current("train_0", source)
    with pytest.raises(CacheError, match=r"train_0\.npz cannot be read"):
        cache.read("train_0")


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


def test_an_entry_of_another_model_rate_or_file_is_not_current(cache, source, tmp_path):
    cache.write("train_0", noise(), source)
    other = source.with_name("other.au")
    other.write_bytes(source.read_bytes())
    assert not StemCache(cache.folder, model="mdx", sample_rate=SR).is_current("train_0", source)
    assert not StemCache(cache.folder, model="htdemucs", sample_rate=44100).is_current(
        "train_0", source
    )
    assert not cache.is_current("train_0", other)
    assert not cache.is_current("train_1", source)


def outcome(cache, stems):
    """What reading gives: the same stems, other stems, or a refusal."""
    try:
        found = cache.read("train_0")
    except CacheError as error:
        assert "removed, run again" in str(error)
        return "refused"
    return "same" if np.array_equal(found, stems) else "other stems"


@pytest.mark.parametrize("form", ["new", "old", "compressed"])
def test_a_damaged_entry_is_refused_or_still_right(cache, source, form):
    stems = noise(samples=20).astype(np.float16)
    if form == "new":
        cache.write("train_0", stems, source)
    else:
        save = np.savez if form == "old" else np.savez_compressed
        put_old_form(cache, stems.astype(np.float32), save=save)
    path = cache.path("train_0")
    whole = path.read_bytes()
    outcomes = set()
    for offset, flip in enumerate(np.random.default_rng(0).integers(1, 256, len(whole))):
        damaged = bytearray(whole)
        damaged[offset] ^= flip
        path.write_bytes(damaged)
        outcomes.add(outcome(cache, stems))
        assert cache.is_current("train_0", source) in (True, False)
    assert outcomes == {"same", "refused"}


def test_a_truncated_entry_is_made_anew(cache, source):
    stems = noise(samples=100).astype(np.float16)
    cache.write("train_0", stems, source)
    path = cache.path("train_0")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert not cache.is_current("train_0", source)
        assert outcome(cache, stems) == "refused"


def npy(array, *, shape=None):
    """The bytes of an .npy member, with another shape in its header if given."""
    stream = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(stream, header | ({"shape": shape} if shape else {}))
    return stream.getvalue() + array.tobytes()


def put_members(cache, **members):
    cache.folder.mkdir(exist_ok=True)
    good = {stem: npy(wave) for stem, wave in zip(STEMS, noise(), strict=True)}
    with zipfile.ZipFile(cache.path("train_0"), "w") as archive:
        for name, data in (good | members).items():
            archive.writestr(f"{name}.npy", data)


@pytest.mark.parametrize(
    "members",
    [
        {"bass": npy(noise()[0], shape=(10**12,))},
        {"bass": npy(noise()[0], shape=(2**40, 2**40))},
        {"bass": npy(noise()[0], shape=(2**62, 4))},
        {"bass": npy(noise()[0], shape=(-1,))},
        {"bass": npy(noise()[0], shape=(30, 10))},
        {"bass": npy(noise()[0, :-1])},
        {"bass": npy(noise()[0, :0])},
        {"bass": npy(np.full(300, np.nan, dtype=np.float32))},
        {"bass": npy(np.arange(300))},
        {"bass": npy(np.array(["x"] * 300))},
        {"bass": b""},
        {"bass": b"\x93NUMPY\x01\x00\x0c\x00{'shape': (\n" + bytes(100)},
        {"bass": b"\x93NUMPY\x01\x00\x10\x00{'shape': 007,}\n" + bytes(100)},
        {"bass": b"\x93NUMPY\x03\x00\x10\x00" + bytes(100)},
        {stem: npy(noise()[0, :0]) for stem in STEMS},
        {"meta": npy(np.array("not json"))},
        {"meta": npy(np.array("[1, 2]"))},
        {"meta": npy(np.array(3.0))},
    ],
    ids=lambda members: repr(members)[:60],
)
def test_an_entry_that_cannot_be_stems_is_refused_at_once(cache, source, members):
    put_members(cache, **members)
    started = time.monotonic()
    with pytest.raises(CacheError, match=r"train_0\.npz"):
        cache.read("train_0")
    assert cache.is_current("train_0", source) in (True, False)
    assert time.monotonic() - started < 2


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("member", ["vocals", "meta"])
def test_code_in_an_entry_does_not_run(cache, source, tmp_path, member):
    marker = tmp_path / "it ran"
    pickled = npy(np.zeros(0, dtype=object)) + pickle.dumps(Payload(marker))
    put_members(cache, **{member: pickled})
    with pytest.raises(CacheError):
        cache.read("train_0")
    cache.is_current("train_0", source)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # it would have
    assert marker.exists()


def test_a_failing_write_leaves_the_old_entry_and_no_other_file(cache, source):
    cache.write("train_0", noise(seed=1), source)
    before = cache.path("train_0").read_bytes()
    with pytest.raises(ValueError, match="zip"):
        cache.write("train_0", noise()[:3], source)
    code = (
        "import sys, numpy\n"
        "from stemgenre.cache import StemCache\n"
        "cache = StemCache(sys.argv[1], model='htdemucs', sample_rate=22050)\n"
        "cache.write('train_0', numpy.ones((4, 50_000)), sys.argv[2])\n"
    )
    done = run_with_full_disk(code, cache.folder, source)
    assert "UserError" in done.stderr
    assert "train_0.npz cannot be written" in done.stderr
    assert [path.name for path in cache.folder.iterdir()] == ["train_0.npz"]
    assert cache.path("train_0").read_bytes() == before
