"""An epoch sees each clip once, and stems arrive in order."""

import numpy as np
import pandas as pd
import pytest
import torch

from stemgenre.separation.cache import StemCache
from stemgenre.separation.entry_reader import CacheError
from stemgenre.settings import AugmentSettings
from stemgenre.training import stem_loader
from stemgenre.training.stem_loader import StemLoader, epoch_batches, training_batches


def table(*targets):
    return pd.DataFrame({"clip": [f"train_{i}" for i in range(len(targets))], "target": targets})


@pytest.mark.parametrize(("clips", "size"), [(25, 24), (9, 4), (5, 8), (100, 24)])
def test_an_epoch_sees_each_clip_once_and_leaves_no_batch_of_one(clips, size):
    batches = epoch_batches(table(*[0] * clips), batch_size=size, seed=1, epoch=3)
    assert sorted(np.concatenate(batches)) == list(range(clips))
    assert 2 <= min(map(len, batches)) <= max(map(len, batches)) <= size


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(
            epoch_batches(table(*[0] * 50), batch_size=8, seed=seed, epoch=epoch)
        ).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


@pytest.fixture
def cache(tmp_path):
    source = tmp_path / "clip.au"
    source.write_bytes(b"x")
    cache = StemCache(tmp_path / "separated", model="m", sample_rate=100)
    for i in range(10):
        cache.write(f"train_{i}", np.full((4, 50 + i), i / 16, "f4"), source)
    return cache


def whole(row, length):
    return 0, length


ON_CPU = {"device": torch.device("cpu"), "device_cache": 0.4}


@pytest.mark.parametrize("threads", [1, 4])
def test_stems_arrive_with_their_own_positions(cache, threads):
    loader = StemLoader(cache, threads=threads, **ON_CPU)
    clips = table(*[0] * 10)
    batches = [np.array([3, 1]), np.array([9]), np.array([0, 2, 4])]
    found_batches = loader.batches(clips, batches, section=whole)
    for positions, (found, stems) in zip(batches, found_batches, strict=True):
        assert found is positions
        assert [s.shape[1] for s in stems] == [50 + i for i in positions]
        assert [s[0, 0].item() for s in stems] == [i / 16 for i in positions]


@pytest.mark.parametrize("whole_bytes", [0, 1e9])  # read in parts, and at once
def test_a_long_clip_gives_overlapping_windows(cache, tmp_path, monkeypatch, whole_bytes):
    monkeypatch.setattr(stem_loader, "WHOLE_BYTES", whole_bytes)
    ramp = np.arange(1000, dtype="f4") / 1024
    cache.write("long", np.stack([ramp] * 4), tmp_path / "clip.au")
    loader = StemLoader(cache, threads=2, **ON_CPU)
    clips = pd.DataFrame({"clip": ["train_3", "long", "train_5"]})
    windows = list(loader.windows(clips, [0, 1, 2], samples=400, overlap=2))
    assert [i for i, _ in windows] == [0, 1, 1, 1, 1, 2]
    starts = [round(stems[0, 0].item() * 1024) for i, stems in windows if i == 1]
    assert starts == [0, 200, 400, 600]
    assert {stems.shape for i, stems in windows if i == 1} == {(4, 400)}


def test_a_section_of_a_long_clip_is_what_the_whole_clip_has_there(cache, tmp_path):
    ramp = np.arange(1000, dtype="f4") / 1024
    cache.write("long", np.stack([ramp, -ramp, ramp, ramp]), tmp_path / "clip.au")
    whole_clip = cache.read("long")
    for start, stop in ((0, 1000), (0, 300), (700, 1000), (333, 334)):
        section = cache.read("long", section=lambda length, at=(start, stop): at)
        assert np.array_equal(section, whole_clip[:, start:stop])
    data = bytearray(cache.path("long").read_bytes())
    data[-3000] ^= 1  # far from the section that is read
    cache.path("long").write_bytes(data)
    with pytest.raises(CacheError):
        cache.read("long", section=lambda length: (0, 100))


def test_what_the_allocator_still_holds_counts_as_free_gpu_memory(cache, monkeypatch):
    free = [0]  # bytes; the rest is held since the separation
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free.pop() + 10**8))
    monkeypatch.setattr(
        "stemgenre.training.stem_loader.to_device", lambda stems, device: stems.clone()
    )
    on_gpu = {"device": torch.device("cuda"), "device_cache": 0.4}
    loader = StemLoader(cache, threads=1, **on_gpu)
    assert loader.read("train_1") is loader.read("train_1"), "it stays on the GPU"


def test_stems_that_do_not_fit_the_gpu_stay_on_the_cpu_and_none_are_kept(cache, monkeypatch):
    free = [400 * 8]  # bytes

    def to_device(stems, device):
        free[0] -= stems.nbytes
        if free[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stems.clone()

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**9))
    monkeypatch.setattr("stemgenre.training.stem_loader.to_device", to_device)
    on_gpu = {"device": torch.device("cuda"), "device_cache": 0.4}
    loader = StemLoader(cache, threads=2, **on_gpu)
    batches = [np.arange(10), np.arange(10)]
    for positions, stems in loader.batches(table(*[0] * 10), batches, section=whole):
        assert [s.shape[1] for s in stems] == [50 + i for i in positions]
    assert not loader.drop_gpu_cache(), "what was kept has been given back"


def test_stems_that_stay_on_the_gpu_are_cut_as_those_on_the_disk_and_within_their_budget(
    cache, monkeypatch
):
    read, read_whole = cache.read, []

    def record(clip, *, section=None, **options):
        read_whole.extend([clip] * (section is None))
        return read(clip, section=section, **options)

    monkeypatch.setattr(cache, "read", record)
    loader = StemLoader(cache, threads=1, **ON_CPU)
    loader.budget_bytes = 1000  # of the 400 and more that a clip takes
    for _ in range(2):
        for i in range(10):
            stems = loader.read(f"train_{i}", section=lambda length: (10, length - 5))
            assert torch.equal(stems, torch.full((4, 35 + i), i / 16, dtype=torch.float16))
    assert [*loader.gpu_cache] == ["train_0", "train_1"]
    assert read_whole == ["train_0", "train_1", "train_2"], "of the others, what is needed"


@pytest.mark.parametrize("whole_bytes", [0, 1e9])  # windows read in parts, and at once
def test_stems_of_a_clip_that_is_now_another_file_are_refused(
    cache, tmp_path, monkeypatch, whole_bytes
):
    monkeypatch.setattr(stem_loader, "WHOLE_BYTES", whole_bytes)
    (tmp_path / "clip.au").write_bytes(b"y")  # another run's entries of clips of these names
    loader = StemLoader(cache, threads=1, **ON_CPU)
    clips = table(0, 0).assign(path=tmp_path / "clip.au")
    for read in (
        loader.batches(clips, [np.array([1])], section=whole),
        loader.windows(clips, [1], samples=40, overlap=2),
    ):
        with pytest.raises(CacheError, match="train_1.* was not made from .*clip.au as it is now"):
            list(read)


def test_a_swapped_stem_is_as_long_as_the_others(cache):
    """Each clip takes as much of its partner as its own tempo needs."""
    clips = table(*[0] * 10)[1:]  # the first one's stems are zeros
    positions = np.arange(9)
    batches = training_batches(
        StemLoader(cache, threads=1, **ON_CPU), clips, [positions],
        section=lambda row, length: (0, 20 + 3 * row),
        augment=AugmentSettings.from_config(stem_swap=1.0), seed=0, epoch=0,
    )  # fmt: skip
    ((_, all_stems),) = batches
    for row, stems in enumerate(all_stems):
        assert len(stems.unique()) == 2, "its own, and its partner's"
        assert stems.shape == (4, 20 + 3 * row) and (stems != 0).all()


def test_a_damaged_entry_is_named(cache):
    cache.path("train_5").write_bytes(cache.path("train_5").read_bytes()[:300])
    loader = StemLoader(cache, threads=2, **ON_CPU)
    with pytest.raises(CacheError, match="train_5"):
        list(loader.batches(table(*[0] * 10), [np.arange(10)], section=whole))
    assert torch.is_tensor(loader.read("train_4"))
