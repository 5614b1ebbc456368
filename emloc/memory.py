"""Memory: what a piece of work took, and freed memory that goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_STATUS = Path("/proc/self/status")
_INTERVAL_SECONDS = 0.02
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # from glibc's malloc.h
_LARGE_BLOCK_BYTES = 1 << 20
_MKL_FREE = "mkl_serv_free_buffers"  # mkl_free_buffers, as torch exports it


@dataclass
class Cost:
    """What a `measure` block took; filled in when the block ends.

    Attributes:
        seconds: wall-clock time.
        peak_bytes: on an accelerator the largest sum of its allocated tensors, on a CPU the largest
            anonymous resident memory of the process (files mapped into memory do not count: the
            system can drop them at any time).
        device: type of the device that the memory was measured on.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    device: str = "cpu"


def give_back_freed_memory() -> None:
    """Make the C library return freed memory to the system, from here on in the whole process.

    By default glibc keeps a pool of freed memory for each thread, so that a hundred threads that
    run one after the other hold a hundred times what one of them needs. With one pool, and with
    large blocks outside of it, they hold it once. On other systems this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def trim_freed_memory() -> None:
    """Give what was freed so far back to the system, where the C library is glibc.

    Tensors that were replaced one by one leave gaps which it would keep otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def free_math_buffers() -> None:
    """Free the buffers that MKL, if torch computes with it, keeps for every thread that used it."""
    free = _mkl_free()
    if free is not None:
        free()


@functools.cache
def _mkl_free() -> Callable[[], object] | None:
    """MKL's own function, looked up once: streaming calls it after each batch of each unit."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return getattr(ctypes.CDLL(str(library)), _MKL_FREE, None) if library.exists() else None


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process; on systems without /proc all resident memory."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def measure(device: torch.device | str) -> Iterator[Cost]:
    """Measure the seconds and the peak memory of a `with` block; on a CPU a thread samples it."""
    device = torch.device(device)
    cost = Cost(device=device.type)
    started = time.perf_counter()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        try:
            yield cost
        finally:
            cost.seconds = time.perf_counter() - started
            cost.peak_bytes = torch.accelerator.max_memory_allocated(device)
        return

    done = threading.Event()

    def sample() -> None:
        while not done.wait(_INTERVAL_SECONDS):
            cost.peak_bytes = max(cost.peak_bytes, anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield cost
    finally:
        done.set()
        sampler.join()
        cost.seconds = time.perf_counter() - started
        cost.peak_bytes = max(cost.peak_bytes, anonymous_bytes())
