"""What several tests share: tiny networks, a small demo and a run on it, real clips."""

import shutil

import pytest
import torch
from browser import browser  # noqa: F401  (a fixture)
from demucs.htdemucs import HTDemucs
from helpers import (
    FULL_BACKBONE,
    SMALL_RUN,
    copy_music,
    give_up,
    run_training,
    use_tiny_backbone,
)
from tiny_demucs import TINY_DEMUCS, put_repo

from stemgenre.demo import demo
from stemgenre.separation.cache import StemCache
from stemgenre.settings import load_settings
from stemgenre.training import backbones


@pytest.fixture(scope="session", autouse=True)
def tiny_backbone():
    """Networks are built on a tiny EfficientNet, but for tests that ask for full_backbone."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_backbone(patch.setattr)
        yield


@pytest.fixture
def full_backbone(monkeypatch):
    """Networks are built on EfficientNet-B3 itself in this test."""
    monkeypatch.setattr(backbones, "torchvision_network", FULL_BACKBONE)


@pytest.fixture(scope="session")
def tiny_model():
    """The network whose weights tiny_repo holds: by the same seed."""
    torch.manual_seed(0)
    return HTDemucs(**TINY_DEMUCS).eval()


@pytest.fixture(scope="session")
def tiny_repo(tmp_path_factory):
    """A folder as the hub ships it: htdemucs.yaml and the safetensors that it names."""
    return put_repo(tmp_path_factory.mktemp("repo"))


@pytest.fixture(scope="session")
def fast_repo(tmp_path_factory):
    """The tiny Demucs at 4410 Hz: the same code on fewer samples, quickly resampled."""
    return put_repo(tmp_path_factory.mktemp("fast"), samplerate=4410, segment=1)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A demo of 30 training and 10 test clips of 2 s, with its stems; not to be changed."""
    folder = tmp_path_factory.mktemp("small") / "data"
    cache = StemCache(folder / "separated", model="synthesised", sample_rate=11025)
    demo.write_demo(
        folder, seed=3, train_per_genre=3, test_per_genre=1, seconds=2.0, sr=11025, cache=cache
    )
    return folder


@pytest.fixture
def small_settings(small_data, tmp_path):
    """A function: Settings of a small run on small_data, with further KEY=VALUE overrides."""

    def settings(*overrides):
        folders = (f"DATA_DIR={small_data}", f"OUTPUT_DIR={tmp_path / 'out'}")
        return load_settings([*SMALL_RUN, *folders, *overrides])

    return settings


@pytest.fixture(scope="session")
def finished_run(small_data, tmp_path_factory):
    """The output folder of an undisturbed run of SMALL_RUN on small_data; not to be changed."""
    out = tmp_path_factory.mktemp("finished_run")
    return run_training(load_settings([*SMALL_RUN, f"DATA_DIR={small_data}", f"OUTPUT_DIR={out}"]))


@pytest.fixture(scope="session")
def ffmpeg():
    """For tests that call ffmpeg."""
    if not shutil.which("ffmpeg"):
        give_up("ffmpeg is not installed")


@pytest.fixture
def music(tmp_path):
    """A copy of 23 real clips in the competition's layout."""
    return copy_music(tmp_path / "music")
