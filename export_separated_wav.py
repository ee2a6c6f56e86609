"""The cached stems as wav files, to listen to.

    python export_separated_wav.py                                   every cached clip
    python export_separated_wav.py train_0 train_1                   these clips
    python export_separated_wav.py data/separated/train_0.npz        this file
    python export_separated_wav.py train_0 --stems vocals drums      only these stems
    python export_separated_wav.py --demo --out wav/demo             the demo's clips

Each clip gets a folder of its own below --out, with one 16-bit wav per stem.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from stemgenre import cli
from stemgenre.data.find_files import AUDIO_SUFFIXES, natural_key
from stemgenre.errors import UserError
from stemgenre.files import atomic_write
from stemgenre.separation.cache import StemCache, open_cache
from stemgenre.settings import STEMS

NO_STEMS = "has no stems yet; python train.py separates the clips, but not with CHANNELS=mix"
MAX_PEAK = 32767 / 32768  # of full scale, in 16-bit wav


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("clips", nargs="*", help="clip names or .npz files; also settings")
    parser.add_argument(
        "--stems", nargs="+", metavar="STEM", help=f"some of {', '.join(STEMS)}; all by default"
    )
    parser.add_argument("--out", type=Path, default=Path("wav"), help="folder for the wav files")
    parser.add_argument("--demo", action="store_true", help="the clips of train.py --demo")
    args = parser.parse_intermixed_args()
    given = args.stems or STEMS
    # Whatever follows `--stems drums` and is no stem is a clip, or KEY=VALUE.
    words, clips = cli.split_words(
        [*args.clips, *(word for word in given[1:] if word not in STEMS)]
    )
    if given[0] not in STEMS:
        raise UserError(f"--stems {given[0]} is unknown; choose from {', '.join(STEMS)}")
    stems = [stem for stem in STEMS if stem in given]
    settings = cli.parse_settings(words, demo=args.demo)
    data_dir = Path(settings.paths.data_dir)
    if args.out.resolve().is_relative_to(data_dir.resolve()):
        raise UserError(
            f"--out {args.out} is in DATA_DIR={data_dir}, where a folder of stems is a clip; "
            "choose another folder"
        )
    cache = open_cache(settings, waves=STEMS)
    if not cache.folder.is_dir() and not any(name.endswith(".npz") for name in clips):
        cli.check_data_dir(settings)
    mix_only = settings.features.cached_waves != STEMS
    if mix_only and not clips and not any(cache.folder.glob("*.npz")):
        raise UserError(
            f"CHANNELS=mix separates nothing, and {cache.folder} has no stems; python train.py "
            f"CHANNELS={','.join(STEMS)} separates the clips"
        )
    export_wavs(cache, clips, stems=stems, out=args.out)


def export_wavs(cache: StemCache, names: Sequence[str], *, stems: Sequence[str], out: Path) -> None:
    """Writes `out`/<clip>/<stem>.wav, 16 bit, for each of `stems` of the named clips.

    `names` are clip names or paths of .npz entries; none means every entry of the cache. Raises
    UserError, after the others are written, if some cannot be read.
    """
    paths = list(dict.fromkeys(_entry_path(cache, name) for name in names))
    if not names:
        paths = sorted(cache.folder.glob("*.npz"), key=natural_key)
    if not paths:
        raise UserError(f"{cache.folder} {NO_STEMS}")
    failures, attenuated, folders = [], [], {}
    for path in tqdm(paths, desc="wav", unit="clip"):
        try:
            if folders.setdefault(path.stem.casefold(), path.resolve()) != path.resolve():
                raise UserError(
                    f"{path} has the name of another entry; export it into another --out"
                )
            _check_inside(out, path.stem, stems, path)
            waves, rate = cache.read_file(path)  # (4, samples)
        except UserError as error:
            failures.append(str(error))
            continue
        gain_db = export_clip(waves.astype(np.float32), rate, stems=stems, folder=out / path.stem)
        if gain_db < 0:
            attenuated.append(f"{path.stem} by {-gain_db:.1f} dB")
    for line in attenuated:
        cli.log.info("all stems attenuated equally to prevent clipping: %s", line)
    cli.log.info("%d clips written below %s", len(paths) - len(failures), out)
    if failures:
        raise UserError("\n".join(failures))


def _check_inside(out, clip, stems, path):
    """Raises UserError if a clip's wav files would lie outside `out`: links, or a clip named .."""
    for stem in stems:
        target = (out / clip / f"{stem}.wav").resolve()
        if clip == ".." or not target.is_relative_to(out.resolve()):
            raise UserError(f"{path} would be written to {target}, outside {out}")


def _entry_path(cache, name):
    """The entry of a clip by its name, its file name in the tables, or the entry's own path."""
    if name.endswith(".npz"):
        paths = [Path(name)]
    else:
        paths = [cache.path(name)]
        if name.lower().endswith(AUDIO_SUFFIXES):
            paths.append(cache.path(Path(name).stem))
    for path in paths:
        if path.is_file():
            return path
    if not name.endswith(".npz") and not any(cache.folder.glob("*.npz")):
        raise UserError(f"{cache.folder} {NO_STEMS}")
    raise UserError(
        f"{paths[0]} does not exist; python export_separated_wav.py without a name exports all"
    )


def export_clip(
    waves: np.ndarray, sample_rate: int, *, stems: Sequence[str], folder: Path
) -> float:
    """The gain in dB, 0 or less, at which the chosen stems of a clip were written.

    `waves` are its stems, (4, samples) float32. All have the same gain, so that they sum to the mix
    even if one of them would clip.
    """
    gain = min(1.0, MAX_PEAK / max(np.abs(waves).max(), 1e-9))
    for stem in stems:
        wave = waves[STEMS.index(stem)] * gain
        data = io.BytesIO()  # soundfile hides the error when a file on disk cannot grow
        soundfile.write(data, wave, sample_rate, format="WAV", subtype="PCM_16")
        with atomic_write(folder / f"{stem}.wav") as file:
            file.write(data.getbuffer())
    return 20 * np.log10(gain)


if __name__ == "__main__":
    cli.run_script(main)
