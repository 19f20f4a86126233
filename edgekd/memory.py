"""Memory of processes as Linux tells it. Goes to devices with the worker, so it keeps to Python 3.10."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path


def give_back() -> None:
    """Memory that this process has freed goes back to the system, where the C library (glibc) keeps it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def used_mib() -> float | None:
    """What this process has in use; None where it cannot be read."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_growth_mib(prepare: Callable[[], object], work: Callable[[], object]) -> float | None:
    """By how much a process of its own, after `prepare`, grows at most during `work`. None where that cannot
    be read, or where either fails.

    What `prepare` loads must not be loaded here before: what two processes share would not count.
    """
    if used_mib() is None:
        return None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare()
            os.write(writing, str(used_mib()).encode())
            work()
            code = 0
        finally:
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        before = pipe.read()
    return None if status else max(0.0, used.ru_maxrss / 2**10 - float(before))
