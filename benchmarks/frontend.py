"""The front end against librosa's chain: seconds per clip, and the error of pitch and tempo.

    python benchmarks/frontend.py [--clips 10] [--seconds 30] [--device cpu] [--quick]

Synthesised clips (no data needed) are shifted in pitch and stretched in time by both: by the front
end, and by librosa.effects.time_stretch and pitch_shift, melspectrogram and power_to_db per stem.
The reference is the same score synthesised at that pitch and tempo. Errors are mean absolute
differences in dB; times are medians of three calls or more, for half a second at least: a system
may need a tenth of a second to give an idle process's threads a core each. `cpu_ratio` compares the
processor time of all threads. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does
sys.path.insert(0, str(Path(__file__).parents[1]))
import librosa
import numpy as np
import torch

from stemgenre import cli, runtime
from stemgenre.demo.synth import GENRES, render
from stemgenre.features.augmentation import AugmentParams
from stemgenre.features.log_mel import Frontend
from stemgenre.settings import FeatureSettings

MIN_CALLS, MIN_SECONDS = 3, 0.5  # of which the median time is taken
EDGE_FRAMES = 4  # at the end, not compared: they see the clips' different ends


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a clip")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="5 clips of 10 s")
    args = parser.parse_args()
    if args.quick:
        args.clips, args.seconds = 5, 10.0
    device = runtime.pick_device(args.device)
    if device.type == "cpu":
        runtime.keep_freed_memory()  # as start_runtime() does
    frontend = Frontend(FeatureSettings.from_config(clip_seconds=args.seconds), device=device)
    rng = np.random.default_rng(0)
    rows = []
    for index in range(args.clips + 1):
        genre = GENRES[index % len(GENRES)]
        params = AugmentParams(semitones=rng.uniform(-2, 2), rate=rng.uniform(0.8, 1.2))
        row = compare(genre, index, params, frontend)
        if index:  # the first clip is a warm-up
            rows.append(row)
            print(
                f"{genre:9} {params.semitones:+.2f} semitones, rate {params.rate:.2f}: "
                f"{row['seconds']:.4f} s, librosa {row['librosa_seconds']:.3f} s; "
                f"error {row['error']:.2f} dB, librosa {row['librosa_error']:.2f} dB",
                flush=True,
            )
    print(json.dumps(summarise(rows) | {"device": str(device)}))


def compare(genre, seed, params, frontend):
    """Seconds and errors of both on one clip, and their difference without augmentation."""
    features = frontend.features
    clip = {"seed": seed, "seconds": features.clip_seconds, "sr": features.sr}
    stems = render(genre, **clip)
    truth = render(genre, semitones=params.semitones, rate=params.rate, **clip)
    truth = librosa_log_mel(truth, features)
    image, seconds, cpu = timed(lambda: frontend.log_mel(torch.from_numpy(stems), params))
    librosa_image, librosa_seconds, librosa_cpu = timed(
        lambda: librosa_chain(stems, params, features)
    )
    plain = frontend.log_mel(torch.from_numpy(stems)).cpu().numpy()
    difference = plain - librosa_log_mel(stems, features)[..., : plain.shape[2]]
    return {
        "seconds": seconds,
        "librosa_seconds": librosa_seconds,
        "cpu_ratio": librosa_cpu / cpu,
        "error": error_db(image.cpu().numpy(), truth),
        "librosa_error": error_db(librosa_image, truth),
        "plain_difference": float(np.abs(difference).max()),
    }


def librosa_chain(stems, params, features):
    """The log-mel spectrogram (4, n_mels, frames) of augmented stems by librosa, stem by stem."""
    augmented = []
    for stem in stems:
        wave = librosa.effects.time_stretch(stem, rate=params.rate)
        augmented.append(
            librosa.effects.pitch_shift(wave, sr=features.sr, n_steps=params.semitones)
        )
    return librosa_log_mel(augmented, features)


def librosa_log_mel(stems, features):
    """The log-mel spectrogram in dB below its loudest cell, by librosa."""
    power = np.stack([librosa.feature.melspectrogram(y=stem, sr=features.sr) for stem in stems])
    return librosa.power_to_db(power, ref=np.max, top_db=features.top_db)


def error_db(image, truth):
    """Mean absolute difference over the frames that both have."""
    frames = min(image.shape[2], truth.shape[2]) - EDGE_FRAMES
    return float(np.abs(image[..., :frames] - truth[..., :frames]).mean())


def timed(function):
    """(result, median seconds, mean processor seconds) of several calls."""
    seconds, cpu_started = [], time.process_time()
    while len(seconds) < MIN_CALLS or sum(seconds) < MIN_SECONDS:
        started = time.perf_counter()
        result = function()
        if torch.is_tensor(result) and result.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    cpu = time.process_time() - cpu_started
    return result, statistics.median(seconds), cpu / len(seconds)


def summarise(rows):
    """Medians of times and ratios, means of errors, over the clips."""
    ratios = [row["librosa_seconds"] / row["seconds"] for row in rows]
    error, librosa_error = (
        statistics.mean(row[name] for row in rows) for name in ("error", "librosa_error")
    )
    return {
        "speedup": round(statistics.median(ratios), 2),
        "speedup_min": round(min(ratios), 2),
        "speedup_max": round(max(ratios), 2),
        "cpu_ratio": round(statistics.median(row["cpu_ratio"] for row in rows), 2),
        "seconds_per_clip": round(statistics.median(row["seconds"] for row in rows), 4),
        "librosa_seconds_per_clip": round(
            statistics.median(row["librosa_seconds"] for row in rows), 4
        ),
        "error_db": round(error, 3),
        "librosa_error_db": round(librosa_error, 3),
        "error_ratio": round(error / librosa_error, 3),
        "plain_max_difference_db": max(row["plain_difference"] for row in rows),
    }


if __name__ == "__main__":
    cli.run_script(main)
