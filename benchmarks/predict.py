"""Memory of predict.py against the length of a file.

    python benchmarks/predict.py [FILE ...] [--minutes 1 3 10 30] [--quick]
    python benchmarks/predict.py song.ogg --model runs/demo/best_model.pth --repo data/models

Runs predict.py in a process of its own for a file of each length, synthesised music in 44.1 kHz
stereo, and for each FILE as it is. Without --model the network is of full size with random
weights; without --repo the HTDemucs is a tiny one: another one adds its own memory to every
figure. What one chunk takes is reached after about two minutes, so the shortest file can need less.
The figures are the processes' peaks in RAM as Linux counts them, libraries included; a whole
song's stems would add 42 MB a minute (float32, 44.1 kHz, mono) if they were held. The last line is
one JSON object: peak megabytes of each file, and of the longest length over the others.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import soundfile
import torch
from separation import TINY, save_network

from stemgenre.demo.synth import GENRES, render
from stemgenre.features.log_mel import Frontend
from stemgenre.settings import FeatureSettings
from stemgenre.training import checkpoint
from stemgenre.training.model import GenreNet

PREDICT = Path(__file__).parents[1] / "predict.py"
SR = 44100  # Hz, of the files
# A process inherits its parent's peak until it has one of its own: this one is a small parent.
PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="further audio files")
    parser.add_argument("--minutes", nargs="+", type=float, default=[1, 3, 10, 30])
    parser.add_argument("--model", type=Path, help="a best_model.pth")
    parser.add_argument("--repo", type=Path, help="SEPARATION_REPO")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="0.5 and 2 minutes, images of 64 px")
    options = parser.parse_args()
    if options.quick:
        options.minutes = [0.5, 2]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_network(folder, TINY)
        save_model(folder / "model.pth", size=64 if options.quick else 600)
        settings = [f"SEPARATION_REPO={options.repo or folder}", f"DEVICE={options.device}"]
        words = ["--model", options.model or folder / "model.pth", *settings]
        peaks = {}
        for minutes in options.minutes:
            path = folder / f"{minutes:g} minutes.wav"
            write_music(path, minutes)
            peaks[minutes] = peak_megabytes(path, words)
            path.unlink()
        files = {path.name: peak_megabytes(path, words) for path in options.files}
    longest = peaks[max(peaks)]
    result = {
        "peak_megabytes": {f"{minutes:g}": round(peak) for minutes, peak in peaks.items()},
        "longest_over": {f"{minutes:g}": round(longest / p, 3) for minutes, p in peaks.items()},
        "files": {name: round(peak) for name, peak in files.items()},
        "device": options.device,
    }
    print(json.dumps(result))


def save_model(path, *, size):
    """A best_model.pth of random weights for images of `size` pixels."""
    torch.manual_seed(0)
    frontend = Frontend(
        FeatureSettings.from_config(img_size=size),
        device=torch.device("cpu"),
        channel_stats=([-45.0] * 4, [20.0] * 4),
    )
    content = {"weights": GenreNet(len(GENRES)).state_dict(), "epoch": 1, "valid_accuracy": 0.1}
    labels = {"label_ids": list(range(len(GENRES))), "label_names": list(GENRES)}
    checkpoint.save(path, "model", {**content, **labels, **frontend.state()})


def write_music(path, minutes):
    """A stereo file of synthesised music, another genre every half minute."""
    left = round(minutes * 60 * SR)
    parts = [render(genre, seed=1, seconds=30, sr=SR).sum(0) for genre in GENRES[:4]]
    with soundfile.SoundFile(path, "w", SR, channels=2, subtype="PCM_16") as file:
        while left > 0:
            for part in parts:
                part = part[: max(0, left)]
                file.write(np.stack([part, 0.8 * part], axis=1))
                left -= len(part)


def peak_megabytes(path, words):
    """Peak memory of predict.py for the file at `path`, in MB."""
    command = [sys.executable, "-c", PEAK, sys.executable, PREDICT, path, *words]
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
    peak = int(done.stdout) * 1024 / 1e6
    print(f"{path.name}: {peak:.0f} MB, {time.perf_counter() - started:.0f} s", flush=True)
    return peak


if __name__ == "__main__":
    main()
