"""glibc's malloc on a CPU: what is freed is kept for the next step, and given back on request.

A step of training and a window of Demucs take the same large blocks as the one before. By default
these go back to the system each time, and taking one again costs a page fault per 4 kB: a quarter
of a training step (benchmarks/cpu.py). Elsewhere than on Linux with glibc nothing here does
anything.
"""

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory():
    """From here on, freed blocks of any size stay with the process."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory(*_):
    """What is free goes back to the system now. Takes any arguments, to be a module's hook.

    Where the sizes of blocks change, kept ones are cut up and the peak grows; giving them back
    takes some hundredths of a second and keeps it where it would be without keeping.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
