"""Where the time of a training step and of a batch of separation goes: operations, and bytes.

    python benchmarks/operations.py [--size 600] [--batch 24] [--device auto] [--quick]

Of each: `seconds` of one, `device_fraction` (of them, what the device spent in kernels: the rest it
waited for the host), `operations` (the share of the ten largest in the kernels' time, by PyTorch's
profiler) and `teraflops` (a second, by PyTorch's counter: convolutions and matrix products).
`bandwidth_fraction` compares with the memory's limit: the bytes that all operations take and give,
each tensor once, per second of kernels, over those of a large copy. A CPU's kernels are its
operations; those in other threads, as the front end's, are not among them. The last line is one
JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does
sys.path.insert(0, str(Path(__file__).parents[1]))
import separation
import torch
import training
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stemgenre.runtime import start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.separation.demucs_model import Separator
from stemgenre.settings import load_settings

REPEATS = 3
GPU_STEPS = 6  # of an epoch: the host works ahead of a GPU, but not before the first one
LARGEST = 10  # operations that are named
COPIED_BYTES = 2**30  # of the copy that gives the memory's limit


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=600, help="IMG_SIZE")
    parser.add_argument("--batch", type=int, default=24, help="BATCH_SIZE")
    parser.add_argument("--clips", type=int, default=32, help="of separation, at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: its figures say nothing")
    options = parser.parse_args()
    if options.quick:
        options.size, options.batch, options.clips = 64, 2, 2
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings([
            f"IMG_SIZE={options.size}", f"BATCH_SIZE={options.batch}", "PRETRAINED=False",
            f"DEVICE={options.device}", f"SEPARATION_REPO={folder}", f"OUTPUT_DIR={folder}",
        ])  # fmt: skip
        separation.save_network(
            Path(folder), separation.TINY if options.quick else separation.FULL_SIZE
        )
        with start_runtime(settings.machine) as runtime:
            cache = StemCache(
                Path(folder) / "stems", model="synthesised", sample_rate=settings.features.sr
            )
            count = options.batch * steps_on(runtime.device)
            clips = training.make_clips(cache, Path(folder), count, settings.features)
            result = {"training": of_training(clips, cache, settings, runtime)}
            result["separation"] = of_separation(options.clips, settings, runtime)
        print(json.dumps(result))


def steps_on(device):
    """Steps of the epoch that is looked at."""
    return GPU_STEPS if device.type == "cuda" else 1


def of_training(clips, cache, settings, runtime):
    """The figures of a step of an epoch, its images included."""
    steps = steps_on(runtime.device)
    clips = clips[: steps * settings.train.batch_size]
    ours = training.OurRecipe(clips, cache, settings, runtime)
    return figures(lambda: ours.epoch(0), runtime.device, parts=steps)


def of_separation(clips, settings, runtime):
    """The figures of separating so many clips of noise at once."""
    separator = Separator(
        settings.separation, sample_rate=settings.features.sr, device=runtime.device
    )
    generator = torch.Generator().manual_seed(0)
    samples = round(settings.features.clip_seconds * separator.model.samplerate)
    waves = [torch.randn(2, samples, generator=generator) / 10 for _ in range(clips)]
    separator.micro_batch.size = clips
    return figures(lambda: separator(waves), runtime.device)


def figures(action, device, *, parts=1):
    """What of one of an action's `parts` this benchmark says; see the module's docstring."""
    seconds = statistics.median([timed(action, device) for _ in range(1 + REPEATS)][1:])
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        timed(action, device)
    kernels = kernel_seconds(profiler, device)
    busy = sum(kernels.values())
    with ByteCounter() as counter:
        action()
    with FlopCounterMode(display=False) as flops:
        action()
    largest = sorted(kernels, key=kernels.get, reverse=True)[:LARGEST]
    return {
        "seconds": round(seconds / parts, 4),
        "device_fraction": round(busy / seconds, 3),
        "bandwidth_fraction": round(counter.bytes / busy / copied_bytes_per_second(device), 3),
        "gigabytes": round(counter.bytes / parts / 1e9, 2),
        "teraflops": round(flops.get_total_flops() / seconds / 1e12, 3),
        "operations": {name: round(kernels[name] / busy, 3) for name in largest},
    }


def timed(action, device):
    """Seconds of an action, until the device has done it."""
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def kernel_seconds(profiler, device):
    """{operation: seconds of its kernels} of a profile; on a CPU, of the operation itself."""
    on_gpu = device.type == "cuda"
    return {
        row.key: (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1e6
        for row in profiler.key_averages()
        if row.device_type == DeviceType.CPU and row.key.startswith("aten::")
    }


class ByteCounter(TorchDispatchMode):
    """Counts in `bytes` those of the tensors that operations take and give, views excepted."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view and "empty" not in str(function):
            taken = [*args, *(value for name, value in kwargs.items() if name != "out")]
            for tensors in (taken, result):
                once = {id(leaf): leaf for leaf in tree_leaves(tensors) if torch.is_tensor(leaf)}
                for tensor in once.values():
                    held = tensor.numel() * tensor.element_size()  # an expanded one has less:
                    self.bytes += min(held, tensor.untyped_storage().nbytes())
        return result


def copied_bytes_per_second(device):
    """Bytes read and written per second by a large copy on the device."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(1 + REPEATS)]
    return 2 * COPIED_BYTES / min(seconds)


if __name__ == "__main__":
    main()
