"""What is in the data: file statistics, duplicates and leakage, stems, as a page and as tables.

python eda.py                          writes eda/index.html and tables beside it
python eda.py DATA_DIR=gtzan           of another dataset
python eda.py --demo                   of train.py's demo, into runs/demo/eda

It needs no separated clips; those that train.py has separated so far are shown with their
stems; with CHANNELS=mix, those that it has decoded are shown as the network gets them.
"""

from pathlib import Path

from stemgenre import cli
from stemgenre.errors import UserError
from stemgenre.files import check_writable, remove_stale_temp_files
from stemgenre.settings import STEMS


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings for this run")
    parser.add_argument(
        "--demo", action="store_true", help="use train.py's synthesised competition"
    )
    args = parser.parse_intermixed_args()
    settings = cli.parse_settings(args.settings, demo=args.demo)
    if not args.demo:
        cli.check_data_dir(settings)

    from stemgenre.runtime import start_runtime  # imports torch: seconds, so after the arguments

    with start_runtime(settings.machine) as runtime:
        if runtime.world_size > 1:
            raise UserError("eda.py runs in one process; start it with python, not with torchrun")
        run_eda(settings, runtime, make_demo=args.demo)


def run_eda(settings, runtime, *, make_demo=False) -> None:
    """Files in DATA_DIR -> audio statistics, duplicates, stem statistics -> page and tables."""
    from stemgenre.data.audio_stats import AudioStatsCache
    from stemgenre.data.competition import load_competition
    from stemgenre.data.extra import extra_folders
    from stemgenre.data.find_files import find_clips
    from stemgenre.demo.demo import ensure_demo
    from stemgenre.eda.dataset_summary import analyze_dataset, log_summary, write_tables
    from stemgenre.eda.page import write_page
    from stemgenre.eda.stem_stats import compute_stem_stats
    from stemgenre.runtime import thread_count
    from stemgenre.separation.cache import open_cache

    features, folder = settings.features, Path(settings.paths.eda_dir)
    threads = thread_count(settings.machine)
    cache = open_cache(settings)
    stats_cache = AudioStatsCache.of(settings)
    check_writable(folder)
    remove_stale_temp_files(folder, stats_cache.folder)
    if make_demo:
        stem_cache = open_cache(settings, waves=STEMS)
        ensure_demo(settings.paths.data_dir, stem_cache, features, runtime)

    not_own = extra_folders(settings.data)
    competition = load_competition(
        settings.paths.data_dir,
        num_classes="auto",
        cache_dir=settings.cache_folder,
        extra_folders=not_own,
    )
    summary = analyze_dataset(
        competition,
        find_clips(Path(settings.paths.data_dir), skip=[settings.cache_folder, *not_own]),
        stats_cache,
        threads=threads,
        clip_seconds=features.clip_seconds,
        stopped=runtime.sync_stop,
    )
    if runtime.sync_stop():
        raise runtime.interrupted("stopped; the same command goes on from what it has cached")
    stem_stats = compute_stem_stats(
        summary.readable("train"),
        cache,
        features,
        labels=competition.label_names,
        device=runtime.device,
        seed=settings.machine.seed,
        threads=threads,
        stopped=runtime.sync_stop,
    )
    if runtime.sync_stop():
        raise runtime.interrupted("stopped; the same command goes on from what it has cached")
    write_tables(folder, summary, stem_stats)
    write_page(folder / "index.html", summary, stem_stats, features)
    log_summary(summary)
    cli.log.info("the page is %s, the tables are beside it", folder / "index.html")


if __name__ == "__main__":
    cli.run_script(main)
