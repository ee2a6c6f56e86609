"""What several tests need: a tiny network, short real audio, small tables, runs and scripts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf

import train
from stemgenre.report import report
from stemgenre.runtime import start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.training import backbones, checkpoint

ROOT = Path(__file__).parents[1]
MUSIC = Path(__file__).parents[2] / "shared" / "music"  # real clips beside the checkout, if any

SMALL_RUN = (  # a whole run in seconds
    "SR=11025",
    "N_FFT=1024",
    "HOP_LENGTH=256",
    "N_MELS=32",
    "CLIP_SECONDS=2",
    "IMG_SIZE=64",
    "PRETRAINED=False",
    "FREEZE_STAGES=0",
    "EPOCHS=2",
    "BATCH_SIZE=8",
    "TEST_SIZE=0.34",
    "SEPARATION_MODEL=synthesised",
    "DEVICE=cpu",
)

FULL_BACKBONE = backbones.torchvision_network


def give_up(reason):
    """Skips a test that needs what this machine does not have; with CI=true it fails."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def tiny_backbone(name, stochastic_depth):
    """torchvision's EfficientNet with the nine stages of B3 and 0.05 M weights; others in full."""
    if name != "efficientnet_b3":
        return FULL_BACKBONE(name, stochastic_depth)
    stages, last_channel = _efficientnet_conf("efficientnet_b3", width_mult=0.15, depth_mult=0.2)
    return EfficientNet(
        stages, 0.3, stochastic_depth_prob=stochastic_depth, last_channel=last_channel
    )


def use_tiny_backbone(set_attribute=setattr):
    """From now on, this process builds its networks on tiny_backbone."""
    set_attribute(backbones, "torchvision_network", tiny_backbone)


def limit_images(count, set_attribute=setattr):
    """From now on, networks of this process run out of memory in a forward pass on more images."""

    def check(module, inputs):
        if len(inputs[0]) > count:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def backbone(name, stochastic_depth):
        net = tiny_backbone(name, stochastic_depth)
        net.features[1].register_forward_pre_hook(check)
        return net

    set_attribute(backbones, "torchvision_network", backbone)


def stop_after_first_entry(monkeypatch):
    """From now on, SIGINT arrives as soon as the first entry of a cache is written."""
    write, signalled = StemCache.write, []

    def write_and_stop(cache, clip, *arguments, **options):
        write(cache, clip, *arguments, **options)
        if not signalled:
            signalled.append(clip)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StemCache, "write", write_and_stop)


class NoReport:
    """A Report that writes no page: its figures take most of a small run's seconds."""

    def __init__(self, *arguments):
        pass

    begin = update = finish = show_networks = __init__


def run_training(settings, *, with_report=False):
    """The output folder of a run of train.py in this process."""
    with pytest.MonkeyPatch.context() as patch, start_runtime(settings.machine) as runtime:
        if not with_report:
            patch.setattr(report, "Report", NoReport)
        train.run_competition(settings, runtime)
    return settings.paths.output("")


def run_results(out):
    """What equal runs have in common: (weights, best weights), metrics but for the seconds, tables.

    The tables are submit.csv and the files of probabilities, as bytes.
    """
    weights = [
        checkpoint.load(out / name, kind)["weights"]
        for name, kind in (("checkpoint.pth", "checkpoint"), ("best_model.pth", "model"))
    ]
    metrics = pd.read_csv(out / "metrics.csv").drop(columns=["seconds", "run_id"])
    tables = ("submit.csv", "valid_predictions.csv", "test_probabilities.csv")
    return weights, metrics, [(out / name).read_bytes() for name in tables]


def assert_same_run(out, expected):
    """The run in the folder `out` ended as run_results() `expected`, bit for bit."""
    weights, metrics, tables = run_results(out)
    for left, right in zip(weights, expected[0], strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    pd.testing.assert_frame_equal(metrics, expected[1], check_exact=True)
    assert tables == expected[2]


def tone(*, frequency=440.0, seconds=0.05, sr=8000, peak=0.5):
    """A sine wave: (samples,) float64."""
    return peak * np.sin(2 * np.pi * frequency * np.arange(round(seconds * sr)) / sr)


def put_audio(*paths):
    """Writes a short sound to each path, a different one to each."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(frequency=200 + 10 * number), 8000)


def put_table(path, rows, *, separator="\t", line_end="\n", encoding="utf-8"):
    """Writes rows of cells as a text table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(separator.join(map(str, row)) + line_end for row in rows)
    path.write_bytes(text.encode(encoding))


def run_python(*arguments):
    """A finished Python process, started from the repository's root, with its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def wait_until(condition):
    """Returns once condition() is true; fails if it is not within four minutes."""
    ends = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.1)


def run_with_full_disk(code, *arguments, limit=20_000):
    """run_python of `code` in a process that cannot write files longer than `limit` bytes."""
    lines = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    return run_python("-c", lines + code, *arguments)


def copy_music(folder):
    """A copy of the real clips, which can be changed, in `folder`."""
    if not MUSIC.is_dir():
        give_up("no real clips beside this checkout")
    shutil.copytree(MUSIC, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
