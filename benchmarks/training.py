"""An epoch of training: the plain recipe against this one, and the network's own rate.

    python benchmarks/training.py [--clips 48] [--size 300] [--rounds 3] [--device cpu] [--quick]
    python benchmarks/training.py --measures [...]
    python benchmarks/training.py --levers [...] [recipes/demo.py] [KEY=VALUE ...]

The plain recipe is what most pipelines do: librosa's time stretch, pitch shift and mel spectrogram
per stem in a torch DataLoader's workers, float32 images in NCHW through the same network with the
same frozen stages and AdamW, fp16 autocast with a GradScaler on CUDA. This recipe is stemgenre's
Trainer as train.py runs it. `network_clips_per_second` is that of the same steps on random images
of the same shape. The three run in turn, several times, on the same stems and with the same
augmentation. `frontend_fraction` is what of an epoch is not the network. The last line is one JSON
object.

With --measures, the network's own steps are timed with each of its measures undone in turn, and
compiled: `ratio` is that way's time over the time as it is, so above 1 the measure pays. Seen on
two CPU cores with --clips 16 --batch 8 --size 300 --rounds 2: without channels last 1.47 times the
time (1.43 to 1.51), with the frozen stages' activations and gradients 2.29 (2.20 to 2.38), without
the fused optimiser 1.00 (0.97 to 1.04; it is for GPUs), compiled 0.95 (0.93 to 0.97).

With --levers, an epoch as it is takes turns with one with each augmentation of stems, with mixup,
with all four of these, and with averaged weights: `ratio` is its time over the time as it is.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does
sys.path.insert(0, str(Path(__file__).parents[1]))
import librosa
import numpy as np
import pandas as pd
import torch

from stemgenre.demo.synth import GENRES, render
from stemgenre.features.augmentation import sample_params
from stemgenre.features.log_mel import Frontend
from stemgenre.runtime import start_runtime, thread_count
from stemgenre.separation.cache import StemCache
from stemgenre.settings import load_settings
from stemgenre.training.checkpoint import TrainState
from stemgenre.training.inference import autocast
from stemgenre.training.model import build_model
from stemgenre.training.stem_loader import StemLoader
from stemgenre.training.trainer import Trainer

LEVERS = {
    "STEM_GAIN_DB": 6.0,
    "STEM_DROPOUT": 0.15,
    "STEM_SWAP": 0.3,
    "MIXUP_ALPHA": 0.4,
}
CHANNEL_STATS = ([-45.0] * 4, [20.0] * 4)  # dB, near enough for a timing


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=48, help="in an epoch")
    parser.add_argument("--size", type=int, default=300, help="IMG_SIZE")
    parser.add_argument("--batch", type=int, default=24, help="BATCH_SIZE")
    parser.add_argument("--workers", type=int, default=2, help="of the plain recipe's DataLoader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="24 clips, 2 rounds, batches of 8")
    parser.add_argument("--measures", action="store_true", help="each measure's own effect")
    parser.add_argument("--levers", action="store_true", help="each augmentation lever's cost")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further settings")
    options = parser.parse_intermixed_args()
    if options.quick:
        options.clips, options.rounds, options.batch = 24, 2, 8
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"OUTPUT_DIR={folder}", f"DEVICE={options.device}", "PRETRAINED=False"]
        overrides += [f"IMG_SIZE={options.size}", f"BATCH_SIZE={options.batch}"]
        overrides += options.settings
        settings = load_settings(overrides)
        with start_runtime(settings.machine) as runtime:
            if options.measures:
                result = measures(settings, runtime, options)
            elif options.levers:
                result = levers(overrides, settings, runtime, Path(folder), options)
            else:
                result = compare(settings, runtime, Path(folder), options)
            print(json.dumps(result))


def compare(settings, runtime, folder, options):
    """The figures of the three ways over several rounds."""
    cache = StemCache(folder / "separated", model="synthesised", sample_rate=settings.features.sr)
    clips = make_clips(cache, folder, options.clips, settings.features)
    ways = {
        "plain": PlainRecipe(clips, cache, settings, runtime, options.workers),
        "ours": OurRecipe(clips, cache, settings, runtime),
        "network": NetworkOnly(clips, settings, runtime),
    }
    seconds = time_epochs(ways, runtime, options.rounds)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    ours, network = (statistics.median(seconds[name]) for name in ("ours", "network"))
    result = {
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "clips_per_second": round(len(clips) / ours, 2),
        "network_clips_per_second": round(len(clips) / network, 2),
        "frontend_fraction": round(1 - network / ours, 3),
        "peak_host_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "size": options.size,
        "batch": options.batch,
        "device": str(runtime.device),
    }
    if runtime.device.type == "cuda":
        result["peak_device_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return result


def time_epochs(ways, runtime, rounds, first_seconds=None):
    """{name: seconds of an epoch, one per round} of ways that take turns.

    Before them each has an epoch that warms everything up, whose seconds go to `first_seconds`.
    """
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way.epoch(number)
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - started
            print(f"round {number}: {name} {taken:.2f} s", flush=True)
            if number:
                seconds[name].append(taken)
            elif first_seconds is not None:
                first_seconds[name] = round(taken, 2)
    return seconds


def measures(settings, runtime, options):
    """What each measure does to the network's own rate, and torch.compile would do to it.

    `first_seconds` is each way's first epoch, in which cuDNN tries its algorithms for each
    convolution and batch size, and torch.compile compiles.
    """
    clips = pd.DataFrame({"target": [i % len(GENRES) for i in range(options.clips)]})
    clips["clip"] = clips.index.map("clip_{}".format)
    ways = {"as it is": NetworkOnly(clips, settings, runtime)}
    undone = ["channels last", "frozen without activations"]
    if not ways["as it is"].trainer.scaler.is_enabled():  # which works with a fused optimiser alone
        undone.append("fused optimiser")
    if runtime.device.type == "cuda":
        undone.append("autocast")
    for measure in undone:
        ways[f"no {measure}"] = NetworkOnly(clips, settings, runtime, without=measure)
    compiled = settings.train.model_copy(update={"compile": True})
    ways["compiled"] = NetworkOnly(clips, settings.model_copy(update={"train": compiled}), runtime)
    first_seconds = {}
    result = ratios_to("as it is", ways, runtime, options, first_seconds)
    return result | {"first_seconds": first_seconds}


def levers(overrides, settings, runtime, folder, options):
    """What each lever, and all of the augmentation's together, cost an epoch."""
    cache = StemCache(folder / "separated", model="synthesised", sample_rate=settings.features.sr)
    clips = make_clips(cache, folder, options.clips, settings.features)
    words = {name: [f"{name}={value}"] for name, value in LEVERS.items()}
    words["all"] = [word for lever in words.values() for word in lever]
    words["EMA_DECAY"] = ["EMA_DECAY=0.99"]
    ways = {"as it is": OurRecipe(clips, cache, settings, runtime)}
    for name, lever in words.items():
        ways[name] = OurRecipe(clips, cache, load_settings([*overrides, *lever]), runtime)
    return ratios_to("as it is", ways, runtime, options)


def ratios_to(base, ways, runtime, options, first_seconds=None):
    """The figures of an epoch of each of `ways` over that of the way `base`; see time_epochs()."""
    seconds = time_epochs(ways, runtime, options.rounds, first_seconds)
    ratios = {
        name: [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
        for name in ways
        if name != base
    }
    return {
        "ratio": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "ratio_min": {name: round(min(found), 3) for name, found in ratios.items()},
        "ratio_max": {name: round(max(found), 3) for name, found in ratios.items()},
        "size": options.size,
        "batch": options.batch,
        "device": str(runtime.device),
    }


def make_clips(cache, folder, count, features):
    """A table of clips with stems in the cache: a few renderings, each under several names."""
    rows = []
    source = folder / "source"
    source.write_bytes(b"")
    for number in range(count):
        genre = number % len(GENRES)
        if number < len(GENRES):
            stems = render(
                GENRES[genre], seed=number, seconds=features.clip_seconds, sr=features.sr
            )
            cache.write(f"clip_{number}", stems, source)
        else:
            cache.path(f"clip_{number}").hardlink_to(cache.path(f"clip_{genre}"))
        rows.append({"clip": f"clip_{number}", "target": genre})
    return pd.DataFrame(rows)


class OurRecipe:
    """The epoch of train.py."""

    def __init__(self, clips, cache, settings, runtime):
        threads = thread_count(settings.machine)
        loader = StemLoader(
            cache, threads=threads, device=runtime.device,
            device_cache=settings.machine.device_cache,
        )  # fmt: skip
        frontend = Frontend(settings.features, device=runtime.device, channel_stats=CHANNEL_STATS)
        self.trainer = make_trainer(frontend, loader, clips, settings, runtime)

    def epoch(self, number):
        train_epoch(self.trainer, number)


class NetworkOnly:
    """The same optimiser steps as OurRecipe's, on random images; `without` undoes a measure.

    It stands for the frontend and the loader of its own trainer.
    """

    def __init__(self, clips, settings, runtime, *, without=None):
        self.trainer = make_trainer(self, self, clips, settings, runtime)
        channels = len(settings.features.channel_names)
        shape = (settings.train.batch_size, channels, *settings.features.image_size)
        self.images = torch.randn(shape, device=runtime.device)
        if without == "channels last":
            self.trainer.net.to(memory_format=torch.contiguous_format)
            self.trainer.net.register_forward_pre_hook(lambda net, images: images[0].contiguous())
        elif without == "frozen without activations":
            forward = types.MethodType(forward_keeping_activations, self.trainer.net)
            self.trainer.net.forward = forward
        elif without == "fused optimiser":
            self.trainer.optimizer.param_groups[0]["fused"] = None
        elif without == "autocast":
            self.trainer.amp_dtype = None

    def batches(self, clips, batches, *, section, prepare=None):
        images = self.images.to(memory_format=torch.channels_last).split(1)  # as prepare() gives
        return ((positions, list(images[: len(positions)])) for positions in batches)

    def drop_gpu_cache(self):
        return False

    def __call__(self, stems, params):
        return self.images[: len(stems)]

    def epoch(self, number):
        train_epoch(self.trainer, number)


def make_trainer(frontend, loader, clips, settings, runtime):
    """A Trainer of a new network on `clips`."""
    net = build_model(settings.model, num_classes=len(GENRES), seed=0)
    return Trainer(
        net, frontend, loader, train_clips=clips, valid_clips=clips, label_names=GENRES,
        label_ids=list(range(len(GENRES))), settings=settings, runtime=runtime, run_signature={},
    )  # fmt: skip


def train_epoch(trainer, number):
    """The optimiser steps of an epoch, without what follows it."""
    trainer.state = TrainState(epoch=number)
    trainer.train_epoch()


def forward_keeping_activations(net, images):
    """GenreNet.forward with gradients through the frozen stages too, as without no_grad."""
    for parameter in net.parameters():
        parameter.requires_grad_()
    return net.classifier(net.avgpool(net.features(images)).flatten(1))


class PlainRecipe:
    """Augmentation by librosa in a DataLoader's workers; NCHW; fp16 autocast on CUDA."""

    def __init__(self, clips, cache, settings, runtime, workers):
        self.settings, self.runtime = settings, runtime
        self.net = build_model(settings.model, num_classes=len(GENRES), seed=0).to(runtime.device)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.net.parameters() if parameter.requires_grad], lr=2e-4
        )
        self.half = torch.float16 if runtime.device.type == "cuda" else None
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=bool(self.half))
        self.dataset = PlainDataset(clips, cache, settings)
        self.loader = torch.utils.data.DataLoader(
            self.dataset, batch_size=settings.train.batch_size, shuffle=True, num_workers=workers,
            persistent_workers=True, pin_memory=runtime.device.type == "cuda",
        )  # fmt: skip

    def epoch(self, number):
        self.net.train()
        total = 0.0
        for images, targets in self.loader:
            images, targets = images.to(self.runtime.device), targets.to(self.runtime.device)
            self.optimizer.zero_grad()
            with autocast(self.runtime.device, self.half):
                loss = torch.nn.functional.cross_entropy(self.net(images), targets)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss.item()


class PlainDataset(torch.utils.data.Dataset):
    """Images as the plain recipe makes them, with the same augmentation."""

    def __init__(self, clips, cache, settings):
        self.clips, self.cache, self.settings = clips, cache, settings

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        features = self.settings.features
        params = sample_params(self.settings.augment, seed=0, epoch=0, clip_index=i)
        channels = []
        for stem in self.cache.read(self.clips["clip"][i]).astype(np.float32):
            if params.rate != 1:
                stem = librosa.effects.time_stretch(stem, rate=params.rate)
            if params.semitones:
                stem = librosa.effects.pitch_shift(stem, sr=features.sr, n_steps=params.semitones)
            if (sigma := stem.std() * 10 ** (-params.noise_db / 20)) > 0:
                noise = np.random.default_rng(i).normal(0, sigma, len(stem))
                stem = stem + noise.astype(np.float32)
            stem = librosa.util.fix_length(stem, size=int(features.clip_seconds * features.sr))
            power = librosa.feature.melspectrogram(y=stem, sr=features.sr)
            channels.append((librosa.power_to_db(power, ref=np.max) + 45) / 20)
        image = torch.from_numpy(np.stack(channels).astype(np.float32))
        size = features.image_size
        image = torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)
        return image[0], int(self.clips["target"][i])


if __name__ == "__main__":
    main()
