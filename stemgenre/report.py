"""report/index.html: how the training goes while it goes on, and at its end what came of it."""

import datetime
import functools
import logging
import time
import traceback

from stemgenre import report_sections as sections
from stemgenre.errors import UserError
from stemgenre.files import replacing
from stemgenre.page import document, note

log = logging.getLogger(__name__)

REFRESH_SECONDS = 10
SHARE = 0.05  # of a run's time, at most, that its pages may take before the last
FIRST_SECONDS = 1.0  # that a page is thought to take until one has been written


class Report:
    """The page at report/index.html below OUTPUT_DIR, written by rank 0.

    `clips` is the Competition, `train` and `valid` its split. A page that cannot be written is a
    warning: it must not cost the training.
    """

    def __init__(self, settings, clips, train, valid, run):
        self.settings, self.clips, self.train, self.valid = settings, clips, train, valid
        self.run = run
        self.path = settings.paths.output("report") / "index.html"
        self.seconds, self.written_at = FIRST_SECONDS, time.monotonic()

    def begin(self, progress):
        """The page before the first epoch: what is run, and what a resumed run has done."""
        self._write(lambda: self._curves(progress), progress)

    def update(self, progress, logits):
        """The page after an epoch; `logits` (clips, genres) are those of the validation clips.

        Left out where pages would take more than SHARE of the time: on a card, an epoch can take
        no longer than a page. The next that is due shows all epochs, and finish() is always there.
        """
        if self.seconds > SHARE * (time.monotonic() - self.written_at):
            return
        which = f"epoch {progress.epoch}"
        self._write(lambda: [*self._curves(progress), *self._results(logits, which)], progress)

    def finish(self, progress, best, reader, valid_logits, test_logits):
        """The page at the end, about the best epoch's model: `best`, a Trained, and its logits.

        `reader` is a StemReader, for the images and the players of the mistakes.
        """

        def parts():
            yield from self._curves(progress)
            yield from self._results(valid_logits, f"best epoch ({progress.best_epoch})")
            yield sections.mistakes(self.valid, valid_logits, best, reader)
            yield sections.test_clips(self.clips, test_logits)

        self._write(parts, progress, finished=True)

    @functools.cached_property
    def _environment(self):
        return sections.environment(self.run)

    def _curves(self, progress):
        return [sections.curves(progress)] if progress.history else []

    def _results(self, logits, which):
        targets, names = self.valid["target"].to_numpy(), self.clips.label_names
        probabilities = logits.softmax(1).numpy()
        return [
            sections.confusion(targets, probabilities, names, which),
            sections.genres(targets, probabilities, names, self.train["target"], which),
            sections.calibration(targets, probabilities, which),
        ]

    def _write(self, parts, progress, *, finished=False):
        """Writes the page with what parts() gives between its head and its settings."""
        if not self.run.is_main:
            return
        started = time.monotonic()
        try:
            page = document(
                "Stem Genre: training",
                note(self._state(progress, finished)),
                sections.facts(progress, len(self.valid)),
                *parts(),
                sections.knobs(self.settings),
                self._environment,
                refresh_seconds=None if finished else REFRESH_SECONDS,
            )
            with replacing(self.path, "w", encoding="utf-8") as file:
                file.write(page)
        except UserError as error:
            log.warning("%s; the run goes on without it", error)
        except Exception:  # whatever it is, it is no reason to lose a training
            log.warning(
                "%s cannot be made, a mistake of the program itself; the run goes on:\n%s",
                self.path,
                traceback.format_exc(),
            )
        self.written_at = time.monotonic()
        self.seconds = self.written_at - started

    def _state(self, progress, finished):
        """A line on how far the run is."""
        now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
        epochs = self.settings.train.epochs
        if finished:
            early = " (stopped early)" if progress.epoch < epochs else ""
            return f"Finished {now} after {progress.epoch} of {epochs} epochs{early}."
        return (
            f"{progress.epoch} of {epochs} epochs were done on {now}. While the run goes on, this "
            f"page is written anew after an epoch; the browser reads it every {REFRESH_SECONDS} s."
        )
