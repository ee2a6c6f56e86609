"""From a competition's files in data/ to submit.csv.

python train.py                               trains, then predicts the test clips
python train.py IMG_SIZE=300 BATCH_SIZE=8     with other knobs than config.py's
python train.py RESUME_FROM_CHECKPOINT=True   goes on where the last run was stopped
python train.py --demo                        on a synthesised competition, nothing to download
torchrun --nproc-per-node=4 train.py          on four cards
"""

import os

# Idle threads soon sleep instead of spinning, which makes a step on a busy CPU much slower
# (benchmarks/cpu.py). Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pandas as pd

import config
from stemgenre import checkpoint, command_line, demo, lock, runtime
from stemgenre.cache import StemCache
from stemgenre.dataset import StemReader, split_clips
from stemgenre.files import remove_leftovers
from stemgenre.frontend import FrontEnd
from stemgenre.groups import groups_to_keep
from stemgenre.inference import load_best, measure_channels, predict
from stemgenre.metadata import load_competition
from stemgenre.model import build_model
from stemgenre.report import Report
from stemgenre.settings import load_settings
from stemgenre.stems import separate_missing
from stemgenre.submission import Summary, write_probabilities, write_submission
from stemgenre.trainer import Trainer, check_batch_size


def main():
    parser = command_line.parser(__doc__, config)
    parser.add_argument("knobs", nargs="*", metavar="KEY=VALUE", help="set a knob for this run")
    parser.add_argument(
        "--demo", action="store_true", help="make and use a synthesised competition"
    )
    arguments = parser.parse_intermixed_args()
    demo_knobs = demo.KNOBS if arguments.demo else []
    settings = load_settings(config, [*demo_knobs, *arguments.knobs])
    output = settings.paths.output
    with runtime.start(settings.machine) as run, lock.hold(output(""), run):
        runtime.log_to_file(output(settings.paths.log_file), run)
        run_competition(settings, run, make_demo=arguments.demo)


def run_competition(settings, run, *, make_demo=False):
    """Files in DATA_DIR -> stems -> images -> trained network -> SUBMIT_FILE."""
    paths, features, seed = settings.paths, settings.features, settings.machine.seed
    summary = Summary()
    cache = StemCache(
        settings.cache_folder, model=settings.separation.separation_model, sample_rate=features.sr
    )
    remove_leftovers(paths.output(""), paths.output("report"), cache.folder)
    if make_demo:
        demo.prepare(paths.data_dir, cache, features, run)

    clips = load_competition(
        paths.data_dir, num_classes=settings.data.num_classes, cache_dir=cache.folder
    )
    train, valid = split_clips(
        clips.train,
        test_size=settings.data.test_size,
        seed=seed,
        label_names=clips.label_names,
        groups=groups_to_keep(settings, clips.train),
    )
    identity = checkpoint.run_identity(settings, clips, train)
    saved = checkpoint.to_resume_from(settings, identity)

    check_batch_size(settings.train.batch_size, run.world, len(train))
    model = build_model(
        settings.model, num_classes=len(clips.label_ids), seed=seed, resuming=bool(saved)
    )

    with summary.stage("separation"):
        separate_missing(pd.concat([clips.train, clips.test]), cache, settings, run)
    reader = StemReader(
        cache,
        features,
        settings.augment,
        threads=runtime.worker_count(settings.machine),
        device=run.device,
        device_cache=settings.machine.device_cache,
    )

    with summary.stage("channel statistics"):
        channels = saved["channels"] if saved else measure_channels(features, reader, train, run)
    frontend = FrontEnd(features, device=run.device, channels=channels)

    trainer = Trainer(model, frontend, reader, train, valid, settings, run, identity)
    if saved:
        trainer.restore(saved)
    report = Report(settings, clips, train, valid, run)
    report.begin(trainer.progress)
    with summary.stage("training"):
        progress = trainer.fit(after_epoch=report.update)

    with summary.stage("prediction"):
        best = load_best(paths.output(paths.best_model_file), run.device)
        valid_logits, logits = (
            predict(best.model, best.frontend, reader, part, settings.train, run)
            for part in (valid, clips.test)
        )
    if run.is_main:
        write_submission(paths.output(paths.submit_file), clips, logits.argmax(1).tolist())
        write_probabilities(paths.output(""), clips, valid, valid_logits, logits)
        summary.write(
            paths.output("summary.json"), progress, clips, logits, train=train, valid=valid
        )
        report.finish(progress, best, reader, valid_logits, logits)


if __name__ == "__main__":
    runtime.run_script(main)
