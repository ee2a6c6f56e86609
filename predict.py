"""The genres of any audio files, with best_model.pth alone.

    python predict.py song.mp3                          one file
    python predict.py album/ "demos/*.wav" song.mp3     folders and patterns too
    python predict.py album/ --csv genres.csv           a table of every genre's probability
    python predict.py mix.flac --timeline               the genre over time, and a picture of it
    python predict.py album/ --stems stems/             keeps the stems for the next time
    python predict.py album/ --model runs/demo/best_model.pth SEPARATION_REPO=data/models
    python predict.py album/ --model a.pth b.pth        the mean of several models

A file that is longer than the model's clips is classified in windows of their length, half
overlapping. A file that cannot be read is named and the others are predicted; the exit code is
then 2.
"""

import logging
from pathlib import Path

from tqdm import tqdm

from stemgenre import cli
from stemgenre.errors import UserError
from stemgenre.predict.inputs import find_inputs, readable_names, total_seconds
from stemgenre.predict.outputs import (
    ConsoleTable,
    check_outputs,
    draw_timeline,
    write_csv,
    write_json,
)
from stemgenre.settings import ALIASES, FeatureSettings, is_settings_file, read_settings_file

log = logging.getLogger("stemgenre.predict")

SETTINGS = (  # those that are used here
    "OUTPUT_DIR", "BEST_MODEL_FILE", "SEPARATION_MODEL", "SEPARATION_REPO", "SEPARATION_OVERLAP",
    "SEPARATION_BATCH", "MICRO_BATCH", "USE_AMP", "TTA", "DEVICE", "NUM_THREADS",
)  # fmt: skip
BATCH_SIZE = 8  # windows per forward pass, for MICRO_BATCH="auto": more are not faster


def main() -> None:
    parser = cli.parser(__doc__, names=SETTINGS)
    parser.add_argument("files", nargs="*", help="files, folders, patterns; also KEY=VALUE")
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        metavar="PTH",
        help="default: BEST_MODEL_FILE below OUTPUT_DIR",
    )
    parser.add_argument("--csv", type=Path, help="write a table of every genre's probability")
    parser.add_argument("--json", type=Path, help="the same as json, with the genre over time")
    parser.add_argument("--timeline", action="store_true", help="show and draw genre over time")
    parser.add_argument("--out", type=Path, help="folder of the timeline's pictures: timeline")
    parser.add_argument("--stems", type=Path, help="folder that keeps the separated stems")
    args = parser.parse_intermixed_args()
    # Whatever follows `--model a.pth` and is no model file is what to predict, or KEY=VALUE.
    given = args.model or []
    suffixes = {".pth", *(Path(word).suffix for word in given[:1])} - {""}
    models = [w for i, w in enumerate(given) if not i or Path(w).suffix in suffixes]
    words, files = cli.split_words([*args.files, *(w for w in given if w not in models)])
    settings = cli.parse_settings(words)
    given = settings_given(words)
    if args.out and not args.timeline:
        raise UserError(f"--out {args.out} has no effect without --timeline")
    args.out = args.out or Path("timeline")
    pictures = args.out if args.timeline else None
    check_outputs(args.csv, args.json, pictures=pictures, stems=args.stems)
    paths, failures = find_inputs(files)
    for failure in failures:
        log.error("%s", failure["reason"])

    from stemgenre.predict.classifier import Classifier  # imports torch: after the arguments
    from stemgenre.runtime import start_runtime, thread_count

    separation, size = settings.separation, settings.train.micro_batch
    with start_runtime(settings.machine, repeats=False) as runtime:
        classifier = Classifier.load(
            *(models or [settings.paths.output(settings.paths.best_model_file)]),
            device=runtime.device,
            separation=separation,
            separation_model=separation.separation_model if "SEPARATION_MODEL" in given else None,
            stems=args.stems,
            batch_size=BATCH_SIZE if size == "auto" else size,
            use_amp=settings.train.use_amp,
            tta=settings.train.tta,
            threads=thread_count(settings.machine),
        )
        predict_files(classifier, paths, failures, args, runtime)
    if failures:
        raise UserError(f"{len(failures)} files could not be predicted; they are named above")


def settings_given(words) -> set[str]:
    """Names of the settings in settings files and KEY=VALUE.

    Raises UserError for a KEY=VALUE that would have no effect.
    """
    given = set()
    for word in words:
        if is_settings_file(word):
            given |= read_settings_file(Path(word)).keys()
            continue
        name = word.partition("=")[0].strip()
        name = ALIASES.get(name, name)
        if name.lower() in FeatureSettings.model_fields:
            raise UserError(f"{word} has no effect: {name} is saved with the model; leave it out")
        if name not in SETTINGS:
            raise UserError(f"{word} has no effect: predict.py does not use {name}; leave it out")
        given.add(name)
    return given


def predict_files(classifier, paths, failures, args, runtime) -> None:
    """Prints a row for each file as it is done, then writes the tables; adds to `failures`.

    If no file could be predicted, the tables stay as they are.
    """
    predictions, seconds = [], 0.0
    names = readable_names(paths) if args.timeline else {}
    label_ids = dict(zip(classifier.label_names, classifier.label_ids, strict=True))
    table = ConsoleTable(paths, classifier.label_names)
    with tqdm(total=total_seconds(paths), unit="s of audio", disable=not paths) as bar:

        def progress(more):
            nonlocal seconds
            seconds += more
            bar.update(round(seconds) - bar.n)
            if runtime.stop.signal_number:
                raise runtime.interrupted()

        try:
            for path, result in classifier.predict_all(paths, progress=progress):
                if isinstance(result, UserError):
                    log.error("%s", result)
                    failures.append({"file": str(path), "reason": str(result)})
                    progress(0)
                    continue
                predictions.append((path, result))
                table.show(path, result, timeline=args.timeline)
                if args.timeline:
                    draw_timeline(args.out / f"{names.get(path, path.stem)}.png", path.name, result)
        finally:  # also when stopped: finished predictions are not lost, nor an earlier table
            if args.csv and predictions:
                write_csv(args.csv, predictions, label_ids)
            if args.json and predictions:
                write_json(args.json, predictions, failures, label_ids)


if __name__ == "__main__":
    cli.run_script(main)
