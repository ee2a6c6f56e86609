"""What is in the data, before training: a page to look at, tables, and recordings there twice.

python eda.py                          writes eda/index.html and tables beside it
python eda.py DATA_DIR=gtzan           of another dataset
python eda.py --demo                   of train.py's demo, into runs/demo/eda

Pictures of stems need separated clips: they come after train.py has begun.
"""

import logging
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py, before torch is imported

import config
from stemgenre import command_line, demo, eda_page, runtime
from stemgenre.cache import StemCache
from stemgenre.errors import UserError
from stemgenre.files import remove_leftovers
from stemgenre.finding import find_audio
from stemgenre.metadata import load_competition
from stemgenre.overview import log_summary, take_stock, write_tables
from stemgenre.settings import load_settings
from stemgenre.stem_views import view_stems
from stemgenre.survey import Survey

log = logging.getLogger("stemgenre")


def main():
    parser = command_line.parser(__doc__, config)
    parser.add_argument("knobs", nargs="*", metavar="KEY=VALUE", help="set a knob for this run")
    parser.add_argument("--demo", action="store_true", help="the clips of train.py --demo")
    arguments = parser.parse_intermixed_args()
    demo_knobs = demo.KNOBS if arguments.demo else []
    settings = load_settings(config, [*demo_knobs, *arguments.knobs])
    with runtime.start(settings.machine) as run:
        if run.world > 1:
            raise UserError("eda.py runs in one process; start it with python, not with torchrun")
        look(settings, run, make_demo=arguments.demo)


def look(settings, run, *, make_demo=False):
    """Files in DATA_DIR -> measures, copies, tables, pictures of stems -> EDA_DIR."""
    features, folder = settings.features, Path(settings.paths.eda_dir)
    threads = runtime.worker_count(settings.machine)
    cache = StemCache(
        settings.cache_folder, model=settings.separation.separation_model, sample_rate=features.sr
    )
    survey = Survey(
        folder / "measured",  # what the network can hear of a clip, at the fastest tempo drawn
        seconds=features.clip_seconds * max(1.0, *settings.augment.time_stretch_rates),
    )
    remove_leftovers(folder, survey.folder)
    if make_demo:
        demo.prepare(settings.paths.data_dir, cache, features, run)

    competition = load_competition(
        settings.paths.data_dir, num_classes="auto", cache_dir=cache.folder
    )
    audio = find_audio(Path(settings.paths.data_dir), skip=cache.folder)
    overview = take_stock(
        competition,
        audio,
        survey,
        threads=threads,
        clip_seconds=features.clip_seconds,
        stopped=run.stop_requested,
    )
    if run.stop_requested():
        raise run.interrupted()
    views = view_stems(
        overview.readable("train"),
        cache,
        features,
        labels=competition.label_names,
        device=run.device,
        seed=settings.machine.seed,
        threads=threads,
        stopped=run.stop_requested,
    )
    if run.stop_requested():
        raise run.interrupted()
    write_tables(folder, overview, views)
    eda_page.write(folder / "index.html", overview, views, features)
    log_summary(overview)
    log.info("the page is %s, the tables are beside it", folder / "index.html")


if __name__ == "__main__":
    runtime.run_script(main)
