"""A training step on the CPU: with train.py's memory and thread settings, and with the defaults.

    python benchmarks/cpu.py [--size 300] [--rounds 3] [--busy]

Each figure is the median step of a process of its own; `--busy` runs a second such process at the
same time. The last line is one JSON object: seconds per image, and the ratios to the defaults.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAYS = {  # name -> (environment, whether malloc keeps what is freed)
    "defaults": ({}, False),
    "spin": ({"GOMP_SPINCOUNT": "1000"}, False),
    "spin and malloc": ({"GOMP_SPINCOUNT": "1000"}, True),
    "never spin, malloc": ({"GOMP_SPINCOUNT": "0"}, True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=300, help="IMG_SIZE")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--busy", action="store_true", help="run a second such process at the same time"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(step_seconds(options) / options.batch)
        return
    seconds = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            seconds[name].append(run_one(options, *way))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        ratio = medians["defaults"] / value
        print(f"{name:20} {value:.4f} s per image, {ratio:.2f} times as fast as the defaults")
    print(json.dumps({"seconds_per_image": medians, "size": options.size, "busy": options.busy}))


def run_one(options, environment, keep):
    """Seconds per image in a process of its own."""
    command = [sys.executable, __file__, "--one", "--size", options.size, "--batch", options.batch]
    command = [str(part) for part in command] + ["--keep"] * keep
    processes = [
        subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        for _ in range(1 + options.busy)
    ]
    return statistics.mean(float(process.communicate()[0]) for process in processes)


def step_seconds(options):
    """The median of eight training steps of the network of train.py."""
    sys.path.insert(0, str(ROOT))
    import torch

    from stemgenre.runtime import keep_freed_memory
    from stemgenre.settings import ModelSettings
    from stemgenre.training.model import build_model

    if options.keep:
        keep_freed_memory()
    net = build_model(ModelSettings.from_config(pretrained=False), num_classes=10, seed=0)
    net = net.to(memory_format=torch.channels_last).train()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    images = torch.randn(options.batch, 4, options.size, options.size)
    images = images.to(memory_format=torch.channels_last)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
