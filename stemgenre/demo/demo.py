"""A synthesised competition to try everything on, with nothing to download.

Its files look like the real ones (see data/README.md). Unlike a real competition it comes with the
true stems, written to the stem cache, and with the labels of the test clips.
"""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from stemgenre.demo.styles import GENRES
from stemgenre.demo.synth import render
from stemgenre.errors import UserError
from stemgenre.files import atomic_write
from stemgenre.runtime import Runtime
from stemgenre.separation.cache import StemCache
from stemgenre.settings import FeatureSettings

SEED = 0  # of the clips of train.py --demo
TRAIN_PER_GENRE, TEST_PER_GENRE = 32, 4  # clips

FORMAT_VERSION = 1  # to be raised whenever the same parameters would give other files
MANIFEST_NAME = "demo.json"  # the parameters of the demo, and whether it was written to the end
MASTERS = ("train_master.tsv", "label_master.tsv", "sample_submit.tsv", "test_master.tsv")
FOLDERS_PER_SPLIT = 2  # train_sound_1, train_sound_2, test_sound_1, ...
LENGTH_VARIATION = 0.06  # clips are up to this fraction longer or shorter than `seconds`


@dataclass(frozen=True)
class DemoClip:
    """One clip to synthesise: genre, seed, length, and its path below the data folder."""

    name: str  # in the stem cache
    genre: str
    seed: int
    seconds: float
    path: Path

    @property
    def label_id(self) -> int:
        """The position of the genre in GENRES."""
        return GENRES.index(self.genre)


def ensure_demo(
    data_dir: Path | str, cache: StemCache, features: FeatureSettings, runtime: Runtime
) -> None:
    """Writes the demo of `train.py --demo` unless it is complete; the main process does it.

    A collective: every rank has to call it. Raises Interrupted if a stop was requested.
    """
    if runtime.is_main:
        write_demo(
            data_dir,
            seed=SEED,
            train_per_genre=TRAIN_PER_GENRE,
            test_per_genre=TEST_PER_GENRE,
            seconds=features.clip_seconds,
            sr=features.sr,
            cache=cache,
            should_stop=lambda: runtime.stop.signal_number != 0,
        )
    if runtime.sync_stop():
        raise runtime.interrupted()


def write_demo(
    data_dir: Path | str,
    *,
    seed: int,
    train_per_genre: int,
    test_per_genre: int,
    seconds: float,
    sr: int,
    cache: StemCache,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Writes a competition to the folder `data_dir` and its true stems to `cache`.

    Clips are about `seconds` long, at `sr` Hz. The same parameters give the same bytes. A complete
    demo is left as it is; an incomplete one, or one with other parameters, is written again from
    scratch. Returns early once `should_stop()`. Raises UserError if the folder holds other data.
    """
    data_dir = Path(data_dir)
    manifest = {
        "format": FORMAT_VERSION,
        "seed": seed,
        "train_per_genre": train_per_genre,
        "test_per_genre": test_per_genre,
        "seconds": seconds,
        "sr": sr,
    }
    train = sample_clips("train", train_per_genre, seconds=seconds, seed=[seed, 0])
    test = sample_clips("test", test_per_genre, seconds=seconds, seed=[seed, 1])
    if is_complete(data_dir, manifest, [*train, *test], cache):
        return
    clear_old_demo(data_dir)
    _write_manifest(data_dir, manifest, complete=False)
    _write_masters(data_dir, train, test)
    for clip in tqdm([*train, *test], desc="synthesising the demo", unit="clip"):
        if should_stop():
            return
        _write_clip(data_dir, clip, sr=sr, cache=cache)
    _write_manifest(data_dir, manifest, complete=True)


def sample_clips(split: str, per_genre: int, *, seconds: float, seed: list[int]) -> list[DemoClip]:
    """The clips of one split ("train" or "test"), in an order without information on genres."""
    rng = np.random.default_rng(seed)
    genres = rng.permutation(np.repeat(GENRES, per_genre))
    clips = []
    for index, genre in enumerate(genres):
        folder = f"{split}_sound_{1 + index * FOLDERS_PER_SPLIT // len(genres)}"
        clips.append(
            DemoClip(
                name=f"{split}_{index}",
                genre=str(genre),
                seed=int(rng.integers(2**31)),
                seconds=seconds * rng.uniform(1 - LENGTH_VARIATION, 1 + LENGTH_VARIATION),
                path=Path(folder, folder, f"{split}_{index}.au"),
            )
        )
    return clips


def is_complete(
    data_dir: Path, manifest: dict[str, Any], clips: list[DemoClip], cache: StemCache
) -> bool:
    """Whether the folder and the cache hold every file of the demo with this manifest."""
    try:
        found = json.loads((data_dir / MANIFEST_NAME).read_text())
    except (OSError, ValueError):
        return False
    return (
        found == manifest | {"whole": True}
        and all((data_dir / name).is_file() for name in MASTERS)
        and all((data_dir / clip.path).is_file() for clip in clips)
        and all(cache.is_current(clip.name, data_dir / clip.path) for clip in clips)
    )


def clear_old_demo(data_dir: Path) -> None:
    """Deletes an earlier demo's clips and masters. Raises UserError if the data is not a demo's."""
    folders = sorted(path for path in data_dir.glob("*_sound_*") if path.is_dir())
    stems = {Path(name).stem for name in MASTERS}
    masters = sorted(path for path in data_dir.glob("*.[ct]sv") if path.stem in stems)
    if (folders or masters) and not (data_dir / MANIFEST_NAME).is_file():
        raise UserError(
            f"{data_dir} holds data that is not a demo ({[*masters, *folders][0].name}); "
            "choose another folder for the demo"
        )
    for folder in folders:
        shutil.rmtree(folder)
    for master in masters:
        master.unlink()


def _write_clip(data_dir: Path, clip: DemoClip, *, sr: int, cache: StemCache) -> None:
    """Writes the mix as 16-bit .au and the stems to the cache."""
    stems = render(clip.genre, seed=clip.seed, seconds=clip.seconds, sr=sr)  # (4, T) float32
    path = data_dir / clip.path
    mix = io.BytesIO()  # soundfile does not report a failed write, for example on a full disk
    soundfile.write(mix, stems.sum(axis=0), sr, format="AU", subtype="PCM_16")
    with atomic_write(path) as file:
        file.write(mix.getbuffer())
    cache.write(clip.name, stems, source=path)


def _write_masters(data_dir: Path, train: list[DemoClip], test: list[DemoClip]) -> None:
    """Writes the four tables: labels of both splits, genres, and the submission template."""
    header = ("file_name", "label_id")
    tables = {
        "train_master.tsv": [header, *((clip.path.name, clip.label_id) for clip in train)],
        "label_master.tsv": [
            ("label_name", "label_id"),
            *((genre, label_id) for label_id, genre in enumerate(GENRES)),
        ],
        "sample_submit.tsv": [(clip.path.name, 0) for clip in test],
        "test_master.tsv": [header, *((clip.path.name, clip.label_id) for clip in test)],
    }
    for name, rows in tables.items():
        with atomic_write(data_dir / name, "w", newline="") as file:
            file.writelines(f"{left}\t{right}\n" for left, right in rows)


def _write_manifest(data_dir: Path, manifest: dict[str, Any], *, complete: bool) -> None:
    """Writes demo.json; "whole", its key for complete, is that of all existing demos."""
    with atomic_write(data_dir / MANIFEST_NAME, "w") as file:
        json.dump(manifest | {"whole": complete}, file, indent=2)
