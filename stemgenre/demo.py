"""A competition to try everything on, with nothing to download: clips of the synthesised band.

The files look as the real ones do (see data/README.md). Unlike a real competition it comes with the
true stems, put straight into the cache of separated stems, and with the labels of the test clips.
"""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from stemgenre.band import GENRES, render
from stemgenre.errors import UserError
from stemgenre.files import replacing

KNOBS = (  # of train.py --demo, before those of its command line
    "DATA_DIR=data/demo",
    "OUTPUT_DIR=runs/demo",
    "EDA_DIR=runs/demo/eda",
    "SEPARATION_MODEL=synthesised",
    "SR=11025",
    "CLIP_SECONDS=8",
    "N_FFT=1024",
    "HOP_LENGTH=256",
    "IMG_SIZE=72",
    "AUGMENT_PROBABILITY=0.15",
    "AUGMENT_ADD_NOISE=False",  # the demo's quiet instruments are quieter than the noise
    "PRETRAINED=False",
    "FREEZE_STAGES=0",
    "HEAD_DROPOUT=(0.2, 0)",
    "STOCHASTIC_DEPTH=0",
    "EPOCHS=20",
    "BATCH_SIZE=16",
    "LR=1e-3",
)
SEED = 0  # of the music
TRAIN_PER_GENRE, TEST_PER_GENRE = 32, 4

FORMAT = 1  # to be raised whenever the same parameters would give other files
RECEIPT = "demo.json"  # what is in the folder, and whether all of it is
MASTERS = ("train_master.tsv", "label_master.tsv", "sample_submit.tsv", "test_master.tsv")
FOLDERS = 2  # train_sound_1, train_sound_2, test_sound_1, ...
SPREAD = 0.06  # clips are up to this fraction longer or shorter than asked for


@dataclass(frozen=True)
class Clip:
    """One clip to be written: what is played, how long, and where it goes below the data folder."""

    name: str  # in the cache
    genre: str
    seed: int
    seconds: float
    path: Path

    @property
    def label_id(self):
        """The position of the genre in GENRES."""
        return GENRES.index(self.genre)


def write_demo(
    data_dir,
    *,
    seed,
    train_per_genre,
    test_per_genre,
    seconds,
    sr,
    cache,
    stopped=lambda: False,
):
    """Writes a competition into the folder `data_dir` and its true stems into `cache`, a StemCache.

    seconds: about how long a clip is; sr: sample rate in Hz. The same parameters give the same
    bytes. A demo that is whole is left as it is; one that is not, or that has other parameters, is
    written anew. Ends early once `stopped()`. Raises UserError if there is data in the folder that
    is not a demo.
    """
    data_dir = Path(data_dir)
    receipt = {
        "format": FORMAT,
        "seed": seed,
        "train_per_genre": train_per_genre,
        "test_per_genre": test_per_genre,
        "seconds": seconds,
        "sr": sr,
    }
    train = draw_clips("train", train_per_genre, seconds=seconds, seed=[seed, 0])
    test = draw_clips("test", test_per_genre, seconds=seconds, seed=[seed, 1])
    if is_whole(data_dir, receipt, [*train, *test], cache):
        return
    make_room(data_dir)
    write_receipt(data_dir, receipt | {"whole": False})
    write_masters(data_dir, train, test)  # first: a folder with masters is another dataset's
    for clip in tqdm([*train, *test], desc="synthesising the demo", unit="clip"):
        if stopped():
            return
        write_clip(data_dir, clip, sr=sr, cache=cache)
    write_receipt(data_dir, receipt | {"whole": True})


def draw_clips(split, per_genre, *, seconds, seed):
    """The clips of one split ("train" or "test"), in an order that says nothing about genres."""
    rng = np.random.default_rng(seed)
    genres = rng.permutation(np.repeat(GENRES, per_genre))
    clips = []
    for number, genre in enumerate(genres):
        folder = f"{split}_sound_{1 + number * FOLDERS // len(genres)}"
        clips.append(
            Clip(
                name=f"{split}_{number}",
                genre=str(genre),
                seed=int(rng.integers(2**31)),
                seconds=seconds * rng.uniform(1 - SPREAD, 1 + SPREAD),
                path=Path(folder, folder, f"{split}_{number}.au"),
            )
        )
    return clips


def is_whole(data_dir, receipt, clips, cache):
    """Whether the folder and the cache hold all of the demo that the receipt describes."""
    try:
        found = json.loads((data_dir / RECEIPT).read_text())
    except (OSError, ValueError):
        return False
    return (
        found == receipt | {"whole": True}
        and all((data_dir / name).is_file() for name in MASTERS)
        and all((data_dir / clip.path).is_file() for clip in clips)
        and all(cache.is_current(clip.name, data_dir / clip.path) for clip in clips)
    )


def make_room(data_dir):
    """Deletes an earlier demo. Raises UserError if the data in the folder is not a demo's."""
    folders = sorted(path for path in data_dir.glob("*_sound_*") if path.is_dir())
    stems = {Path(name).stem for name in MASTERS}
    masters = sorted(path for path in data_dir.glob("*.[ct]sv") if path.stem in stems)
    if (folders or masters) and not (data_dir / RECEIPT).is_file():
        raise UserError(
            f"{data_dir} holds data that is not a demo ({[*masters, *folders][0].name}); "
            "choose another folder for the demo"
        )
    for folder in folders:
        shutil.rmtree(folder)
    for master in masters:
        master.unlink()


def write_clip(data_dir, clip, *, sr, cache):
    """Writes the mix as 16-bit .au and the stems into the cache."""
    stems = render(clip.genre, seed=clip.seed, seconds=clip.seconds, sr=sr)  # (4, T) float32
    path = data_dir / clip.path
    mix = io.BytesIO()  # soundfile does not hand on the error of a file that cannot grow
    soundfile.write(mix, stems.sum(axis=0), sr, format="AU", subtype="PCM_16")
    with replacing(path) as file:
        file.write(mix.getbuffer())
    cache.write(clip.name, stems, source=path)


def write_masters(data_dir, train, test):
    """Writes the four tables: the labels of the clips, the genres, and the form of a submission."""
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
        with replacing(data_dir / name, "w", newline="") as file:
            file.writelines(f"{left}\t{right}\n" for left, right in rows)


def write_receipt(data_dir, receipt):
    """Writes what the folder holds, as json."""
    with replacing(data_dir / RECEIPT, "w") as file:
        json.dump(receipt, file, indent=2)


def prepare(data_dir, cache, features, run):
    """Makes the demo of `train.py --demo`; of several processes, one does."""
    if run.is_main:
        write_demo(
            data_dir,
            seed=SEED,
            train_per_genre=TRAIN_PER_GENRE,
            test_per_genre=TEST_PER_GENRE,
            seconds=features.clip_seconds,
            sr=features.sr,
            cache=cache,
            stopped=lambda: run.stop.signal_number != 0,
        )
    if run.stop_requested():
        raise run.interrupted()
