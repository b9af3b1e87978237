"""How much memory a run needs: the device's, or on the CPU the process's."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size

STATUS = Path("/proc/self/status")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory is not enough, as Python, PyTorch or a device tell it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def start_measuring(device: torch.device | str) -> None:
    """Forget the peak so far. On the CPU the peak is the process's own, since it began."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def current_memory(device: torch.device | str) -> int:
    """Bytes in use now: of tensors on a GPU, or the process's resident set."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device | str) -> int:
    """The most bytes in use: of tensors on a GPU since `start_measuring`, or the process's largest resident set."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident()


def _peak_resident() -> int:
    # Linux hands the figure of getrusage on from the process that launched this one; this one is its own.
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, else KiB


def format_bytes(count: int) -> str:
    """A size for people: "512 B", "1.5 MB". A kB is 1000 bytes."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if round(size, 1) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
