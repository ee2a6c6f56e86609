"""The split keeps genres apart fairly, an epoch sees each clip once, and stems arrive in order."""

import numpy as np
import pandas as pd
import pytest
import torch

from stemgenre.cache import CacheError, StemCache
from stemgenre.dataset import StemReader, epoch_batches, split_clips
from stemgenre.errors import UserError
from stemgenre.settings import AugmentSettings, FeatureSettings

NAMES = ["blues", "jazz", "rock"]


def table(*targets):
    return pd.DataFrame({"clip": [f"train_{i}" for i in range(len(targets))], "target": targets})


def split(clips, **changes):
    options = {"test_size": 0.1, "seed": 42, "label_names": NAMES} | changes
    return split_clips(clips, **options)


def test_the_split_is_stratified_complete_and_the_seeds():
    clips = table(*[0] * 50, *[1] * 30, *[2] * 20)
    train, valid = split(clips)
    assert valid["target"].value_counts().sort_index().tolist() == [5, 3, 2]
    assert sorted([*train["clip"], *valid["clip"]]) == sorted(clips["clip"])
    assert split(clips)[1]["clip"].tolist() == valid["clip"].tolist()
    assert split(clips, seed=1)[1]["clip"].tolist() != valid["clip"].tolist()


def test_few_clips_still_leave_one_of_each_genre_to_validate():
    train, valid = split(table(0, 0, 0, 1, 1, 1, 2, 2, 2))
    assert sorted(valid["target"]) == [0, 1, 2]
    assert sorted(set(train["target"])) == [0, 1, 2]


@pytest.mark.parametrize(
    ("targets", "message"),
    [([0, 0, 0, 1, 1, 2], "rock has a single clip"), ([1, 1, 1], "two genres are needed")],
)
def test_what_cannot_be_split_says_what_it_needs(targets, message):
    with pytest.raises(UserError, match=message):
        split(table(*targets))


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


ON_CPU = {"device": torch.device("cpu"), "device_cache": 0.4}
FEATURES = FeatureSettings(sr=4000, clip_seconds=1.0, n_fft=64, hop_length=16)


@pytest.mark.parametrize("threads", [1, 4])
def test_stems_arrive_with_their_own_positions(cache, threads):
    reader = StemReader(cache, FEATURES, AugmentSettings(), threads=threads, **ON_CPU)
    clips = table(*[0] * 10)
    batches = [np.array([3, 1]), np.array([9]), np.array([0, 2, 4])]
    for positions, (found, stems) in zip(batches, reader.batches(clips, batches), strict=True):
        assert found is positions
        assert [s.shape[1] for s in stems] == [50 + i for i in positions]
        assert [s[0, 0].item() for s in stems] == [i / 16 for i in positions]


def test_a_long_clip_is_cut_to_what_the_fastest_tempo_needs(cache, tmp_path):
    cache.write("long", np.ones((4, 40000), "f4"), tmp_path / "clip.au")
    reader = StemReader(cache, FEATURES, AugmentSettings(), threads=1, **ON_CPU)
    assert 1.2 * 4000 <= reader.read("long").shape[1] < 1.3 * 4000


def test_a_damaged_entry_is_named(cache):
    cache.path("train_5").write_bytes(cache.path("train_5").read_bytes()[:300])
    reader = StemReader(cache, FEATURES, AugmentSettings(), threads=2, **ON_CPU)
    with pytest.raises(CacheError, match="train_5"):
        list(reader.batches(table(*[0] * 10), [np.arange(10)]))
    assert torch.is_tensor(reader.read("train_4"))
