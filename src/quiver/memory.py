"""How much memory this process holds and may hold, and giving back what it no longer needs. Linux; elsewhere no bound."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

from quiver import cgroups

SHARE = 0.85
"""Of what there is: beyond it, the kernel comes before the next allocation does."""
MAX_ARENAS = 2
_M_ARENA_MAX = -8


def limit_bytes() -> int:
    """Return how much this process should hold at most: a share of the container's memory, or of the machine's."""
    return int(SHARE * min(total_bytes(), cgroups.memory_bytes()))


def resident_bytes() -> int:
    """Return how much it holds; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def total_bytes() -> int:
    """Return how much the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Return how much of the machine's memory a process could still get; 0 where the system does not say."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return 0


def keep_small() -> None:
    """Let threads share few heaps: with one for each, what one frees is of no use to another."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, MAX_ARENAS)


def give_back() -> None:
    """Return freed memory to the system; takes milliseconds."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
