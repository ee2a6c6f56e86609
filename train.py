"""From a competition's files in data/ to submit.csv.

python train.py                               trains, then predicts the test clips
python train.py IMG_SIZE=300 BATCH_SIZE=8     with other settings than config.py's
python train.py recipes/quick.py              with a settings file laid over config.py
python train.py RESUME_FROM_CHECKPOINT=True   resumes a stopped run
python train.py --demo                        on a synthesised competition, nothing to download
python train.py --download-only               fetches the models, to train without a network
torchrun --nproc-per-node=4 train.py          on four GPUs
"""

from pathlib import Path
from typing import TYPE_CHECKING

from stemgenre import cli, status
from stemgenre.files import output_lock, remove_stale_temp_files, write_text
from stemgenre.settings import STEMS, format_settings

if TYPE_CHECKING:  # importing train.py does not load torch
    from stemgenre.training.members import MemberResult


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings for this run")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--demo", action="store_true", help="use a synthesised competition")
    modes.add_argument(
        "--download-only",
        action="store_true",
        help="download the models, for use without a network",
    )
    args = parser.parse_intermixed_args()
    settings = cli.parse_settings(args.settings, demo=args.demo)
    if args.download_only:
        from stemgenre.downloads import download_models

        download_models(settings)
        return
    if not args.demo:
        cli.check_data_dir(settings)

    from stemgenre.runtime import start_runtime  # imports torch: seconds, so after the arguments

    output = settings.paths.output
    with (
        start_runtime(settings.machine) as runtime,
        output_lock(output(""), is_main=runtime.is_main),
    ):
        cli.log_to_file(output(settings.paths.log_file), is_main=runtime.is_main)
        with runtime.status.recording(output(status.FILE), is_main=runtime.is_main):
            run_competition(settings, runtime, make_demo=args.demo)


def run_competition(settings, runtime, *, make_demo=False) -> None:
    """Files in DATA_DIR -> stems -> images -> trained networks -> SUBMIT_FILE."""
    import pandas as pd

    from stemgenre.data.competition import load_competition
    from stemgenre.data.extra import add_extra, extra_folders, with_extra
    from stemgenre.data.leakage import warn_of_leakage
    from stemgenre.data.source_hashes import once_each
    from stemgenre.data.split import GROUPS_FILE, make_splits
    from stemgenre.demo.demo import ensure_demo
    from stemgenre.report.metrics import write_classification_report
    from stemgenre.report.report import Report
    from stemgenre.runtime import check_shared_folders, log_device, thread_count
    from stemgenre.separation.cache import open_cache
    from stemgenre.separation.separate import separate_missing
    from stemgenre.submission import (
        Summary,
        note_earlier_submission,
        write_probabilities,
        write_submission,
    )
    from stemgenre.tracking.tracking import Tracking
    from stemgenre.training.checkpoint import merge_models
    from stemgenre.training.members import combine, members_to_resume, plan_members
    from stemgenre.training.model import build_model
    from stemgenre.training.stem_loader import StemLoader, check_batch_size

    paths, features, train = settings.paths, settings.features, settings.train
    tracking = Tracking(settings, runtime)
    is_quick = make_demo or settings.model.backbone == "cnn"
    log_device(runtime, quick_recipe="" if is_quick else "recipes/quick.py")
    cache = open_cache(settings)
    hash_source = once_each(cache.hash_source)
    check_shared_folders(paths.output(""), cache.folder, runtime=runtime)
    if runtime.is_main:
        remove_stale_temp_files(paths.output(""), paths.output("report"), older_than=0)
        remove_stale_temp_files(cache.folder)
    if make_demo:
        ensure_demo(paths.data_dir, open_cache(settings, waves=STEMS), features, runtime)

    # 1  files -> table of clips; of these, each network's own
    competition = load_competition(
        paths.data_dir,
        num_classes=settings.data.num_classes,
        cache_dir=settings.cache_folder,
        extra_folders=extra_folders(settings.data),
    )
    if runtime.is_main:
        groups_file = Path(paths.eda_dir) / GROUPS_FILE
        warn_of_leakage(competition, groups_file=groups_file, hash_source=hash_source)
    competition = add_extra(competition, settings, runtime, hash_source=hash_source)
    labels = {"label_names": competition.label_names, "label_ids": competition.label_ids}
    splits = make_splits(
        settings, competition.train, competition.label_names, hash_source=hash_source
    )
    splits = [(with_extra(part, valid, competition.extra), valid) for part, valid in splits]
    members = plan_members(settings, splits, **labels)
    begun = members_to_resume(members)
    fewest = min(len(member.train) for member in members)
    check_batch_size(train.batch_size, world_size=runtime.world_size, clips=fewest)
    classes, channels = len(competition.label_ids), len(features.channel_names)
    # Built here only to say, before the separation, if its weights cannot be loaded.
    build_model(settings.model, num_classes=classes, in_channels=channels, seed=0)
    if runtime.is_main:
        write_text(paths.output("settings_used.py"), format_settings(settings))
        note_earlier_submission(paths.output(paths.submit_file))
        for member in members:
            member.clean_folder(resuming=member in begun)

    # 2  clips -> stems, or with CHANNELS=mix their decoded waves
    summary = Summary()
    with summary.stage("separation"):
        clips = pd.concat([competition.train, competition.test, competition.extra])
        separate_missing(clips, cache, settings, runtime, hash_source=hash_source)
    loader = StemLoader(
        cache,
        threads=thread_count(settings.machine),
        device=runtime.device,
        device_cache=settings.machine.device_cache,
    )

    # 3, 4  stems -> images -> network, for each seed and fold
    results = []
    overview = Report(settings, competition, competition.train, competition.train, runtime)
    for number, member in enumerate(members, start=1):
        runtime.status.update(
            network=member.name, network_number=number, networks=len(members), epoch=0, step=0
        )
        if member.name:
            cli.log.info("network %d of %d: %s", number, len(members), member.name)
            overview.show_networks(members, results)
        resuming = member in begun
        again = "RESUME_FROM_CHECKPOINT=True" if begun or results else "the same command"
        with tracking.network(member.name, member.settings) as tracker:
            results.append(
                train_network(
                    member, competition, loader, runtime, summary, resuming, again, tracker
                )
            )

    # 5  networks -> submit.csv
    test_targets = competition.test["target"].to_numpy()
    predictions = combine(results, test_targets=test_targets)
    if runtime.is_main:
        if len(members) > 1:
            models = [member.best_model_path for member in members]
            merge_models(models, paths.output(paths.best_model_file))
            overview.show_networks(members, results, predictions, loader)
            tracking.finish(predictions, label_names=competition.label_names)
        predicted = predictions.test_logits.argmax(1).tolist()
        write_submission(paths.output(paths.submit_file), competition, predicted)
        write_probabilities(paths.output(""), competition, predictions)
        write_classification_report(
            paths.output("classification_report.csv"),
            predictions.valid["target"].to_numpy(),
            predictions.valid_logits,
            competition.label_names,
        )
        summary.write(paths.output("summary.json"), competition, results, predictions)


def train_network(
    member, competition, loader, runtime, summary, resuming, again, tracker
) -> "MemberResult":
    """The MemberResult of one network: trained, and its validation and test clips predicted."""
    from stemgenre.features.log_mel import Frontend
    from stemgenre.report.report import Report
    from stemgenre.training import checkpoint
    from stemgenre.training.inference import compute_channel_stats, compute_logits, load_models
    from stemgenre.training.members import MemberResult
    from stemgenre.training.model import build_model
    from stemgenre.training.saving import restore
    from stemgenre.training.trainer import Trainer

    settings, paths = member.settings, member.settings.paths
    labels = {"label_names": competition.label_names, "label_ids": competition.label_ids}
    saved = resuming and checkpoint.load_resume_checkpoint(settings, member.run_signature)

    # 3  stems -> images
    with summary.stage("channel statistics"):
        if saved:
            channel_stats = saved["channel_stats"]
        else:
            channel_stats = compute_channel_stats(
                loader, member.train, features=settings.features, runtime=runtime, again=again
            )
    frontend = Frontend(settings.features, device=runtime.device, channel_stats=channel_stats)

    # 4  images -> network
    net = build_model(
        settings.model,
        num_classes=len(competition.label_ids),
        in_channels=len(settings.features.channel_names),
        seed=settings.machine.seed,
        resuming=bool(saved),
    )
    trainer = Trainer(
        net,
        frontend,
        loader,
        train_clips=member.train,
        valid_clips=member.valid,
        **labels,
        settings=settings,
        runtime=runtime,
        run_signature=member.run_signature,
    )
    if saved:
        restore(trainer, saved)
    report = Report(settings, competition, member.train, member.valid, runtime)
    report.begin(trainer.state)
    tracker.begin(trainer.state, run_id=trainer.run_id, steps_per_epoch=trainer.steps_per_epoch)

    def after_epoch(state, valid_logits):
        report.update(state, valid_logits)
        tracker.log_epoch(state.history[-1])

    with summary.stage("training"):
        state = trainer.fit(after_epoch=after_epoch, after_step=tracker.log_step)

    with summary.stage("prediction"):
        clips = len(member.valid) + len(competition.test)
        runtime.status.stage("prediction", total=clips)
        (best,) = load_models(paths.output(paths.best_model_file), device=runtime.device)
        valid_logits, test_logits = (
            compute_logits(
                best.net,
                best.frontend,
                loader,
                clips,
                tta=settings.train.tta,
                micro_batch=trainer.micro_batch,
                amp_dtype=trainer.amp_dtype,
                runtime=runtime,
                may_stop=True,
            )
            for clips in (member.valid, competition.test)
        )
    report.finish(state, best, loader, valid_logits, test_logits)
    tracker.finish(
        member.valid, valid_logits, label_names=competition.label_names, best_epoch=state.best_epoch
    )
    return MemberResult(member, state, valid_logits, test_logits)


if __name__ == "__main__":
    cli.run_script(main)
