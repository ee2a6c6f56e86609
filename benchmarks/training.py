"""An epoch of training: the plain recipe against this one, and the network's own rate.

    python benchmarks/training.py [--clips 48] [--size 300] [--rounds 3] [--device cpu] [--quick]
    python benchmarks/training.py --measures [...]

The plain recipe is what most pipelines do: librosa's time stretch, pitch shift and mel spectrogram
per stem in a torch DataLoader's workers, float32 images in NCHW through the same network with the
same frozen stages and AdamW, fp16 autocast with a GradScaler on CUDA. This recipe is stemgenre's
Trainer as train.py runs it. `network_clips_per_second` is that of the same steps on ready-made
random images of the same shape. The three run in turn, several times, on the same stems and with
the same draws. `front_end_share` is what of an epoch is not the network. The last line is one JSON
object.

With --measures, the network's own steps are timed with each of its measures undone in turn, and
compiled: `ratio` is that way's time over the time as it is, so above 1 the measure pays. Seen on
two CPU cores with --clips 16 --batch 8 --size 300 --rounds 2: without channels last 1.47 times the
time (1.43 to 1.51), with the frozen stages' activations and gradients 2.29 (2.20 to 2.38), without
the fused optimiser 1.00 (0.97 to 1.04; it is for cards), compiled 0.95 (0.93 to 0.97). No card was
at hand.
"""

import argparse
import dataclasses
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

import config
from stemgenre import runtime
from stemgenre.augmentation import draw
from stemgenre.band import GENRES, render
from stemgenre.cache import StemCache
from stemgenre.dataset import StemReader, epoch_batches
from stemgenre.frontend import FrontEnd
from stemgenre.inference import autocast
from stemgenre.model import build_model
from stemgenre.settings import load_settings
from stemgenre.trainer import Trainer

CHANNELS = ([-45.0] * 4, [20.0] * 4)  # dB, near enough for a timing


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
    options = parser.parse_args()
    if options.quick:
        options.clips, options.rounds, options.batch = 24, 2, 8
    with tempfile.TemporaryDirectory() as folder:
        knobs = [f"OUTPUT_DIR={folder}", f"DEVICE={options.device}", "PRETRAINED=False"]
        knobs += [f"IMG_SIZE={options.size}", f"BATCH_SIZE={options.batch}"]
        settings = load_settings(config, knobs)
        with runtime.start(settings.machine) as run:
            result = (
                measures(settings, run, options)
                if options.measures
                else compare(settings, run, Path(folder), options)
            )
            print(json.dumps(result))


def compare(settings, run, folder, options):
    """The figures of the three ways over several rounds."""
    cache = StemCache(folder / "separated", model="band", sample_rate=settings.features.sr)
    clips = make_clips(cache, folder, options.clips, settings.features)
    ways = {
        "plain": PlainRecipe(clips, cache, settings, run, options.workers),
        "ours": OurRecipe(clips, cache, settings, run),
        "network": NetworkOnly(clips, settings, run),
    }
    seconds = time_epochs(ways, run, options.rounds)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    ours, network = (statistics.median(seconds[name]) for name in ("ours", "network"))
    result = {
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "clips_per_second": round(len(clips) / ours, 2),
        "network_clips_per_second": round(len(clips) / network, 2),
        "front_end_share": round(1 - network / ours, 3),
        "peak_host_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "size": options.size,
        "batch": options.batch,
        "device": str(run.device),
    }
    if run.device.type == "cuda":
        result["peak_device_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return result


def time_epochs(ways, run, rounds):
    """{name: seconds of an epoch, one per round} of ways that take turns."""
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way.epoch(number)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - started
            print(f"round {number}: {name} {taken:.2f} s", flush=True)
            if number:  # the first round warms everything up, and compiles
                seconds[name].append(taken)
    return seconds


def measures(settings, run, options):
    """What each measure does to the network's own rate, and torch.compile would do to it."""
    clips = pd.DataFrame({"target": [i % len(GENRES) for i in range(options.clips)]})
    clips["clip"] = clips.index.map("clip_{}".format)
    ways = {"as it is": NetworkOnly(clips, settings, run)}
    for measure in ("channels last", "frozen without activations", "fused optimiser", "autocast"):
        ways[f"no {measure}"] = NetworkOnly(clips, settings, run, without=measure)
    if run.device.type != "cuda":
        del ways["no autocast"]  # there is none
    compiled = dataclasses.replace(settings.train, compile=True)
    ways["compiled"] = NetworkOnly(clips, dataclasses.replace(settings, train=compiled), run)
    seconds = time_epochs(ways, run, options.rounds)
    ratios = {
        name: [a / b for a, b in zip(seconds[name], seconds["as it is"], strict=True)]
        for name in ways
        if name != "as it is"
    }
    return {
        "ratio": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "ratio_min": {name: round(min(found), 3) for name, found in ratios.items()},
        "ratio_max": {name: round(max(found), 3) for name, found in ratios.items()},
        "size": options.size,
        "batch": options.batch,
        "device": str(run.device),
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

    def __init__(self, clips, cache, settings, run):
        threads = runtime.worker_count(settings.machine)
        reader = StemReader(
            cache, settings.features, settings.augment,
            threads=threads, device=run.device, device_cache=settings.machine.device_cache,
        )  # fmt: skip
        front_end = FrontEnd(settings.features, device=run.device, channels=CHANNELS)
        net = build_model(settings.model, num_classes=len(GENRES), seed=0)
        self.trainer = Trainer(net, front_end, reader, clips, clips, settings, run, identity={})

    def epoch(self, number):
        self.trainer.progress.epoch, self.trainer.progress.step = number, 0
        self.trainer.progress.sums = {}
        self.trainer._train_epoch()


class NetworkOnly:
    """The same optimiser steps as OurRecipe's, on ready-made images; `without` undoes a measure."""

    def __init__(self, clips, settings, run, *, without=None):
        self.clips, self.settings, self.run = clips, settings, run
        net = build_model(settings.model, num_classes=len(GENRES), seed=0)
        self.trainer = Trainer(net, self, None, clips, clips, settings, run, identity={})
        shape = (settings.train.batch_size, 4, *[settings.features.img_size] * 2)
        self.images = torch.randn(shape, device=run.device)
        learner = self.trainer.learner
        if without == "channels last":
            learner.net.to(memory_format=torch.contiguous_format)
            learner.net.register_forward_pre_hook(lambda net, images: images[0].contiguous())
        elif without == "frozen without activations":
            learner.net.forward = types.MethodType(forward_keeping_activations, learner.net)
        elif without == "fused optimiser":
            learner.optimizer.param_groups[0]["fused"] = None
        elif without == "autocast":
            learner.amp_type = None

    def __call__(self, stems, draws):
        return self.images[: len(stems)]

    def epoch(self, number):
        self.trainer.model.train()
        total = torch.zeros(3, device=self.run.device)
        size = self.settings.train.batch_size
        for batch in epoch_batches(self.clips, batch_size=size, seed=0, epoch=number):
            *results, _ = self.trainer._step(batch, [None] * len(batch), len(batch))
            total += torch.stack(results)
        total.tolist()


def forward_keeping_activations(net, images):
    """GenreNet.forward with gradients through the frozen stages too, as without no_grad."""
    for parameter in net.parameters():
        parameter.requires_grad_()
    return net.classifier(net.avgpool(net.features(images)).flatten(1))


class PlainRecipe:
    """Augmentation by librosa in a DataLoader's workers; NCHW; fp16 autocast on CUDA."""

    def __init__(self, clips, cache, settings, run, workers):
        self.settings, self.run = settings, run
        self.net = build_model(settings.model, num_classes=len(GENRES), seed=0).to(run.device)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.net.parameters() if parameter.requires_grad], lr=2e-4
        )
        self.half = torch.float16 if run.device.type == "cuda" else None
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=bool(self.half))
        self.dataset = PlainDataset(clips, cache, settings)
        self.loader = torch.utils.data.DataLoader(
            self.dataset, batch_size=settings.train.batch_size, shuffle=True, num_workers=workers,
            persistent_workers=True, pin_memory=run.device.type == "cuda",
        )  # fmt: skip

    def epoch(self, number):
        self.net.train()
        total = 0.0
        for images, targets in self.loader:
            images, targets = images.to(self.run.device), targets.to(self.run.device)
            self.optimizer.zero_grad()
            with autocast(self.run.device, self.half):
                loss = torch.nn.functional.cross_entropy(self.net(images), targets)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss.item()


class PlainDataset(torch.utils.data.Dataset):
    """Images as the plain recipe makes them, with the same draws."""

    def __init__(self, clips, cache, settings):
        self.clips, self.cache, self.settings = clips, cache, settings

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        features = self.settings.features
        one = draw(self.settings.augment, seed=0, epoch=0, clip_index=i)
        channels = []
        for stem in self.cache.read(self.clips["clip"][i]).astype(np.float32):
            if one.rate != 1:
                stem = librosa.effects.time_stretch(stem, rate=one.rate)
            if one.semitones:
                stem = librosa.effects.pitch_shift(stem, sr=features.sr, n_steps=one.semitones)
            if one.noise_sigma:
                noise = np.random.default_rng(i).normal(0, one.noise_sigma, len(stem))
                stem = stem + noise.astype(np.float32)
            stem = librosa.util.fix_length(stem, size=int(features.clip_seconds * features.sr))
            power = librosa.feature.melspectrogram(y=stem, sr=features.sr)
            channels.append((librosa.power_to_db(power, ref=np.max) + 45) / 20)
        image = torch.from_numpy(np.stack(channels).astype(np.float32))
        size = (features.img_size, features.img_size)
        image = torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)
        return image[0], int(self.clips["target"][i])


if __name__ == "__main__":
    main()
