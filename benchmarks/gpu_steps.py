"""The steps of gpu.py, each to be run as a process of its own.

    python benchmarks/gpu_steps.py STEP --folder FOLDER [--device cuda] [--quick]

`prepare` writes to FOLDER what the others read. The last line is one JSON object, the step's
figures; `warnings` are those that the project logged.
"""

import argparse
import concurrent.futures
import contextlib
import json
import logging
import math
import multiprocessing
import os
import signal
import statistics
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does
sys.path.insert(0, str(Path(__file__).parents[1]))
import competition
import frontend
import gpu
import numpy as np
import operations
import pandas as pd
import separation
import torch
import training

import train
from stemgenre import cli
from stemgenre.demo import demo
from stemgenre.errors import Interrupted
from stemgenre.features.augmentation import sample_params
from stemgenre.runtime import (
    MicroBatch,
    describe_device,
    pick_device,
    start_runtime,
    thread_count,
)
from stemgenre.separation.cache import StemCache
from stemgenre.separation.demucs_model import Separator
from stemgenre.separation.separate import read_chunks
from stemgenre.settings import load_settings
from stemgenre.training import checkpoint
from stemgenre.training.inference import amp_type, compute_logits
from stemgenre.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
TARGET_CLIPS, TARGET_EPOCHS = 1000, 50  # of the competition that is extrapolated to
EPOCH_CLIPS = 900  # of the epoch whose seconds are given


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    image: int = 600  # IMG_SIZE
    batch: int = 24  # BATCH_SIZE
    seconds: float = 30.0  # CLIP_SECONDS
    rounds: int = 5  # of the epochs that are timed
    stems: int = 480  # clips with stems in the cache: twenty batches
    separated: int = 128  # clips for separation: four batches
    plainly: int = 16  # of them, by the plain recipe, a second each
    competition: int = 214  # clips, 96 of them for training: four batches
    epochs: int = 4  # of the competition
    demo: int = 4  # training clips per genre
    demucs: dict = field(default_factory=lambda: separation.FULL_SIZE)  # HTDemucs' arguments


FULL = Sizes()
QUICK = Sizes(
    image=64, batch=4, seconds=1.0, rounds=1, stems=8, separated=4, plainly=2, competition=40,
    epochs=2, demo=2,
    demucs=separation.TINY | {"segment": 2, "dconv_mode": 0},
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=FUNCTIONS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    cli.log_to_console()
    warnings = Warnings()
    logging.getLogger("stemgenre").addHandler(warnings)
    figures = FUNCTIONS[options.step](
        options.folder, QUICK if options.quick else FULL, options.device
    )
    print(
        json.dumps(figures | ({"warnings": warnings.texts} if warnings.texts else {})), flush=True
    )


class Warnings(logging.Handler):
    """Keeps the beginnings of warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage()[:200])


def prepare(folder, sizes, device):
    """Writes clips, stems, the demo and the network of Demucs; says what the device is."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        jobs = [pool.submit(job, folder, sizes) for job in (put_competition, put_stems, put_demo)]
        for job in jobs:
            job.result()
    device = pick_device(device)
    return {
        "cuda": device.type == "cuda",
        "device": describe_device(device),
        "torch": torch.__version__,
        "bf16": str(amp_type(device, use_amp=True)) == "torch.bfloat16",
    }


def put_competition(folder, sizes):
    folder = folder / "competition"
    folder.mkdir()
    separation.save_network(folder, sizes.demucs)
    competition.RENDERED = 10  # different clips of either kind, the others are links
    options = types.SimpleNamespace(clips=sizes.competition, seconds=sizes.seconds)
    competition.write_competition(folder / "data", options)


def put_stems(folder, sizes):
    settings = sized_settings(folder, sizes, "cpu")
    cache = StemCache(folder / "stems", model="synthesised", sample_rate=settings.features.sr)
    clips = training.make_clips(cache, folder, sizes.stems, settings.features)
    clips.to_csv(folder / "stems.csv", index=False)


def put_demo(folder, sizes):
    settings = demo_settings(folder, "cpu")
    cache = StemCache(settings.cache_folder, model="synthesised", sample_rate=settings.features.sr)
    demo.write_demo(
        settings.paths.data_dir, seed=0, train_per_genre=sizes.demo, test_per_genre=1,
        seconds=settings.features.clip_seconds, sr=settings.features.sr, cache=cache,
    )  # fmt: skip


def sized_settings(folder, sizes, device, *words):
    """Settings of training and separation at these sizes."""
    return load_settings([
        f"IMG_SIZE={sizes.image}", f"BATCH_SIZE={sizes.batch}", f"CLIP_SECONDS={sizes.seconds}",
        f"SEPARATION_REPO={folder / 'competition'}", f"DEVICE={device}", "PRETRAINED=False",
        f"OUTPUT_DIR={folder / 'out'}", *words,
    ])  # fmt: skip


def demo_words(folder, device):
    return [
        str(ROOT / "recipes" / "demo.py"), f"DATA_DIR={folder / 'demo'}", "EPOCHS=3",
        "BATCH_SIZE=4", "CLIP_SECONDS=3", f"DEVICE={device}",
    ]  # fmt: skip


def demo_settings(folder, device, *words):
    """Settings of a short run on the small demo."""
    return load_settings([*demo_words(folder, device), *words])


def cached_stems(folder, settings):
    """(table of clips, StemCache) that prepare() wrote."""
    cache = StemCache(folder / "stems", model="synthesised", sample_rate=settings.features.sr)
    return pd.read_csv(folder / "stems.csv"), cache


def demo_in(precision):
    """A step: the demo in a precision, whole, and interrupted in an epoch and resumed."""

    def step(folder, sizes, device):
        with_amp = amp_type(pick_device(device), use_amp=True)
        if precision == "bfloat16" and with_amp != torch.bfloat16:
            return {"precision": f"not tried: this GPU computes in {with_amp}"}
        if precision == "float16":  # also where the GPU has bf16
            torch.cuda.is_bf16_supported = lambda *arguments, **options: False
        words = [f"USE_AMP={precision != 'float32'}"]
        out = {name: folder / precision / name for name in ("whole", "resumed")}
        run_demo(folder, device, out["whole"], *words)
        Trainer.on_step = interrupt_in_epoch_2
        with contextlib.suppress(Interrupted):
            run_demo(folder, device, out["resumed"], *words)
            raise AssertionError("the run was not interrupted")
        Trainer.on_step = lambda trainer, step: None
        dtype = run_demo(folder, device, out["resumed"], *words, "RESUME_FROM_CHECKPOINT=True")
        whole, resumed = (
            checkpoint.load(path / "checkpoint.pth", "checkpoint") for path in out.values()
        )
        rows = whole["train_state"]["history"]
        assert len(rows) == len(resumed["train_state"]["history"]), "an epoch is missing"
        assert dtype == precision, f"computed in {dtype}"
        return {
            "precision": dtype,
            "train_loss": [round(row["train_loss"], 4) for row in rows],
            "last_epoch_seconds": round(rows[-1]["seconds"], 2),
            "resumed_weights_difference": relative_difference(whole["weights"], resumed["weights"]),
            "submit_equal": len({(path / "submit.csv").read_bytes() for path in out.values()}) == 1,
        }

    return step


def run_demo(folder, device, out, *words):
    """Runs train.py on the small demo; returns the name of the type it computed in."""
    settings = demo_settings(folder, device, f"OUTPUT_DIR={out}", *words)
    with start_runtime(settings.machine) as runtime:
        train.run_competition(settings, runtime)
        dtype = amp_type(runtime.device, settings.train.use_amp)
        return str(dtype or torch.float32).removeprefix("torch.")


def interrupt_in_epoch_2(trainer, step):
    """Trainer.on_step: a request to stop, as Ctrl-C makes it."""
    if trainer.state.epoch == 1 and step == 1:
        trainer.runtime.stop.signal_number = signal.SIGINT


def relative_difference(one, other):
    """Norm of the difference of two state_dicts' tensors, over the first one's norm."""
    weights, others = (
        torch.cat([t.flatten() for t in state.values() if t.is_floating_point()])
        for state in (one, other)
    )
    return float((weights - others).norm() / weights.norm())


def rates(folder, sizes, device):
    """Clips per second of the front end, the network and the epoch."""
    settings = sized_settings(folder, sizes, device)
    with start_runtime(settings.machine) as runtime:
        clips, cache = cached_stems(folder, settings)
        ways = {
            "network": training.NetworkOnly(clips, settings, runtime),
            "ours": training.OurRecipe(clips, cache, settings, runtime),
        }
        training.time_epochs(ways, runtime, 0)  # a warm-up
        seconds = training.time_epochs(ways, runtime, sizes.rounds)
        trainer = ways["ours"].trainer
        stems = [trainer.loader.read(clip) for clip in clips["clip"][: sizes.batch]]
        params = [
            sample_params(settings.augment, seed=0, epoch=0, clip_index=i)
            for i in range(len(stems))
        ]
        trainer.frontend(stems, params)
        _, frontend_seconds, _ = frontend.timed(lambda: trainer.frontend(stems, params))
        network, ours = (statistics.median(seconds[name]) for name in ways)
        fractions = [a / b for a, b in zip(seconds["network"], seconds["ours"], strict=True)]
        return {
            "network_fraction": round(statistics.median(fractions), 3),
            "network_fraction_min": round(min(fractions), 3),
            "clips_per_second": round(len(clips) / ours, 1),
            "network_clips_per_second": round(len(clips) / network, 1),
            "frontend_clips_per_second": round(len(stems) / frontend_seconds, 1),
            f"epoch_of_{EPOCH_CLIPS}_seconds": round(EPOCH_CLIPS * ours / len(clips), 2),
            "size": sizes.image,
            "batch": sizes.batch,
        }


def separation_rates(folder, sizes, device):
    """benchmarks/separation.py once: the plain recipe against the pipeline."""
    folder = folder / "competition"
    options = types.SimpleNamespace(
        data=folder / "data", folder=folder, clips=sizes.separated, plainly=sizes.plainly,
        rounds=1, device=device,
    )  # fmt: skip
    return separation.compare(separation.find_clips(options), options)


def whole_competition(folder, sizes, device):
    """Seconds of train.py on a small competition, and of 1,000 clips in 50 epochs by them."""
    folder = folder / "competition"
    options = types.SimpleNamespace(
        size=sizes.image, seconds=sizes.seconds, epochs=sizes.epochs, device=device
    )
    result = competition.run(folder, options)
    epochs = pd.read_csv(folder / "out" / "metrics.csv")["seconds"].tolist()
    written = sorted(path.stat().st_mtime for path in folder.glob("data/separated/*.npz"))
    seconds = extrapolate(
        result["total_seconds"], result["stage_seconds"], epochs, written,
        clips=sizes.competition,
    )  # fmt: skip
    return {
        f"seconds_of_{TARGET_CLIPS}_clips_{TARGET_EPOCHS}_epochs": seconds,
        "clips": sizes.competition,
        "epochs": sizes.epochs,
        **result,
        "epoch_seconds": [round(each, 2) for each in epochs],
    }


def extrapolate(total, stages, epochs, written, *, clips):
    """{stage: seconds} of TARGET_CLIPS in TARGET_EPOCHS, from a run's seconds on fewer `clips`.

    `epochs` are its epochs' seconds, of which the first has the warm-up; `written` the times at
    which stems were written, of which the first quarter has the start. What a run does between
    epochs and outside of the stages is taken not to depend on the number of clips.
    """
    scale = TARGET_CLIPS / clips
    tail = np.arange(len(written))[len(written) // 4 :]
    per_clip = np.polyfit(tail, np.array(written)[tail] - written[0], 1)[0]
    epoch = statistics.median(epochs[1:])
    between = (stages["training"] - sum(epochs)) / len(epochs)
    seconds = {name: value * scale for name, value in stages.items()}
    seconds["separation"] = stages["separation"] + per_clip * (TARGET_CLIPS - clips)
    seconds["training"] = (
        max(0.0, epochs[0] - epoch) + TARGET_EPOCHS * epoch * scale + TARGET_EPOCHS * between
    )
    seconds["between epochs, of it"] = TARGET_EPOCHS * between
    seconds["outside of stages"] = total - sum(stages.values())
    seconds["total"] = sum(seconds.values()) - seconds["between epochs, of it"]
    return {name: round(value, 1) for name, value in seconds.items()}


def memory(folder, sizes, device):
    """Clips per forward pass under half the memory: in training, validation and separation."""
    settings = sized_settings(folder, sizes, device)
    with start_runtime(settings.machine) as runtime:
        return {
            **halved_training(folder, sizes, settings, runtime),
            "separation": halved_separation(folder, settings, runtime),
        }


def halved_training(folder, sizes, settings, runtime):
    """{"training": what halved() found, "validation": the same}."""
    clips, cache = cached_stems(folder, settings)
    clips = clips[: sizes.batch]
    ours = training.OurRecipe(clips, cache, settings, runtime)
    trainer = ours.trainer

    def train_from_scratch():
        trainer.optimizer.state.clear()  # as before a run's first step
        ours.epoch(0)
        loss = trainer.state.sums["values"][0]
        assert math.isfinite(loss), f"the loss is {loss}"

    def validate():
        compute_logits(
            trainer.net, trainer.frontend, trainer.loader, clips,
            micro_batch=micro_batch, amp_dtype=trainer.amp_dtype, runtime=runtime,
        )  # fmt: skip

    found = halved(train_from_scratch, trainer.micro_batch)
    micro_batch = MicroBatch(sizes.batch, free_memory=trainer.loader.drop_gpu_cache)
    return {"training": found, "validation": halved(validate, micro_batch)}


def halved_separation(folder, settings, runtime):
    """What halved() found, and the relative difference to the stems of a whole batch."""
    separator, waves = load_separator(folder, settings, runtime, clips=8)
    separator.micro_batch.size = len(waves)
    whole = [stems for stems, _ in separator(waves)]
    found = halved(lambda: separator(waves), separator.micro_batch)
    return found | {"difference": relative_error([stems for stems, _ in separator(waves)], whole)}


def halved(action, micro_batch):
    """{peak memory of `action`, a limit below it, clips per forward pass under that limit}."""
    before = micro_batch.size
    action()  # a warm-up: cuDNN tries its algorithms
    torch.cuda.reset_peak_memory_stats()
    action()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    limit = held + 0.3 * (peak - held)  # cuDNN does with less work space before clips do not fit
    torch.cuda.set_per_process_memory_fraction(
        limit / torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    )
    try:
        action()
        action()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert micro_batch.size < before, f"{before} clips fitted into {limit / 1e9:.2f} GB"
    return {
        "peak_gigabytes": round(peak / 1e9, 2),
        "limit_gigabytes": round(limit / 1e9, 2),
        "clips": f"{before} -> {micro_batch.size}",
    }


def load_separator(folder, settings, runtime, *, clips):
    """(a Separator, the waves of so many clips)."""
    separator = Separator(
        settings.separation, sample_rate=settings.features.sr, device=runtime.device
    )
    options = types.SimpleNamespace(data=folder / "competition" / "data", clips=clips)
    paths = separation.find_clips(options)
    return separator, [next(read_chunks(path, separator)).wave for path in paths]


def relative_error(stems, reference):
    """Largest norm of a clip's error over the norm of the clip's stems."""
    errors = [
        float((one - other).norm() / other.norm())
        for one, other in zip(stems, reference, strict=True)
    ]
    return float(f"{max(errors):.2g}")


def precision(folder, sizes, device):
    """Relative errors of stems in half precision and in TF32, against float32.

    At the end, the weights are such that half precision overflows.
    """
    settings = sized_settings(folder, sizes, device)
    with start_runtime(settings.machine) as runtime:
        separator, waves = load_separator(folder, settings, runtime, clips=4)

        def stems(*, half):
            separator.half = half
            return zip(*separator(waves), strict=True)

        half, precisions = stems(half=True)
        tf32, _ = stems(half=False)
        torch.backends.cudnn.allow_tf32 = False
        exact, _ = stems(half=False)
        with torch.no_grad():
            separator.model.models[0].tdecoder[-1].conv_tr.weight.mul_(1e6)
        loud, redone = stems(half=True)
        assert all(each == "float32" for each in redone), redone
        assert all(each.isfinite().all() for each in loud)
        return {
            "half_error": relative_error(half, exact),
            "tf32_error": relative_error(tf32, exact),
            "clips": len(waves),
            "overflowed": sum(each == "float32" for each in precisions),
            "redone_in_float32": len(redone),
        }


def device_cache(folder, sizes, device):
    """Epochs with the stems on the GPU, against stems that are read each time."""
    ways, kept = {}, {}
    settings = sized_settings(folder, sizes, device)
    with start_runtime(settings.machine) as runtime:
        clips, cache = cached_stems(folder, settings)
        free, _ = torch.cuda.mem_get_info()
        clip_bytes = cache.read(clips["clip"][0]).nbytes
        fractions = {"all": 0.4, "some": 10.5 * clip_bytes / free, "none": 0.0}
        for name, fraction in fractions.items():
            own = sized_settings(folder, sizes, device, f"DEVICE_CACHE={fraction:.12f}")
            ways[name] = training.OurRecipe(clips, cache, own, runtime)
        seconds = training.time_epochs(ways, runtime, sizes.rounds)
        for name, way in ways.items():
            kept[name] = len(way.trainer.loader.gpu_cache)
        assert kept["all"] == len(clips) > kept["some"] > kept["none"] == 0, kept
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        return {
            "kept_clips": kept,
            "clips_per_second": {name: round(len(clips) / s, 1) for name, s in medians.items()},
        }


def two_processes(folder, sizes, device):
    """What two processes of torchrun do: one GPU each, and both on the first one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "train.py"]
    figures = {"gpus": torch.cuda.device_count()}
    for name, chosen in (("own", "cuda"), ("shared", "cuda:0")):
        words = [*demo_words(folder, chosen), f"OUTPUT_DIR={folder / name}", "EPOCHS=1"]
        log = folder / f"torchrun-{name}.log"
        result = gpu.run_process([*torchrun, *words], seconds=55, log=log)
        text = log.read_text()
        print(text)
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if (folder / name / "submit.csv").exists():
            figures[name] = "runs"
        else:
            assert errors, f"DEVICE={chosen} ends without a message ({result['status']})"
            assert "internal error" not in text, errors[0]
            figures[name] = errors[0]
    return figures


def measures(folder, sizes, device):
    """benchmarks/training.py --measures: torch.compile, and the other measures undone."""
    settings = sized_settings(folder, sizes, device)
    options = types.SimpleNamespace(
        clips=10 * sizes.batch, rounds=sizes.rounds, size=sizes.image, batch=sizes.batch
    )
    with start_runtime(settings.machine) as runtime:
        return training.measures(settings, runtime, options)


def operation_times(folder, sizes, device):
    """benchmarks/operations.py: a training step, and a batch of separation."""
    settings = sized_settings(folder, sizes, device)
    with start_runtime(settings.machine) as runtime:
        clips, cache = cached_stems(folder, settings)
        result = {"training": operations.of_training(clips, cache, settings, runtime)}
        result["separation"] = operations.of_separation(min(32, sizes.separated), settings, runtime)
        return result


def plain_training(folder, sizes, device):
    """An epoch by librosa in as many workers, a batch in each, against this one."""
    settings = sized_settings(folder, sizes, device, f"BATCH_SIZE={sizes.batch // 2}")
    with start_runtime(settings.machine) as runtime:
        clips, cache = cached_stems(folder, settings)
        workers = thread_count(settings.machine)
        clips = clips[: workers * sizes.batch // 2]
        ways = {
            "plain": training.PlainRecipe(clips, cache, settings, runtime, workers),
            "ours": training.OurRecipe(clips, cache, settings, runtime),
        }
        seconds = training.time_epochs(ways, runtime, 1)
        plain, ours = (seconds[name][0] for name in ways)
        return {
            "ratio": round(plain / ours, 1),
            "workers": workers,
            "plain_clips_per_second": round(len(clips) / plain, 2),
            "clips_per_second": round(len(clips) / ours, 1),
        }


FUNCTIONS = {
    "prepare": prepare,
    "demo_bf16": demo_in("bfloat16"),
    "demo_fp16": demo_in("float16"),
    "demo_float32": demo_in("float32"),
    "rates": rates,
    "separation": separation_rates,
    "competition": whole_competition,
    "memory": memory,
    "precision": precision,
    "device_cache": device_cache,
    "two_processes": two_processes,
    "compile": measures,
    "operations": operation_times,
    "plain_training": plain_training,
}

if __name__ == "__main__":
    main()
