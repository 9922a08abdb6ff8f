"""What the C library does with freed memory while graphs are traced."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


# mallopt(3): blocks from this size on are mapped by themselves, and returned to the system when they are freed; and
# how much free memory the heap keeps at its end.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1

LARGE_BLOCK = 2**20

# glibc raises both thresholds, up to these, when large blocks are freed (mallopt(3), M_MMAP_THRESHOLD).
RAISED = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26}


@contextmanager
def large_blocks_return() -> Iterator[None]:
    """Within it, freed blocks of a MiB or more return to the system.

    The tracer copies a rank's weights and caches for each graph, in threads of its own. glibc would keep what is freed
    for the thread that allocated it, and the next graph's copy would come on top. Afterwards the thresholds are where
    glibc itself has them in a process that has freed large blocks. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    try:
        yield
    finally:
        for name, size in RAISED.items():
            mallopt(name, size)
