"""The cached stems as wav files, to listen to.

    python export_separated_wav.py                                   every cached clip
    python export_separated_wav.py train_0 train_1                   these
    python export_separated_wav.py data/separated/train_0.npz        this file
    python export_separated_wav.py train_0 --channels vocals drums   only these stems
    python export_separated_wav.py --demo --out wav/demo             the demo's

Each clip gets a folder of its own below --out, with one 16-bit wav per stem.
"""

from pathlib import Path

import config
from stemgenre import command_line, demo, export, runtime
from stemgenre.cache import STEMS, StemCache
from stemgenre.settings import load_settings


def main():
    parser = command_line.parser(__doc__, config)
    parser.add_argument("clips", nargs="*", help="clip names or .npz files; also KEY=VALUE knobs")
    parser.add_argument("--channels", nargs="+", choices=STEMS, default=STEMS, help="stems wanted")
    parser.add_argument("--out", type=Path, default=Path("wav"), help="folder for the wav files")
    parser.add_argument("--demo", action="store_true", help="the clips of train.py --demo")
    arguments = parser.parse_intermixed_args()
    overrides, clips = command_line.split_overrides(arguments.clips)
    settings = load_settings(config, [*(demo.KNOBS if arguments.demo else []), *overrides])
    cache = StemCache(
        settings.cache_folder,
        model=settings.separation.separation_model,
        sample_rate=settings.features.sr,
    )
    export.export_wavs(cache, clips, channels=arguments.channels, out=arguments.out)


if __name__ == "__main__":
    runtime.run_script(main)
