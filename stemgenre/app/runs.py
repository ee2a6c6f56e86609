"""The runs below a folder, read from their files; training as a process of its own.

A run that was started in a terminal, by this page or by another looks the same: what it is doing
is in status.json, whether it still runs is told by the lock that it holds.
"""

import contextlib
import csv
import datetime
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from stemgenre import status
from stemgenre.errors import UserError
from stemgenre.files import LOCK_INFO_NAME, LOCK_NAME
from stemgenre.settings import CONFIG_FILE, read_settings_file

ROOT = CONFIG_FILE.parent
HOLDER = re.compile(r"process (\d+) on (\S+) since (.+)")  # as output_lock writes it
MARKS = (status.FILE, "settings_used.py")  # a folder with one of them is a run's
ENDED = ("finished", "stopped", "failed")
TAIL_BYTES = 16_000
TAIL_LINES = 40


@dataclass(frozen=True)
class Holder:
    """The process that holds a run's lock."""

    pid: int
    host: str
    since: str


@dataclass(frozen=True)
class Run:
    """A run's folder, and what its files say now. No method raises."""

    name: str
    folder: Path

    def file(self, name: str) -> Path | None:
        """The path of a file of the run; None if there is none, or it lies elsewhere."""
        path = self.folder / name
        inside = path.resolve().is_relative_to(self.folder.resolve())
        return path if inside and path.is_file() else None

    def settings(self) -> dict[str, Any]:
        """{SETTING: value} of settings_used.py; empty without it."""
        path = self.file("settings_used.py")
        with contextlib.suppress(UserError):
            return read_settings_file(path) if path else {}
        return {}

    def files(self, setting: str, default: str) -> dict[str, Path]:
        """{network: path} of the run's file that `setting` names; "" is the run itself."""
        name = self.settings().get(setting, default)
        networks = ["", *sorted(path.name for path in self.folder.glob("*") if path.is_dir())]
        paths = {network: self.file(str(Path(network, name))) for network in networks}
        return {network: path for network, path in paths.items() if path}

    def models(self) -> dict[str, Path]:
        """{network: path} of its trained models."""
        return self.files("BEST_MODEL_FILE", "best_model.pth")

    def checkpoints(self) -> dict[str, Path]:
        """{network: path} of what it can be resumed from."""
        return self.files("CHECKPOINT_FILE", "checkpoint.pth")

    def holder(self) -> Holder | None:
        """Who holds the run's lock; None if nobody does.

        The lock itself is only tried where a process says that it holds it, and a killed run's word
        is removed, so that trying never disturbs a run that starts.
        """
        info = self.folder / LOCK_INFO_NAME
        try:
            found = HOLDER.match(info.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return None
        holder = Holder(int(found[1]), found[2], found[3].strip()) if found else Holder(0, "", "")
        try:
            with filelock.FileLock(self.folder / LOCK_NAME, timeout=0):
                info.unlink(missing_ok=True)
        except filelock.Timeout:
            return holder
        except (OSError, NotImplementedError):  # a folder of somebody else, or without locks
            return holder
        return None

    def status(self) -> dict[str, Any]:
        """status.json, with the stage "starting" before a run has written its own, and "killed".

        Empty without the file, or if it is another program's.
        """
        content, holder = _read_json(self.file(status.FILE)), self.holder()
        if "stage" not in content:
            content = {}
        if holder and holder.pid and content.get("pid") != holder.pid:
            return {"stage": "starting", "pid": holder.pid}
        if not holder and content and content["stage"] not in ENDED:
            content["stage"] = "killed"
        return content

    def summary(self) -> dict[str, Any]:
        """summary.json; empty until the run has finished."""
        return _read_json(self.file("summary.json"))

    def histories(self) -> dict[str, list[dict[str, float]]]:
        """{network: rows of its metrics.csv}; the only network of a run is ""."""
        content = self.status()
        names = [path.parent.name for path in sorted(self.folder.glob("*/metrics.csv"))]
        if content.get("networks", 0) == 1 or not names:
            names = [""]
        histories = {}
        for name in names:
            rows = _read_metrics(self.file(f"{name}/metrics.csv" if name else "metrics.csv"))
            own = content.get("run") if name == content.get("network") else None
            histories[name] = [row for row in rows if own is None or row["run_id"] == own]
        return {name: rows for name, rows in histories.items() if rows}

    def log_tail(self) -> str:
        """The last lines of the log."""
        path = self.file(self.settings().get("LOG_FILE", "train_log.txt"))
        return tail(path) if path else ""

    def stop(self) -> None:
        """Asks the run to save and stop, as Ctrl-C does, once. Raises UserError if it cannot be."""
        holder = self.holder()
        if holder is None:
            raise UserError(f"{self.name} does not run")
        if holder.host != socket.gethostname() or not holder.pid:
            raise UserError(f"{self.name} runs on another machine, {holder.host}; stop it there")
        if holder not in _stopping:  # a second signal would end it without saving
            _stopping.add(holder)
            try:
                os.kill(holder.pid, signal.SIGINT)
            except OSError as error:
                raise UserError(f"{self.name} cannot be stopped: {error.strerror}") from None


_stopping: set[Holder] = set()  # that were asked to stop by this page


def _read_json(path):
    """The JSON object in a file; empty without the file, or if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_metrics(path):
    """The rows of metrics.csv as numbers, with its last column as text."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            {name: text if name == "run_id" else float(text) for name, text in row.items()}
            | {"epoch": int(row["epoch"]), "run_id": row.get("run_id", "")}
            for row in rows
        ]
    except (AttributeError, OSError, ValueError, TypeError, KeyError):  # none, or not a run's
        return []


def tail(path: Path) -> str:
    """The last TAIL_LINES of a text file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL_LINES:])


class Runs:
    """The runs in `folder`, and in OUTPUT_DIR if that is elsewhere."""

    def __init__(self, folder: Path, output_dir: Path) -> None:
        self.folder, self.output_dir = folder, output_dir

    def find(self) -> dict[str, Run]:
        """{name: Run}, those that changed last first. Names come from here, never from a page."""
        marks = [path for mark in MARKS for path in self.folder.glob(f"*/{mark}")]
        marks += [path for mark in MARKS for path in self.folder.glob(f"*/*/{mark}")]
        folders = {path.parent: path.parent.relative_to(self.folder).as_posix() for path in marks}
        if any((self.output_dir / mark).is_file() for mark in MARKS):
            folders.setdefault(self.output_dir, str(self.output_dir))
        newest = sorted(folders, key=_changed, reverse=True)
        return {folders[folder]: Run(folders[folder], folder) for folder in newest}

    def get(self, name: str | None) -> Run:
        """The Run of that name. Raises UserError if there is none."""
        run = self.find().get(name or "")
        if run is None:
            raise UserError(f"there is no run {name!r:.100}" if name else "there is no run yet")
        return run

    def models(self) -> dict[str, Path]:
        """{name: path} of the trained models of all runs."""
        return {
            f"{run.name}/{network}".rstrip("/"): path
            for run in self.find().values()
            for network, path in run.models().items()
        }

    def free_name(self, name: str) -> str:
        """`name`, or name-2 and so on: one that no folder of a run has."""
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(name for name in names if not (self.folder / name).exists())


def _changed(folder):
    times = [0.0]
    for mark in (*MARKS, "metrics.csv"):
        with contextlib.suppress(OSError):
            times.append((folder / mark).stat().st_mtime)
    return max(times)


def start_process(script: str, words: list[str]) -> tuple[subprocess.Popen, Any]:
    """(process, its open console file) of one of our scripts, which outlives this page.

    Started with a list of arguments, without a shell, in a session of its own. Raises UserError
    for a word that no process can be given.
    """
    console = tempfile.TemporaryFile()  # noqa: SIM115  the process writes it
    try:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *words],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TQDM_MININTERVAL": "30", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # too long, or with a NUL
        raise UserError(f"{script} cannot be started: {error}") from None
    threading.Thread(target=process.wait, daemon=True).start()  # no zombie is left
    return process, console


def start_training(words: list[str], folder: Path) -> None:
    """Starts train.py and returns when it holds the lock of `folder`, its OUTPUT_DIR.

    Raises UserError, with its own last line, if it ends before: another run holds the lock.
    """
    process, console = start_process("train.py", words)
    info = folder / LOCK_INFO_NAME
    with console:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                if f"process {process.pid} on " in info.read_text(encoding="utf-8"):
                    return
            time.sleep(0.1)
        if process.returncode:
            raise UserError(last_line(console) or f"train.py ended with {process.returncode}")


def last_line(console: Any) -> str:
    """The last line that a process wrote to its console file, without "error: "."""
    console.seek(0)
    lines = console.read()[-TAIL_BYTES:].decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "").removeprefix("error: ")


class Background:
    """One process of a script at a time, with its console: eda.py."""

    def __init__(self, script: str) -> None:
        self.script, self._lock = script, threading.Lock()
        self._process = self._console = None

    @property
    def is_running(self) -> bool:
        """Whether it runs now."""
        return self._process is not None and self._process.poll() is None

    def start(self, words: list[str]) -> None:
        """Starts it. Raises UserError while it runs."""
        with self._lock:
            if self.is_running:
                raise UserError(f"{self.script} is running; wait until it ends")
            self._process, self._console = start_process(self.script, words)

    def output(self) -> str:
        """The end of what it has written so far."""
        if self._console is None:
            return ""
        size = os.fstat(self._console.fileno()).st_size
        data = os.pread(self._console.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES))
        return data.decode(errors="replace").replace("\r", "\n").strip()


def remaining_seconds(content: dict[str, Any], history: list[dict[str, float]]) -> float | None:
    """Seconds until the stage of a status.json ends; in training, until all epochs are done."""
    stage, steps = content.get("stage"), content.get("steps", 0)
    if stage == "training" and history and steps:
        last = [row["seconds"] for row in history[-3:]]
        done = content["epoch"] - 1 + content["step"] / steps
        networks = max(1, content["networks"]) - max(1, content["network_number"])
        return sum(last) / len(last) * (content["epochs"] * (1 + networks) - done)
    if stage == "separation" and 0 < content.get("done", 0) < content.get("total", 0):
        started = datetime.datetime.fromisoformat(content["started"])
        elapsed = (datetime.datetime.now().astimezone() - started).total_seconds()
        return elapsed * (content["total"] - content["done"]) / content["done"]
    return None
