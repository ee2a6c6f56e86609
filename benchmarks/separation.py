"""Separation: the plain recipe against this pipeline, on the same clips and the same network.

    python benchmarks/separation.py --data DIR --clips 8 --rounds 3 [--device cuda] [--quick]

The network is the full-size HTDemucs with random weights: its speed is that of the real one. The
plain recipe is, per file, librosa.load, demucs.apply.apply_model with its defaults,
librosa.resample and numpy.savez_compressed. Both run in turn, several times; `ratio` is the
recipe's time over the pipeline's. `error_db` compares the stems with those of the recipe without
its random shift. The last line is one JSON object.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import torch
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import config
from stemgenre import audio, runtime
from stemgenre.cache import STEMS, StemCache
from stemgenre.metadata import find_audio
from stemgenre.separation import load_demucs
from stemgenre.settings import load_settings
from stemgenre.stems import separate_missing

NETWORK = {
    "sources": ["drums", "bass", "other", "vocals"],
    "bottom_channels": 512,
    "segment": {"_type": "fraction", "numerator": 39, "denominator": 5},
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with audio files")
    parser.add_argument("--clips", type=int, default=6, help="how many of them")
    parser.add_argument("--rounds", type=int, default=3, help="how often both run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="2 clips, 2 rounds")
    options = parser.parse_args()
    if options.quick:
        options.clips, options.rounds = 2, 2
    runtime.log_to_console()
    paths = find_audio(options.data, skip=options.data / "separated")
    if not paths:
        parser.error(f"no audio below {options.data}")
    paths = [paths[i % len(paths)] for i in range(options.clips)]
    with tempfile.TemporaryDirectory() as folder:
        result = compare(paths, Path(folder), options)
    print(json.dumps(result))


def compare(paths, folder, options):
    """The figures of both ways over several rounds."""
    save_network(folder)
    settings = load_settings(config, [f"SEPARATION_REPO={folder}", f"DEVICE={options.device}"])
    clips = pd.DataFrame({"clip": [f"clip_{i}" for i in range(len(paths))], "path": paths})
    plain_seconds, our_seconds, memory = [], [], {}
    with runtime.start(settings.machine) as run:
        model = load_demucs("htdemucs", folder).to(run.device)
        for number in range(options.rounds):
            ours = StemCache(
                folder / f"ours_{number}", model="htdemucs", sample_rate=settings.features.sr
            )
            our_seconds.append(timed(run, separate_missing, clips, ours, settings, run))
            memory.setdefault("pipeline", peak_gigabytes())
            plain_seconds.append(
                timed(run, plain_recipe, clips, folder / "plain", model, run.device)
            )
            memory.setdefault("both", peak_gigabytes())
            print(f"plain {plain_seconds[-1]:.1f} s, pipeline {our_seconds[-1]:.1f} s")
        error = error_db(clips, ours, model, run.device)
    ratios = [plain / our for plain, our in zip(plain_seconds, our_seconds, strict=True)]
    seconds = statistics.median(our_seconds)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "clips_per_second": round(len(paths) / seconds, 3),
        "realtime_factor": round(sum(audio.probe(path).seconds for path in paths) / seconds, 2),
        "error_db": round(error, 1),
        "peak_gigabytes": memory,
        "device": str(run.device),
    }


def save_network(folder):
    """The full-size HTDemucs with random weights, as the hub's repository would hold it."""
    torch.manual_seed(0)
    model = HTDemucs(**NETWORK | {"segment": 39 / 5})
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    meta = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(NETWORK)}
    save_file(state, folder / "random.safetensors", metadata=meta)
    (folder / "htdemucs.yaml").write_text("models: ['random']\n")


def plain_recipe(clips, folder, model, device):
    """What everybody writes first."""
    folder.mkdir(exist_ok=True)
    for row in clips.itertuples():
        stems = separate_plainly(row.path, model, device)
        np.savez_compressed(folder / f"{row.clip}.npz", **dict(zip(STEMS, stems, strict=True)))


def separate_plainly(path, model, device, **options):
    """Stems (4, samples) at 22050 Hz of one file; `options` go to apply_model."""
    wave, _ = librosa.load(path, sr=44100, mono=False)
    wave = torch.from_numpy(np.ascontiguousarray(np.broadcast_to(wave, (2, wave.shape[-1]))))
    with torch.no_grad():
        stems = apply_model(model, wave[None].clone(), device=device, **options)[0].cpu()
    stems = stems.mean(1)[[model.sources.index(stem) for stem in STEMS]].numpy()
    return librosa.resample(stems, orig_sr=44100, target_sr=22050)


def error_db(clips, cache, model, device):
    """Level of the difference to the plain recipe without shifts, below the recipe's stems."""
    levels = []
    for row in clips.head(2).itertuples():
        plain = separate_plainly(row.path, model, device, shifts=0)
        ours = cache.read(row.clip).astype(np.float32)
        samples = min(plain.shape[1], ours.shape[1])
        difference = plain[:, :samples] - ours[:, :samples]
        levels.append(20 * np.log10(difference.std() / plain.std()))
    return float(np.mean(levels))


def timed(run, function, *arguments):
    started = time.perf_counter()
    function(*arguments)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gigabytes():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


if __name__ == "__main__":
    main()
