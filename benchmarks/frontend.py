"""The front end against librosa's chain: seconds per clip, and how near each comes to the truth.

    python benchmarks/frontend.py [--clips 10] [--seconds 30] [--device cpu] [--quick]

Clips of the synthesised band are moved in pitch and tempo by both: this front end, and
librosa.effects.time_stretch, pitch_shift, melspectrogram and power_to_db per stem. The truth is
the same clip rendered anew at that pitch and tempo. Errors are mean absolute differences in dB.
The last line is one JSON object.
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

from stemgenre import malloc, runtime
from stemgenre.augmentation import PLAIN, Draw
from stemgenre.band import GENRES, render
from stemgenre.frontend import FrontEnd
from stemgenre.settings import FeatureSettings


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="5 clips of 10 s")
    options = parser.parse_args()
    if options.quick:
        options.clips, options.seconds = 5, 10.0
    device = runtime.pick_device(options.device)
    if device.type == "cpu":
        malloc.keep_freed_memory()  # as runtime.start() does
    features = FeatureSettings(clip_seconds=options.seconds)
    front_end = FrontEnd(features, device=device)
    rng = np.random.default_rng(0)
    figures = {"seconds": [], "librosa_seconds": [], "error": [], "librosa_error": [], "plain": []}
    for number in range(options.clips + 1):
        genre = GENRES[number % len(GENRES)]
        one = Draw(semitones=rng.uniform(-2, 2), rate=rng.uniform(0.8, 1.2))
        found = compare(genre, number, one, front_end, features)
        if number:  # the first clip warms both up
            for name, value in found.items():
                figures[name].append(value)
            print(f"{genre:9} {one.semitones:+.2f} semitones, rate {one.rate:.2f}:", shown(found))
    seconds, plain = (statistics.median(figures[name]) for name in ("seconds", "librosa_seconds"))
    ratios = [a / b for a, b in zip(figures["librosa_seconds"], figures["seconds"], strict=True)]
    result = {
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "seconds_per_clip": round(seconds, 4),
        "librosa_seconds_per_clip": round(plain, 4),
        "error_db": round(statistics.mean(figures["error"]), 3),
        "error_librosa_db": round(statistics.mean(figures["librosa_error"]), 3),
        "plain_error_db": float(np.max(figures["plain"])),
        "device": str(device),
    }
    print(json.dumps(result))


def compare(genre, seed, one, front_end, features):
    """Both ways' seconds and errors on one clip; `plain` is the largest difference to librosa."""
    how = {"seed": seed, "seconds": features.clip_seconds, "sr": features.sr}
    stems = render(genre, **how)
    truth = librosa_image(render(genre, semitones=one.semitones, rate=one.rate, **how), features)
    ours, seconds = timed(lambda: front_end.decibels(torch.from_numpy(stems), one))
    theirs, librosa_seconds = timed(lambda: librosa_chain(stems, one, features))
    plain = front_end.decibels(torch.from_numpy(stems), PLAIN).cpu().numpy()
    plain = np.abs(plain - librosa_image(stems, features)[..., : plain.shape[2]]).max()
    return {
        "seconds": seconds,
        "librosa_seconds": librosa_seconds,
        "error": error_db(ours.cpu().numpy(), truth),
        "librosa_error": error_db(theirs, truth),
        "plain": plain,
    }


def librosa_chain(stems, one, features):
    """The image (4, n_mels, frames) of moved stems, stem by stem, as most pipelines make it."""
    moved = []
    for stem in stems:
        wave = librosa.effects.time_stretch(stem, rate=one.rate)
        moved.append(librosa.effects.pitch_shift(wave, sr=features.sr, n_steps=one.semitones))
    return librosa_image(moved, features)


def librosa_image(stems, features):
    power = np.stack([librosa.feature.melspectrogram(y=stem, sr=features.sr) for stem in stems])
    return librosa.power_to_db(power, ref=np.max, top_db=features.top_db)


def error_db(image, truth):
    """Mean absolute difference; the last frames, which see the clips' ends, are left out."""
    frames = min(image.shape[2], truth.shape[2]) - 4
    return float(np.abs(image[..., :frames] - truth[..., :frames]).mean())


def timed(function):
    """(result, seconds), the median of three calls."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = function()
        if torch.is_tensor(result) and result.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def shown(found):
    return (
        f"{found['seconds']:.4f} s against {found['librosa_seconds']:.3f} s, "
        f"error {found['error']:.2f} against {found['librosa_error']:.2f} dB"
    )


if __name__ == "__main__":
    main()
