"""What the process runs on: device, rank and world, seeds, logging, signals, exit codes."""

import contextlib
import datetime
import logging
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from stemgenre import malloc
from stemgenre.errors import Interrupted, UserError

log = logging.getLogger("stemgenre")


@dataclass(frozen=True)
class Runtime:
    """One process of a run: its device, its rank among `world` processes, and who asked to stop."""

    device: torch.device
    rank: int
    world: int
    stop: "StopRequest"

    @property
    def is_main(self):
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def gather(self, value):
        """The picklable `value` of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def maximum(self, *numbers):
        """The largest of each whole number over all ranks; on the CPU, so no card is waited for."""
        if self.world == 1:
            return numbers
        values = torch.tensor(numbers)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return tuple(values.tolist())

    def stop_requested(self):
        """Whether any rank was asked to stop; every rank hears the same answer."""
        (self.stop.signal_number,) = self.maximum(self.stop.signal_number)
        return bool(self.stop.signal_number)

    def interrupted(self):
        """The exception that ends a run whose stop was requested."""
        return Interrupted(self.stop.signal_number)


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self):
        self.signal_number = 0

    def __call__(self, signal_number, frame):
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = signal_number


@contextlib.contextmanager
def start(machine):
    """The Runtime of this process; under torchrun also the process group's member.

    `machine` is a MachineSettings. Raises UserError for a device that is not there.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(machine.device, int(os.environ.get("LOCAL_RANK", 0)), world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        malloc.keep_freed_memory()
    if rank:
        log.setLevel(logging.WARNING)
    stop = StopRequest()
    with _signals_to(stop):
        if world > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
        try:
            yield Runtime(device, rank, world, stop)
        except RuntimeError as error:
            if world == 1 or not any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
                raise
            raise UserError(
                "another process of this run has ended, its message is above if it left one; "
                "go on with RESUME_FROM_CHECKPOINT=True"
            ) from None
        finally:
            if world > 1:
                dist.destroy_process_group()


@contextlib.contextmanager
def _signals_to(handler):
    """SIGINT and SIGTERM call `handler` inside the block; only the main thread may set that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def pick_device(name, local_rank=0, world=1):
    """The torch.device for DEVICE=`name`; each of several local processes gets its own card."""
    if name == "auto":
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = best.type if best is not None and best.type in ("cuda", "mps") else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"DEVICE={name!r} does not fit; write auto, cuda, cuda:1, mps or cpu"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if device.index is None:
            device = torch.device("cuda", local_rank if world > 1 else 0)
        if device.index >= count:
            raise UserError(
                f"DEVICE={name} is not there: {count} CUDA devices seen; try DEVICE=cpu"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("DEVICE=mps is not there; try DEVICE=cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"DEVICE={name!r} does not fit; write auto, cuda, cuda:1, mps or cpu")
    return device


def worker_count(machine):
    """NUM_WORKERS as a number: auto is one per core this process may use, at most 8."""
    if machine.num_workers != "auto":
        return max(1, machine.num_workers)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return min(8, len(usable))


def to_device(tensor, device):
    """`tensor` on the device; on a CUDA card without making the host wait for the card."""
    if device.type != "cuda":
        return tensor.to(device)
    with torch.cuda.device(device):  # of this thread; else the first card would be used
        return tensor.pin_memory().to(device, non_blocking=True)


def seed_of(*parts):
    """A 63-bit seed that is a pure function of whole numbers, for example (SEED, epoch, clip)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stderr if record.levelno >= 40 else sys.stdout)


class _FileHandler(logging.FileHandler):
    """Appends to a file; once that cannot be written, says so and leaves the run alone."""

    def handleError(self, record):  # noqa: N802
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        for logger in (log, logging.getLogger("py.warnings")):
            logger.removeHandler(self)
        with contextlib.suppress(OSError):
            self.close()
        log.warning(
            "%s cannot be written any more (%s); the run goes on without it",
            self.baseFilename,
            error.strerror,
        )


def _format(record):
    prefix = {logging.WARNING: "warning: ", logging.ERROR: "error: "}.get(record.levelno, "")
    return prefix + record.getMessage().rstrip()


def log_to_console():
    """Sends the project's log and Python's warnings to the console."""
    logging.captureWarnings(True)
    handler = _ConsoleHandler()
    handler.format = _format
    for logger in (log, logging.getLogger("py.warnings")):
        logger.handlers = [handler]
        logger.propagate = False
    log.setLevel(logging.INFO)


def log_to_file(path, run):
    """Appends what the console shows to `path` too, each line with its time (rank 0 only)."""
    if not run.is_main:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}); set OUTPUT_DIR elsewhere"
        ) from None
    stamp = logging.Formatter("%(asctime)s").formatTime
    handler.format = lambda record: f"{stamp(record, '%Y-%m-%d %H:%M:%S')}  {_format(record)}"
    for logger in (log, logging.getLogger("py.warnings")):
        logger.addHandler(handler)


def run_script(main):
    """Runs main() and exits: 0, 2 for what the user can fix, 128 + signal when stopped."""
    log_to_console()
    try:
        main()
    except UserError as error:
        log.error("%s", error)
        sys.exit(2)
    except Interrupted as stopped:
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        log.error("stopped at once")
        sys.exit(128 + signal.SIGINT)
    except Exception:
        log.error("this is a mistake of the program itself:\n%s", traceback.format_exc())
        raise SystemExit(1) from None
