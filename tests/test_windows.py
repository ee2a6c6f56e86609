"""Clips longer than CLIP_SECONDS: windows in training and prediction, and further views of them."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SMALL_RUN, run_training

from stemgenre import Classifier
from stemgenre.features.augmentation import NO_AUGMENT, tta_views
from stemgenre.features.log_mel import Frontend, RunningStats
from stemgenre.features.windows import random_window
from stemgenre.runtime import Runtime, StopRequest
from stemgenre.separation.cache import StemCache
from stemgenre.settings import load_settings
from stemgenre.training.inference import compute_channel_stats
from stemgenre.training.stem_loader import StemLoader


def windows_of(length, count=200, *, window=100, needed=100, epoch=0):
    how = {"needed": needed, "seed": 1, "epoch": epoch}
    return [random_window(length, window, **how, clip_index=i) for i in range(count)]


def test_a_training_window_is_anywhere_in_a_long_clip_and_a_pure_function():
    starts = np.array([start for start, _ in windows_of(1000)])
    assert starts.min() < 50
    assert starts.max() > 850
    assert np.histogram(starts, bins=4, range=(0, 901))[0].min() > 25, "any part as often"
    assert all(stop - start == 100 for start, stop in windows_of(1000))
    assert windows_of(1000) == windows_of(1000)
    assert windows_of(1000) != windows_of(1000, epoch=1)


def test_another_seed_sees_other_windows():
    """So that the networks of several SEEDS differ in what they have seen."""
    windows = [
        random_window(1000, 100, needed=100, seed=seed, epoch=0, clip_index=3) for seed in range(20)
    ]
    assert len(set(windows)) > 15


@pytest.mark.parametrize("length", [30, 100, 110])
def test_a_clip_up_to_a_tenth_longer_is_one_window_its_beginning(length):
    assert set(windows_of(length)) == {(0, min(length, 100))}


def test_a_faster_tempo_takes_a_longer_section_and_never_more_than_there_is():
    for start, stop in windows_of(130, needed=120):
        assert 0 <= start <= 10
        assert stop == start + 120
    assert set(windows_of(115, needed=120)) == {(0, 115)}


def test_views_of_tta_go_to_either_side_and_begin_with_the_clip_itself():
    views = tta_views(8)
    assert views[0] == NO_AUGMENT
    assert len(set(views)) == 9
    assert np.mean([view.rate for view in views]) == pytest.approx(1)
    assert np.mean([view.semitones for view in views]) == pytest.approx(0)
    assert tta_views(0) == [NO_AUGMENT]


def test_each_second_of_a_long_clip_counts_once_in_the_channel_statistics(tmp_path):
    """Otherwise its middle would count more than its ends."""
    features = load_settings(["CLIP_SECONDS=1", "DB_REFERENCE=stem", "IMG_SIZE=64"]).features
    cpu, samples = torch.device("cpu"), features.sr
    noise = torch.randn(4, 4, samples, generator=torch.Generator().manual_seed(0))
    noise[1::2, :, samples // 2 :] *= 1e-3  # 60 dB below the first half
    cache = StemCache(tmp_path / "separated", model="m", sample_rate=features.sr)
    source = tmp_path / "long.au"
    source.write_bytes(b"x")
    cache.write("long", 0.1 * torch.cat(list(noise), dim=1).numpy(), source)
    expected, frontend = RunningStats(), Frontend(features, device=cpu)
    for window in torch.from_numpy(cache.read("long")).split(samples, dim=1):
        expected.add(frontend.log_mel(window))
    found = compute_channel_stats(
        StemLoader(cache, threads=1, device=cpu, device_cache=0.0),
        pd.DataFrame({"clip": ["long"]}),
        features=features,
        runtime=Runtime(cpu, 0, 1, StopRequest()),
    )
    assert np.array(found) == pytest.approx(np.array(expected.mean_and_std()), rel=1e-6)


def test_a_run_on_windows_predicts_as_predict_py_does(small_data, tmp_path):
    """Validation, test and prediction see all windows, with TTA more of them."""
    words = [*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path}", "CHANNELS=mix"]
    words += ["CLIP_SECONDS=0.7", "IMG_SIZE=(64, 96)", "BACKBONE=cnn", "LR=1e-2", "EPOCHS=4"]
    words += ["TTA=2"]
    settings = load_settings(words)
    out = run_training(settings)
    table = pd.read_csv(out / "test_probabilities.csv").set_index("file_name")
    name = table.index[0]
    (path,) = settings.cache_folder.parent.rglob(name)
    classifiers = (Classifier.load(out / "best_model.pth", device="cpu", tta=n) for n in (0, 2))
    plain, with_views = (
        torch.tensor([*classifier.predict(path).probabilities.values()])
        for classifier in classifiers
    )
    written = torch.tensor(table.loc[name].to_numpy(), dtype=plain.dtype)
    assert (with_views - written).abs().max() < 0.1 * (plain - written).abs().max()
