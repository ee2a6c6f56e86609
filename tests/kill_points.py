"""train.py in a process of its own to which something happens at a named event.

It is killed by SIGKILL, or from then on may write no file longer than a few bytes, as on a full
disk. The events are what a run does to files (open:NAME, half:NAME in the middle of a write,
replace:NAME written but not yet in its place, replaced:NAME just after, unlink:NAME, link:NAME) and
its own steps (separate, measure, step, validate, predict). NAME may have wildcards.
"""

import ctypes
import fnmatch
import functools
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from helpers import ROOT

KILLED = -signal.SIGKILL
SMALL = 10  # bytes that a file may have on the full disk
SECONDS = 120  # that a run may take
CONTEXT = multiprocessing.get_context("forkserver")


def start_server():
    """From here on, a run costs no imports: a server has them done, and forks for each run."""
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(
        ["train", "sklearn.model_selection", "demucs.htdemucs", "julius"]
    )


def run(knobs, *, kill_at=None, full_at=None, count=1, obeying=False, backwards=False):
    """(exit code, output) of train.py, with something at the `count`-th such event.

    `obeying`: root, too, obeys file permissions. `backwards`: the clock stands in 1970 and goes
    back whenever somebody looks at it.
    """
    reader, writer = CONTEXT.Pipe(duplex=False)
    options = (kill_at, full_at, count, obeying, backwards)
    process = CONTEXT.Process(target=_run, args=(knobs, writer, *options))
    process.start()
    writer.close()
    hung = threading.Event()
    timer = threading.Timer(SECONDS, lambda: (hung.set(), process.kill()))
    timer.start()
    parts = []
    while part := os.read(reader.fileno(), 2**16):
        parts.append(part)
    process.join()
    timer.cancel()
    if hung.is_set():
        raise TimeoutError(f"a run has not ended within {SECONDS} s")
    return process.exitcode, b"".join(parts).decode()


def _run(knobs, console, kill_at, full_at, count, obeying, backwards):
    os.chdir(ROOT)
    for descriptor in (1, 2):
        os.dup2(console.fileno(), descriptor)
    console.close()

    import torch

    import train
    from stemgenre import runtime

    torch.set_num_threads(1)  # the same number of threads gives the same bits
    counter = itertools.count(1)

    def happens(event, path=None):
        name = f"{event}:{Path(path).name}" if path else event
        if fnmatch.fnmatch(name, kill_at or full_at or "") and next(counter) == count:
            if full_at:
                resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))
                return
            if event == "half":
                os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    _watch_files(happens)
    _watch_steps(happens)
    if backwards:
        seconds = itertools.count(10**6, -60)
        time.time = lambda: float(next(seconds))
    if obeying:
        _obey_permissions()
    sys.argv = ["train.py", *knobs]
    runtime.run_script(train.main)


def _obey_permissions():
    """Takes root's right to pass over file permissions from this process (capset(2))."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    libc = ctypes.CDLL(None)
    assert libc.capget(header, sets) == 0
    for bit in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        sets[0] &= ~(1 << bit)
    assert libc.capset(header, sets) == 0


def _watch_files(happens):
    fsync, replace, link, unlink = os.fsync, os.replace, os.link, os.unlink

    def fsync_watched(descriptor):
        part = Path(f"/proc/self/fd/{descriptor}").readlink()
        if part.suffix == ".part":
            happens("half", part)
        fsync(descriptor)

    def replace_watched(source, target):
        happens("replace", target)
        replace(source, target)
        happens("replaced", target)

    def link_watched(source, target):
        happens("link", target)
        link(source, target)

    def unlink_watched(path, *arguments, **options):
        happens("unlink", path)
        unlink(path, *arguments, **options)

    def audit(event, arguments):
        if event == "open" and isinstance(arguments[0], str):
            happens("open", arguments[0])

    os.fsync, os.replace, os.link, os.unlink = (
        fsync_watched, replace_watched, link_watched, unlink_watched,
    )  # fmt: skip
    sys.addaudithook(audit)


def _watch_steps(happens):
    from stemgenre import trainer
    from stemgenre.frontend import FrontEnd
    from stemgenre.separation import Separator

    def watch(owner, name, event):
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*arguments, **options):
            happens(event)
            return function(*arguments, **options)

        setattr(owner, name, watched)

    watch(Separator, "__call__", "separate")
    watch(FrontEnd, "decibels", "measure")
    watch(trainer.Trainer, "_step", "step")
    watch(trainer, "predict", "validate")
    watch(sys.modules["train"], "predict", "predict")
