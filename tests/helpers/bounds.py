"""Bounds on what a call may cost: computing time, and memory of its own."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10
"""Of computing: a load that takes longer hangs."""
ALLOWANCE = 8 << 20
"""Memory that a load may take besides twice the file: Python's objects, the pools of PyTorch and of malloc."""
TENSOR = 2048
"""And for each tensor of a file of many: its objects in Python and PyTorch, where no freed memory lies ready."""


@contextmanager
def within_bounds(size: int, tensors: int = 0) -> Iterator[None]:
    """Computing time and memory for loading a file of `size` bytes and many `tensors`: past either, what runs fails.

    The memory is what the process has of its own: maps of a file that are only read from do not count.
    """

    def give_up(*_):
        raise TimeoutError(f"still loading after {SECONDS} seconds")

    status = Path("/proc/self/status").read_text()
    used = 1024 * int(status.partition("VmData:")[2].split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    earlier = signal.signal(signal.SIGPROF, give_up)
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2 * size + ALLOWANCE + TENSOR * tensors, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGPROF, earlier)
