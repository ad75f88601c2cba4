"""What a process computes with: its threads, and the memory that it keeps. Loads no torch before it is needed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

KEEPS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # glibc's malloc.h


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Compute with so many threads, then with as many as before: sums depend on their number in the last bit."""
    import torch  # which those who start notebooks do without: it takes a second

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Have this process keep the memory of freed tensors for the next ones: for programs that do nothing else.

    glibc hands large blocks back to the system, which clears every page again at the next use: at 224 pixels 12% of a
    pass over a network, on a virtual machine 60%. For another process `KEEPS` does it, put into its environment.
    Nothing happens where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, value)
