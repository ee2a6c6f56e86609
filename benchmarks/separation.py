"""Separation: the plain recipe against this pipeline, on the same clips and the same network.

    python benchmarks/separation.py [--data DIR] [--clips 6] [--rounds 3] [--device cuda] [--quick]

The network is the full-size HTDemucs with random weights: its speed is that of the real one. The
plain recipe is, per file, librosa.load, demucs.apply.apply_model with its defaults,
librosa.resample and numpy.savez_compressed. The two take turns, each time in a process of its
own, from loading the network to the last file written. `ratio` is the recipe's time over the
pipeline's, `cpu_ratio` that of the processor time, which other work on the machine changes little,
`ratio_without_writing` that without the recipe's seconds of compression, beside which a fast GPU's
are few. With --plainly, the recipe has only so many of the clips, and what it takes for them after
the network is loaded counts in proportion.
`error_db` is the level of the difference to the recipe's stems without its random
shift, and `error_same_windows_db` that with this pipeline's overlap too. The last line is one JSON
object.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import soundfile
import torch
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from stemgenre.data import audio
from stemgenre.data.find_files import find_audio
from stemgenre.demo.synth import GENRES, render
from stemgenre.runtime import pick_device, start_runtime
from stemgenre.separation.cache import StemCache
from stemgenre.separation.demucs_model import load_demucs
from stemgenre.separation.separate import separate_missing
from stemgenre.settings import STEMS, SeparationSettings, load_settings

SOURCES = ["drums", "bass", "other", "vocals"]
FULL_SIZE = {"bottom_channels": 512, "segment": 7.8}  # of the htdemucs that is downloaded
TINY = {"channels": 8, "depth": 4, "t_layers": 1, "t_heads": 4, "bottom_channels": 32}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder with audio files; synthesised clips if none is given"
    )
    parser.add_argument("--clips", type=int, default=6, help="how many of them")
    parser.add_argument("--plainly", type=int, help="how many of these by the plain recipe: all")
    parser.add_argument("--rounds", type=int, default=3, help="how often both run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="3 clips, 2 rounds")
    parser.add_argument("--way", choices=("plain", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.clips, options.rounds = 3, 2
    options.plainly = options.plainly or options.clips
    if options.way:
        print(json.dumps(run_recipe(find_clips(options), options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        save_network(options.folder)
        if options.data is None:
            options.data = options.folder / "clips"
            write_clips(options.data, options.clips)
        paths = find_clips(options)
        if not paths:
            parser.error(f"no audio below {options.data}")
        print(json.dumps(compare(paths, options)))


def find_clips(options):
    """Paths of as many clips as asked for; the same ones again if there are fewer."""
    found = find_audio(options.data, skip=[options.data / "separated"])
    return [found[i % len(found)] for i in range(options.clips if found else 0)]


def write_clips(folder, count):
    """Synthesised clips as a competition's: 30 s, 22.05 kHz, mono."""
    folder.mkdir()
    for i in range(count):
        mix = render(GENRES[i % len(GENRES)], seed=i, seconds=30.0).sum(0)
        soundfile.write(folder / f"clip_{i}.wav", mix, 22050)


def compare(paths, options):
    """The figures of both ways over several rounds."""
    results = {"plain": [], "ours": []}
    for number in range(options.rounds):
        for way, found in results.items():
            found.append(in_own_process(way, options))
            if way == "plain":
                found[-1] = of_all_clips(found[-1], options.clips / options.plainly)
            print(f"round {number + 1}: {way} {found[-1]}", flush=True)
    seconds = {way: [run["seconds"] for run in found] for way, found in results.items()}
    ratios, cpu_ratios = (
        [
            plain[figure] / ours[figure]
            for plain, ours in zip(results["plain"], results["ours"], strict=True)
        ]
        for figure in ("seconds", "cpu_seconds")
    )
    without_writing = [
        (plain["seconds"] - plain["write_seconds"]) / ours["seconds"]
        for plain, ours in zip(results["plain"], results["ours"], strict=True)
    ]
    ours = statistics.median(seconds["ours"])
    device = pick_device(options.device)
    model = load_demucs("htdemucs", options.folder).to(device)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "cpu_ratio_min": round(min(cpu_ratios), 3),
        "cpu_ratio_max": round(max(cpu_ratios), 3),
        "ratio_without_writing": round(statistics.median(without_writing), 3),
        "clips_per_second": round(len(paths) / ours, 3),
        "realtime_factor": round(sum(audio.probe(path).seconds for path in paths) / ours, 2),
        "error_db": error_db(paths, options.folder, model, device, shifts=0),
        "error_same_windows_db": error_db(
            paths,
            options.folder,
            model,
            device,
            shifts=0,
            overlap=SeparationSettings.from_config().separation_overlap,
        ),
        **{
            f"{way}_peak_gigabytes": max(run["peak_gigabytes"] for run in found)
            for way, found in results.items()
        },
        "device": str(device),
    }


def of_all_clips(run, scale):
    """The plain recipe's result for `scale` times as many clips."""
    once = {"seconds": run["load_seconds"], "cpu_seconds": run["load_cpu_seconds"]}
    once["write_seconds"] = 0.0
    return run | {name: once[name] + scale * (run[name] - once[name]) for name in once}


def in_own_process(way, options):
    """The result of run_recipe in a fresh process."""
    command = [sys.executable, __file__, "--way", way, "--folder", options.folder]
    clips = options.plainly if way == "plain" else options.clips
    command += ["--data", options.data, "--clips", clips, "--device", options.device]
    environment = os.environ | ({"GOMP_SPINCOUNT": "1000"} if way == "ours" else {})
    done = subprocess.run(
        [str(part) for part in command], env=environment, check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_recipe(paths, options):
    """Seconds and peak memory of one way, into an empty folder."""
    shutil.rmtree(options.folder / options.way, ignore_errors=True)
    settings = load_settings([f"SEPARATION_REPO={options.folder}", f"DEVICE={options.device}"])
    clips = pd.DataFrame({"clip": [f"clip_{i}" for i in range(len(paths))], "path": paths})
    started, cpu_started, of_plain = time.perf_counter(), time.process_time(), {}
    if options.way == "ours":
        with start_runtime(settings.machine) as runtime:
            separate_missing(clips, our_cache(options.folder), settings, runtime)
    else:
        device = pick_device(options.device)
        model = load_demucs("htdemucs", options.folder)
        of_plain["load_seconds"] = time.perf_counter() - started
        of_plain["load_cpu_seconds"] = time.process_time() - cpu_started
        of_plain["write_seconds"] = plain_recipe(clips, options.folder / "plain", model, device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu_started, 2),
        "peak_gigabytes": round(peak, 2),
        **{name: round(value, 2) for name, value in of_plain.items()},
    }


def our_cache(folder):
    return StemCache(folder / "ours", model="htdemucs", sample_rate=22050)


def save_network(folder, size=FULL_SIZE):
    """An HTDemucs with random weights, full size or not, as the hub's repository would hold it."""
    torch.manual_seed(0)
    arguments = {"sources": SOURCES, **size}
    model = HTDemucs(**arguments)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    meta = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(arguments)}
    save_file(state, folder / "random.safetensors", metadata=meta)
    (folder / "htdemucs.yaml").write_text("models: ['random']\n")


def plain_recipe(clips, out, model, device):
    """The straightforward loop over files; returns its seconds of compression and writing."""
    out.mkdir()
    seconds = 0.0
    for row in clips.itertuples():
        stems = separate_plainly(row.path, model, device)
        started = time.perf_counter()
        np.savez_compressed(out / f"{row.clip}.npz", **dict(zip(STEMS, stems, strict=True)))
        seconds += time.perf_counter() - started
    return seconds


def separate_plainly(path, model, device, **options):
    """Stems (4, samples) at 22050 Hz of one file; `options` go to apply_model."""
    wave, _ = librosa.load(path, sr=44100, mono=False)
    wave = torch.from_numpy(np.ascontiguousarray(np.broadcast_to(wave, (2, wave.shape[-1]))))
    with torch.no_grad():
        stems = apply_model(model, wave[None].clone(), device=device, **options)[0].cpu()
    stems = stems.mean(1)[[model.sources.index(stem) for stem in STEMS]].numpy()
    return librosa.resample(stems, orig_sr=44100, target_sr=22050)


def error_db(paths, folder, model, device, **options):
    """Level of the difference to the plain stems, below those, over the first two clips."""
    levels = []
    for number, path in enumerate(paths[:2]):
        plain = separate_plainly(path, model, device, **options)
        ours = our_cache(folder).read(f"clip_{number}").astype(np.float32)
        samples = min(plain.shape[1], ours.shape[1])
        difference = plain[:, :samples] - ours[:, :samples]
        levels.append(20 * np.log10(difference.std() / plain.std()))
    return round(float(np.mean(levels)), 1)


if __name__ == "__main__":
    main()
