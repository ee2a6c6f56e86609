"""A synthesised competition to try everything on, with nothing to download.

Its files look like the real ones (see data/README.md). Unlike a real competition it comes with the
true stems, written to the stem cache, and with the labels of the test clips.

The hard demo has few training clips, and test clips in other keys, tempi and instruments; its
stems leak into each other as separated ones do. benchmarks/score.py measures with it.

python -m stemgenre.demo.demo --hard FOLDER
python train.py recipes/demo.py DATA_DIR=FOLDER OUTPUT_DIR=runs/hard EPOCHS=60 PATIENCE=60
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from stemgenre import cli
from stemgenre.data.find_files import find_audio
from stemgenre.demo.styles import GENRES
from stemgenre.demo.synth import render
from stemgenre.demo.variation import PLAIN, Variation
from stemgenre.errors import UserError
from stemgenre.files import atomic_write, sha256
from stemgenre.prefetch import prefetch_map
from stemgenre.runtime import Runtime
from stemgenre.separation.cache import StemCache
from stemgenre.settings import FeatureSettings

SEED = 0  # of the clips of train.py --demo
TRAIN_PER_GENRE, TEST_PER_GENRE = 32, 4  # clips
HARD_TRAIN_PER_GENRE, HARD_TEST_PER_GENRE = 8, 30  # clips of the hard demo
HARD_TRAIN = Variation(
    keys=(0, 6), tempi=(0.0, 0.6), instruments=(0, 1), stem_gain_db=3, bleed=0.15, noise_db=40
)
HARD_TEST = Variation(
    keys=(6, 12),
    tempi=(0.5, 1.1),
    instruments=(-1, None),
    instrument_std=0.3,
    stem_gain_db=6,
    bleed=0.2,
    noise_db=30,
)

FORMAT_VERSION = 1  # to be raised whenever the same parameters would give other files
MANIFEST_NAME = "demo.json"  # the parameters of the demo, and whether it was written to the end
HASHES_NAME = "demo.sha256"  # of every file the demo wrote, as sha256sum lists them
MASTERS = ("train_master.tsv", "label_master.tsv", "sample_submit.tsv", "test_master.tsv")
THREADS = 2  # that synthesise, while another one waits for the disk
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
    variation: Variation = PLAIN

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
        raise runtime.interrupted("stopped; the same command begins again")


def make_hard_demo(folder: Path | str, *, seed: int = SEED) -> None:
    """Writes the hard demo to `folder` as recipes/demo.py needs it, unless it is complete.

    Its stems are in the cache that train.py finds there. Raises UserError as write_demo does.
    """
    settings = cli.parse_settings([f"DATA_DIR={folder}"], demo=True)
    features, model = settings.features, settings.separation.separation_model
    write_demo(
        folder,
        seed=seed,
        train_per_genre=HARD_TRAIN_PER_GENRE,
        test_per_genre=HARD_TEST_PER_GENRE,
        seconds=features.clip_seconds,
        sr=features.sr,
        cache=StemCache(settings.cache_folder, model=model, sample_rate=features.sr),
        variations=(HARD_TRAIN, HARD_TEST),
    )


def write_demo(
    data_dir: Path | str,
    *,
    seed: int,
    train_per_genre: int,
    test_per_genre: int,
    seconds: float,
    sr: int,
    cache: StemCache,
    variations: tuple[Variation, Variation] = (PLAIN, PLAIN),
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Writes a competition to the folder `data_dir` and its true stems to `cache`.

    Clips are about `seconds` long, at `sr` Hz; `variations` are those of train and of test. The
    same parameters give the same bytes. A complete demo is left as it is; an incomplete one, or one
    with other parameters, is written again from scratch. Returns early once `should_stop()`. Raises
    UserError if the folder holds data, or the cache stems, that the demo did not write.
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
    if variations != (PLAIN, PLAIN):
        manifest["variations"] = repr(variations)
    train, test = (
        sample_clips(split, per_genre, seconds=seconds, seed=[seed, number], variation=variation)
        for number, (split, per_genre, variation) in enumerate(
            zip(("train", "test"), (train_per_genre, test_per_genre), variations, strict=True)
        )
    )
    tables = _tables(train, test)
    if is_complete(data_dir, manifest, tables, [*train, *test], cache):
        return
    _check_cache(cache, [*train, *test])
    clear_old_demo(data_dir)
    _write_manifest(data_dir, manifest, complete=False)
    for name, text in tables.items():
        _write_file(data_dir, name, text.encode())
    clips = [*train, *test]
    rendered = prefetch_map(
        lambda clip: _render(clip, sr=sr), clips, threads=THREADS, depth=4 * THREADS
    )
    with contextlib.closing(rendered):
        for clip, stems in tqdm(
            rendered, total=len(clips), desc="synthesising the demo", unit="clip"
        ):
            if should_stop():
                return
            _write_clip(data_dir, clip, stems.result(), sr=sr, cache=cache)
    _write_manifest(data_dir, manifest, complete=True)


def sample_clips(
    split: str,
    per_genre: int,
    *,
    seconds: float,
    seed: list[int],
    variation: Variation = PLAIN,
) -> list[DemoClip]:
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
                variation=variation,
            )
        )
    return clips


def is_complete(
    data_dir: Path,
    manifest: dict[str, Any],
    tables: dict[str, str],
    clips: list[DemoClip],
    cache: StemCache,
) -> bool:
    """Whether the folder and the cache hold every file of the demo with this manifest."""
    try:
        found = json.loads(_read_text(data_dir / MANIFEST_NAME))
    except ValueError:
        return False
    return (
        found == manifest | {"whole": True}
        and all(_read_text(data_dir / name) == text for name, text in tables.items())
        and all((data_dir / clip.path).is_file() for clip in clips)
        and all(cache.is_current(clip.name, data_dir / clip.path) for clip in clips)
    )


def clear_old_demo(data_dir: Path) -> None:
    """Deletes an earlier demo's clips and masters, and the folders that are then empty.

    Raises UserError, before anything is deleted, for a clip or master that the demo did not write
    or that was changed since.
    """
    folders = sorted(path for path in data_dir.glob("*_sound_*") if path.is_dir())
    stems = {Path(name).stem for name in MASTERS}
    found = [path for path in data_dir.glob("*.[ct]sv") if path.stem in stems]
    found += [path for folder in folders for path in find_audio(folder)]
    written = _read_hashes(data_dir)
    for path in sorted(found):
        if (_hash(path), path.relative_to(data_dir).as_posix()) not in written:
            raise UserError(
                f"{path} is not the demo's, or was changed since; choose another folder for the "
                "demo, as in python train.py --demo DATA_DIR=demo_data, or move it away"
            )
    for path in found:
        path.unlink()
    for folder in folders:
        for root, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):  # it holds other files, which stay
                Path(root).rmdir()
    (data_dir / HASHES_NAME).unlink(missing_ok=True)


def _check_cache(cache: StemCache, clips: list[DemoClip]) -> None:
    """Raises UserError if the demo would replace the separated stems of a real competition."""
    for clip in clips:
        if (model := cache.made_by(clip.name)) not in (None, cache.model):
            raise UserError(
                f"{cache.path(clip.name)} has stems by {model}, which the demo would replace; set "
                "SEPARATION_CACHE_DIR to a folder of the demo's own"
            )


def _hash(path: Path) -> str | None:
    """The SHA-256 of a regular file; None for anything else, such as a pipe or a dangling link."""
    return sha256(path) if path.is_file() else None


def _read_hashes(data_dir: Path) -> set[tuple[str, str]]:
    """{(SHA-256, path below `data_dir`)} of every file that a demo wrote or was about to write."""
    lines = _read_text(data_dir / HASHES_NAME).split("\n")
    return {(line[:64], line[66:]) for line in lines}


def _read_text(path: Path) -> str:
    """The text of a regular file; "" if it cannot be read, or is a pipe or a device."""
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _write_file(data_dir: Path, name: Path | str, content: bytes) -> None:
    """Writes a file of the demo; its hash first, so that no file of a killed run is unknown."""
    hashes = data_dir / HASHES_NAME
    try:
        with hashes.open("a", encoding="utf-8") as file:
            file.write(f"{hashlib.sha256(content).hexdigest()}  {Path(name).as_posix()}\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{hashes} cannot be written: {error.strerror}") from None
    with atomic_write(data_dir / name) as file:
        file.write(content)


def _render(clip: DemoClip, *, sr: int) -> np.ndarray:
    """The stems of a clip, (4, samples) float32."""
    return render(clip.genre, seed=clip.seed, seconds=clip.seconds, sr=sr, variation=clip.variation)


def _write_clip(
    data_dir: Path, clip: DemoClip, stems: np.ndarray, *, sr: int, cache: StemCache
) -> None:
    """Writes the mix as 16-bit .au and the stems to the cache."""
    mix = io.BytesIO()  # soundfile does not report a failed write, for example on a full disk
    soundfile.write(mix, stems.sum(axis=0), sr, format="AU", subtype="PCM_16")
    _write_file(data_dir, clip.path, mix.getvalue())
    cache.write(clip.name, stems, source=data_dir / clip.path)


def _tables(train: list[DemoClip], test: list[DemoClip]) -> dict[str, str]:
    """{name: text} of the masters: labels of both splits, genres, and the submission template."""
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
    return {
        name: "".join(f"{left}\t{right}\n" for left, right in rows) for name, rows in tables.items()
    }


def _write_manifest(data_dir: Path, manifest: dict[str, Any], *, complete: bool) -> None:
    """Writes demo.json; "whole", its key for complete, is that of all existing demos."""
    with atomic_write(data_dir / MANIFEST_NAME, "w") as file:
        json.dump(manifest | {"whole": complete}, file, indent=2)


def main() -> None:
    parser = cli.parser("Writes the hard demo; see the docstring of stemgenre/demo/demo.py.")
    parser.add_argument("--hard", metavar="FOLDER", required=True, help="where it is written")
    folder = parser.parse_args().hard
    make_hard_demo(folder)
    cli.log.info("the hard demo is in %s", folder)


if __name__ == "__main__":
    cli.run_script(main)
