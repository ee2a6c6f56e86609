"""What a process runs on: its device, its rank, the signals it gets; seeds; freed memory."""

import contextlib
import ctypes
import datetime
import logging
import os
import platform
import re
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from stemgenre.errors import Interrupted, UserError
from stemgenre.settings import MachineSettings
from stemgenre.status import Status

log = logging.getLogger("stemgenre")

OUT_OF_MEMORY = re.compile(  # of errors that are not torch.OutOfMemoryError
    "unable to find an engine to execute this computation|STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED"
    "|CUDA error: out of memory"
)


@dataclass(frozen=True)
class Runtime:
    """One process of a run: its device, its rank among `world_size` processes, stop requests.

    `status` is told what the run is doing.
    """

    device: torch.device
    rank: int
    world_size: int
    stop: "StopRequest"
    status: Status = field(default_factory=Status)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def all_gather(self, value: Any) -> list:
        """The picklable `value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_max(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each integer over all ranks; on the CPU, without waiting for the GPU."""
        if self.world_size == 1:
            return numbers
        values = torch.tensor(numbers)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return tuple(values.tolist())

    def sync_stop(self) -> bool:
        """Whether any rank was asked to stop. A collective: every rank has to call it."""
        (number,) = self.all_reduce_max(self.stop.signal_number)
        if number:  # otherwise one that has arrived meanwhile would be forgotten
            self.stop.signal_number = number
        return bool(number)

    def interrupted(self, message: str = "stopped") -> Interrupted:
        """The exception that ends a run whose stop was requested; see Interrupted."""
        return Interrupted(self.stop.signal_number, message)


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one ends the process at once."""

    def __init__(self):
        self.signal_number = 0

    def __call__(self, signal_number, frame):
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = signal_number


@contextlib.contextmanager
def start_runtime(machine: MachineSettings, *, repeats: bool = True) -> Iterator[Runtime]:
    """The Runtime of this process; under torchrun also the process group's member.

    Where batches of one size come again and again (`repeats`), cuDNN searches for the fastest
    convolutions of each size, which takes seconds. Raises UserError for a device that is not
    available.
    """
    rank, world_size, local_rank = _torchrun_ranks()
    device = pick_device(machine.device, local_rank, world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = repeats
    elif device.type == "cpu":
        keep_freed_memory()
    if rank:
        log.setLevel(logging.WARNING)
    stop = StopRequest()
    with _process_group(device, world_size), _signals_to(stop):
        try:
            yield Runtime(device, rank, world_size, stop)
        except RuntimeError as error:
            lost_peer = any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
            if world_size == 1 or not lost_peer:
                raise
            raise UserError(
                "another process of this run failed; see its error above. "
                "RESUME_FROM_CHECKPOINT=True resumes the run"
            ) from None


@contextlib.contextmanager
def _process_group(device, world_size):
    """The process group of several processes, ended where all of them come to its end together.

    To end NCCL's is to wait for the other ranks. One that fails, alone, would wait for those that
    wait for it: it leaves the group as it is, and has to end at once, as cli.run_script does.
    """
    if world_size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    try:
        yield
    except Interrupted:  # all ranks are
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _torchrun_ranks():
    """(rank, world_size, local_rank) that torchrun gives; (0, 1, 0) for a process by itself."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return tuple(int(os.environ[name]) for name in names)
    if left := [f"{name}={os.environ[name]}" for name in names if name in os.environ]:
        log.warning("%s in the environment ignored: not started by torchrun", ", ".join(left))
    return 0, 1, 0


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


def pick_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The torch.device for DEVICE=`name`; each of several local processes gets its own GPU.

    Raises UserError for a device that is not available.
    """
    if name == "auto":
        best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        name = best.type if best is not None and best.type in ("cuda", "mps") else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"DEVICE={name!r} is invalid: expected auto, cuda, cuda:1, mps or cpu"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count and not torch.cuda.is_available():
            raise UserError(
                f"DEVICE={name} is not available: the GPU's driver does not fit PyTorch's CUDA "
                f"{torch.version.cuda}; update it, or install PyTorch for an older CUDA"
            )
        if device.index is None:
            device = torch.device("cuda", local_rank if world_size > 1 else 0)
        elif local_rank:  # NCCL refuses it, with an error that does not say so
            raise UserError(
                f"DEVICE={name} is the same GPU for {local_rank + 1} processes; "
                "DEVICE=cuda gives each one its own"
            )
        if device.index >= count:
            way_out = f"--nproc-per-node={count}" if local_rank and count else "DEVICE=cpu"
            raise UserError(
                f"DEVICE={name} is not available: {count} CUDA devices found; try {way_out}"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("DEVICE=mps is not available; try DEVICE=cpu")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"DEVICE={name!r} is invalid: expected auto, cuda, cuda:1, mps or cpu")
    return device


def describe_device(device: torch.device) -> str:
    """The device in words: a GPU's name, memory and CUDA version, or the CPU's threads."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"


def log_device(runtime: Runtime, *, quick_recipe: str = "") -> None:
    """Logs which device is used and, without a GPU, that `quick_recipe` is for such a machine."""
    processes = f", {runtime.world_size} processes" if runtime.world_size > 1 else ""
    log.info("device: %s%s", describe_device(runtime.device), processes)
    if runtime.device.type == "cpu" and quick_recipe:
        log.warning(
            "no GPU is used: training will be slow; python train.py %s is made for that",
            quick_recipe,
        )


def check_shared_folders(*folders: Path | str, runtime: Runtime) -> None:
    """Raises UserError on every rank unless all ranks see a file that rank 0 writes to `folders`.

    A folder that cannot be written is not checked. A collective: every rank has to call it.
    """
    if runtime.world_size == 1:
        return
    for folder in map(Path, folders):
        name = f".shared.{os.getpid()}.{secrets.token_hex(4)}.part" if runtime.is_main else ""
        try:
            if name:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
        except OSError:
            name = ""
        name = runtime.all_gather(name)[0]
        seen = runtime.all_gather(not name or (folder / name).exists())
        if name and runtime.is_main:
            (folder / name).unlink(missing_ok=True)
        if not all(seen):
            raise UserError(
                f"process {seen.index(False)} of {len(seen)} does not see the files that process 0 "
                f"writes to {folder.absolute()}; processes on several machines need a file system "
                "that they share"
            )


def use_one_core() -> None:
    """Limits PyTorch's operations in this thread to one core; other threads stay as they are."""
    default = torch.get_num_threads()
    if default > 1:
        torch.set_num_threads(1)  # of this thread, and of all that start later, so set it back
        set_back = threading.Thread(target=torch.set_num_threads, args=(default,))
        set_back.start()
        set_back.join()


def thread_count(machine: MachineSettings) -> int:
    """NUM_THREADS as a number: auto is one per core this process may use, at most 8."""
    if machine.num_threads != "auto":
        return max(1, machine.num_threads)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return min(8, len(usable))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on the device; on a GPU without making the host wait for it."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` in page-locked memory, from which to_device() copies at once; for a GPU only."""
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # of this thread; otherwise the first GPU is used
        return tensor.contiguous().pin_memory()


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that is a pure function of integers, for example (SEED, epoch, clip)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU memory ran out: also cuDNN's error when no convolution's workspace fits."""
    return isinstance(error, torch.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


class MicroBatch:
    """How many clips go through the device at once: `size`, halved when GPU memory runs out.

    Before that, `free_memory` is called, which frees what can be done without: it returns whether
    there was anything.
    """

    def __init__(
        self,
        size: int,
        *,
        name: str = "micro-batch",
        free_memory: Callable[[], bool] = lambda: False,
    ):
        self.size = size
        self.name = name
        self.free_memory = free_memory

    def run(self, function: Callable[[int], Any], clips: int, *, too_large: str) -> Any:
        """function(size) for `clips` clips, again with half the size while it runs out of memory.

        The smaller size stays. Raises UserError with the message `too_large` if a single clip does
        not fit.
        """
        while True:
            size = min(self.size, clips)
            try:
                return function(size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # outside that block, so that the failed call's tensors are freed
            if self.free_memory():
                torch.cuda.empty_cache()
                continue
            if size <= 1:
                raise UserError(too_large)
            self.size = size // 2
            torch.cuda.empty_cache()
            log.warning("GPU out of memory: %s reduced to %d clips", self.name, self.size)


# glibc's malloc on a CPU. A training step and a window of Demucs take the same large blocks as the
# one before; by default these go back to the system each time, and taking one again costs a page
# fault per 4 kB: a quarter of a training step (benchmarks/cpu.py). Elsewhere than on Linux with
# glibc these two functions do nothing.

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """From now on, freed blocks of any size stay with the process."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory(*_: Any) -> None:
    """Returns freed blocks to the system now. Takes any arguments, to be a module's hook.

    Where the sizes of blocks change, kept ones are split and the peak grows; releasing them takes
    some hundredths of a second.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
