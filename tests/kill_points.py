"""train.py in a process of its own, to which something can happen at a named event.

The events are what a run does to files (open:NAME, half:NAME in the middle of a write, replace:NAME
written but not yet in its place, replaced:NAME just after, unlink:NAME, link:NAME) and its own
steps (measure, step, validate, predict). NAME may have wildcards. What happens is an action: KILL
(SIGKILL), FULL (from then on no file can grow longer than a few bytes, as on a full disk), or
another signal's number.
"""

import ctypes
import fnmatch
import functools
import gc
import itertools
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT

KILL, FULL = signal.SIGKILL, "full"
KILLED = -signal.SIGKILL  # the exit code
MAX_BYTES = 10  # that a file may have on the full disk
TIMEOUT_SECONDS = 120
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = (
    "helpers", "sklearn.model_selection", "demucs.htdemucs", "julius", "librosa.core.convert",
    "stemgenre.data.competition", "stemgenre.demo.demo", "stemgenre.separation.separate",
    "stemgenre.submission",
)  # fmt: skip


@functools.cache
def start_server():
    """From here on, a run costs no imports: a server has done them, and forks for each run."""
    CONTEXT.set_forkserver_preload(list(PRELOAD))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]), os.pathsep)
        multiprocessing.forkserver.ensure_running()


class Forked:
    """train.py, forked from the server; the options are those of _run()."""

    def __init__(self, overrides, **options):
        start_server()
        self._reader, writer = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(
            target=_run, args=(overrides, writer), kwargs=options, daemon=True  # ends with pytest
        )  # fmt: skip
        self.process.start()
        writer.close()

    def wait(self):
        """(exit code, output) of the process once it has ended."""
        hung = threading.Event()
        timer = threading.Timer(TIMEOUT_SECONDS, lambda: (hung.set(), self.process.kill()))
        timer.start()
        parts = []
        while part := os.read(self._reader.fileno(), 2**16):
            parts.append(part)
        self.process.join()
        timer.cancel()
        if hung.is_set():
            raise TimeoutError(f"a run has not ended within {TIMEOUT_SECONDS} s")
        return self.process.exitcode, b"".join(parts).decode()


def run(overrides, **options):
    """(exit code, output) of a Forked."""
    return Forked(overrides, **options).wait()


def free_port():
    """A port of this machine that nothing listens on, as text."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def start_two(overrides, **options):
    """Two processes of one run, as torchrun starts them; {rank} in a word is the process's rank."""
    job = {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    job |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        Forked(
            [word.replace("{rank}", rank) for word in map(str, overrides)],
            environment=job | {"RANK": rank, "LOCAL_RANK": rank},
            **options,
        )
        for rank in "01"
    ]


def _run(
    overrides, console, *, at=None, action=KILL, count=1, with_report=False, as_user=False,
    backwards=False, max_images=None, group_waits=False, environment=None,
):  # fmt: skip
    """Runs train.py, with an action at the `count`-th event `at`; its output goes to `console`.

    `as_user`: root, too, obeys file permissions. `backwards`: the clock stands in 1970 and goes
    back whenever it is read. `max_images`: a forward pass on more runs out of memory.
    `group_waits`: to leave the process group takes too long, as NCCL's does while another rank
    waits for this one. `environment`: further variables, of torchrun for example.
    """
    gc.freeze()  # the collector would copy every page of what the server has imported
    os.chdir(ROOT)
    os.environ.update(environment or {})
    for descriptor in (1, 2):
        os.dup2(console.fileno(), descriptor)
    console.close()

    import torch
    from helpers import NoReport, limit_images, use_tiny_backbone

    import train
    from stemgenre import cli
    from stemgenre.report import report

    torch.set_num_threads(1)  # the same number of threads gives the same bits
    use_tiny_backbone()
    if max_images:
        limit_images(max_images)
    if not with_report:
        report.Report = NoReport
    if group_waits:
        torch.distributed.destroy_process_group = functools.partial(time.sleep, 2 * TIMEOUT_SECONDS)
    counter = itertools.count(1)

    def happens(event, path=None):
        name = f"{event}:{Path(path).name}" if path else event
        if not fnmatch.fnmatch(name, at or "") or next(counter) != count:
            return
        if action == FULL:
            resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_BYTES, MAX_BYTES))
            return
        if event == "half":
            os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), action)

    _watch_files(happens)
    _watch_steps(happens)
    if backwards:
        seconds = itertools.count(10**6, -60)
        time.time = lambda: float(next(seconds))
    if as_user:
        _obey_permissions()
    sys.argv = ["train.py", *overrides]
    cli.run_script(train.main)


def _obey_permissions():
    """Takes root's right to ignore file permissions from this process (capset(2))."""
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
    from stemgenre.features.log_mel import Frontend
    from stemgenre.training import inference, trainer

    def watch(owner, name, event):
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*arguments, **options):
            happens(event)
            return function(*arguments, **options)

        setattr(owner, name, watched)

    watch(Frontend, "log_mel", "measure")
    watch(trainer.Trainer, "on_step", "step")
    watch(trainer, "compute_logits", "validate")
    watch(inference, "compute_logits", "predict")
