"""From a competition's files in data/ to submit.csv.

python train.py                               trains, then predicts the test clips
python train.py IMG_SIZE=300 BATCH_SIZE=8     with other settings than config.py's
python train.py recipes/quick.py              with a settings file laid over config.py
python train.py RESUME_FROM_CHECKPOINT=True   resumes a stopped run
python train.py --demo                        on a synthesised competition, nothing to download
torchrun --nproc-per-node=4 train.py          on four GPUs
"""

from stemgenre import cli
from stemgenre.files import output_lock, remove_stale_temp_files, write_text
from stemgenre.settings import format_settings


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings for this run")
    parser.add_argument("--demo", action="store_true", help="use a synthesised competition")
    args = parser.parse_intermixed_args()
    settings = cli.parse_settings(args.settings, demo=args.demo)
    if not args.demo:
        cli.check_data_dir(settings)

    from stemgenre.runtime import start_runtime  # imports torch: seconds, so after the arguments

    output = settings.paths.output
    with (
        start_runtime(settings.machine) as runtime,
        output_lock(output(""), is_main=runtime.is_main),
    ):
        cli.log_to_file(output(settings.paths.log_file), is_main=runtime.is_main)
        run_competition(settings, runtime, make_demo=args.demo)


def run_competition(settings, runtime, *, make_demo=False) -> None:
    """Files in DATA_DIR -> stems -> images -> trained network -> SUBMIT_FILE."""
    import pandas as pd

    from stemgenre.data.competition import load_competition
    from stemgenre.data.split import load_groups, split_clips
    from stemgenre.demo.demo import ensure_demo
    from stemgenre.features.log_mel import Frontend
    from stemgenre.report.report import Report
    from stemgenre.runtime import check_shared_folders, log_device, thread_count
    from stemgenre.separation.cache import StemCache
    from stemgenre.separation.separate import separate_missing
    from stemgenre.submission import Summary, write_probabilities, write_submission
    from stemgenre.training import checkpoint
    from stemgenre.training.inference import compute_channel_stats, compute_logits, load_model
    from stemgenre.training.model import build_model
    from stemgenre.training.stem_loader import StemLoader, check_batch_size
    from stemgenre.training.trainer import Trainer

    paths, features, seed = settings.paths, settings.features, settings.machine.seed
    log_device(runtime, quick_recipe="" if make_demo else "recipes/quick.py")
    cache = StemCache(
        settings.cache_folder, model=settings.separation.separation_model, sample_rate=features.sr
    )
    check_shared_folders(paths.output(""), cache.folder, runtime=runtime)
    if runtime.is_main:
        remove_stale_temp_files(paths.output(""), paths.output("report"), older_than=0)
        remove_stale_temp_files(cache.folder)
        write_text(paths.output("settings_used.py"), format_settings(settings))
    if make_demo:
        ensure_demo(paths.data_dir, cache, features, runtime)

    # 1  files -> table of clips
    competition = load_competition(
        paths.data_dir, num_classes=settings.data.num_classes, cache_dir=cache.folder
    )
    train, valid = split_clips(
        competition.train,
        test_size=settings.data.test_size,
        seed=seed,
        label_names=competition.label_names,
        groups=load_groups(settings, competition.train),
    )
    labels = {"label_names": competition.label_names, "label_ids": competition.label_ids}
    run_signature = checkpoint.run_signature(settings, train, **labels)
    saved = checkpoint.load_resume_checkpoint(settings, run_signature)
    check_batch_size(settings.train.batch_size, world_size=runtime.world_size, clips=len(train))
    net = build_model(
        settings.model, num_classes=len(competition.label_ids), seed=seed, resuming=bool(saved)
    )

    if runtime.is_main and not saved:
        checkpoint.set_aside(paths.output(paths.checkpoint_file))

    # 2  clips -> stems
    summary = Summary()
    with summary.stage("separation"):
        separate_missing(pd.concat([competition.train, competition.test]), cache, settings, runtime)

    # 3  stems -> images
    loader = StemLoader(
        cache,
        features,
        settings.augment,
        threads=thread_count(settings.machine),
        device=runtime.device,
        device_cache=settings.machine.device_cache,
    )
    with summary.stage("channel statistics"):
        if saved:
            channel_stats = saved["channel_stats"]
        else:
            channel_stats = compute_channel_stats(loader, train, features=features, runtime=runtime)
    frontend = Frontend(features, device=runtime.device, channel_stats=channel_stats)

    # 4  images -> network
    trainer = Trainer(
        net,
        frontend,
        loader,
        train_clips=train,
        valid_clips=valid,
        **labels,
        settings=settings,
        runtime=runtime,
        run_signature=run_signature,
    )
    if saved:
        trainer.restore(saved)
    report = Report(settings, competition, train, valid, runtime)
    report.begin(trainer.state)
    with summary.stage("training"):
        state = trainer.fit(after_epoch=report.update)

    # 5  network -> submit.csv
    with summary.stage("prediction"):
        best = load_model(paths.output(paths.best_model_file), runtime.device)
        valid_logits, test_logits = (
            compute_logits(
                best.net,
                best.frontend,
                loader,
                clips,
                micro_batch=trainer.micro_batch,
                amp_dtype=trainer.amp_dtype,
                runtime=runtime,
            )
            for clips in (valid, competition.test)
        )
    if runtime.is_main:
        predicted = test_logits.argmax(1).tolist()
        write_submission(paths.output(paths.submit_file), competition, predicted)
        write_probabilities(paths.output(""), competition, valid, valid_logits, test_logits)
        summary.write(
            paths.output("summary.json"), state, competition, test_logits, train=train, valid=valid
        )
        report.finish(state, best, loader, valid_logits, test_logits)


if __name__ == "__main__":
    cli.run_script(main)
