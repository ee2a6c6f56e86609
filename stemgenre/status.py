"""status.json: what a run is doing now, for a page that shows it while it runs."""

import contextlib
import datetime
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from stemgenre.errors import Interrupted, UserError, first_line
from stemgenre.files import atomic_write

log = logging.getLogger(__name__)

FILE = "status.json"  # below OUTPUT_DIR; of several networks, too, there is one
WRITE_SECONDS = 1.0  # between two writes at least, but for a new stage and the end


class Status:
    """Stage, epoch, step and clips done of a run, written while recording() runs.

    A killed run leaves the file as it was: it runs only as long as it holds its output_lock.
    Without recording(), nothing is written, and no method raises.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.content = {
            "run": None,  # the id in the last column of metrics.csv, from the first epoch on
            "pid": os.getpid(),
            "started": _now(),
            "updated": _now(),
            "stage": "loading",
            "network": "",  # its folder below OUTPUT_DIR, if there are several
            "network_number": 0,  # from 1; 0 before the first
            "networks": 0,
            "epoch": 0,  # from 1, the one that is trained or validated
            "epochs": 0,
            "step": 0,  # steps done in it
            "steps": 0,
            "done": 0,  # clips done in this stage; in training, of the validation
            "total": 0,
            "message": "",  # of a run that failed
        }
        self._written_at = -WRITE_SECONDS
        self._has_failed = False

    @contextlib.contextmanager
    def recording(self, path: Path, *, is_main: bool = True) -> Iterator[None]:
        """Writes the file at `path` while the block runs, and how it ended; only on rank 0."""
        if not is_main:
            yield
            return
        self.path = path
        self.stage("loading")
        try:
            yield
        except (KeyboardInterrupt, Interrupted):
            self.stage("stopped")
            raise
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.content["message"] = kind + first_line(error)
            self.stage("failed")
            raise
        else:
            self.stage("finished")
        finally:
            self.path = None

    def stage(self, name: str, *, total: int = 0) -> None:
        """A stage begins, in which `total` clips are to be done."""
        self.content.update(stage=name, done=0, total=total)
        self._write()

    def update(self, **values: str | int | None) -> None:
        """Replaces values of the content."""
        self.content.update(values)
        if time.monotonic() - self._written_at >= WRITE_SECONDS:
            self._write()

    def add_clips(self, count: int) -> None:
        """So many more clips of the stage are done."""
        self.update(done=min(self.content["done"] + count, self.content["total"]))

    def _write(self):
        if self.path is None:
            return
        self._written_at = time.monotonic()
        self.content["updated"] = _now()
        try:
            with atomic_write(self.path, "w", durable=False, encoding="utf-8") as file:
                file.write(json.dumps(self.content) + "\n")
        except UserError as error:
            if not self._has_failed:
                self._has_failed = True
                log.warning("%s; the run continues without it", error)


def _now():
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
