"""What a forward of b rows costs, and the largest batch that is worth its while."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

SIZES = (1, 2, 4, 8, 16)
MARGIN = 0.05
"""Twice the rows must make a row cheaper by this share, or the smaller batch is taken."""
REPEATS = 3


@dataclass(frozen=True)
class Measurement:
    """Seconds of a forward by its rows, and what follows from them.

    max_batch: the largest number of rows up to which every doubling makes a row cheaper by `margin`; 1 is an answer.
    remark: why larger batches were not measured, or "".
    """

    seconds: Mapping[int, float]
    max_batch: int
    margin: float = MARGIN
    remark: str = ""

    @property
    def per_row(self) -> dict[int, float]:
        """Seconds for each row, by the rows of the forward."""
        return {rows: seconds / rows for rows, seconds in self.seconds.items()}


def knee(seconds: Mapping[int, float], margin: float = MARGIN) -> int:
    """The largest number of rows up to which every larger one makes a row cheaper by `margin`."""
    sizes = sorted(seconds)
    best = sizes[0]
    for rows in sizes[1:]:
        if seconds[rows] / rows > (1 - margin) * seconds[best] / best:
            break
        best = rows
    return best


def measure(forward: Callable[[int], object], device: torch.device, sizes: Sequence[int] = SIZES) -> Measurement:
    """Time a forward at growing sizes, until a row gets no cheaper or the memory is spent.

    forward: runs one of so many rows. The least of three times counts: what else the machine does only adds to it.
    """
    seconds: dict[int, float] = {}
    for rows in sizes:
        try:
            forward(rows)  # the first of a shape chooses kernels and allocates
            seconds[rows] = min(_time(forward, rows, device) for _ in range(REPEATS))
        except (torch.OutOfMemoryError, MemoryError):
            if not seconds:
                raise
            return Measurement(seconds, knee(seconds), remark=f"{rows} rows did not fit the memory")
        if knee(seconds) != rows:
            return Measurement(seconds, knee(seconds), remark=f"with {rows} rows a row is no cheaper")
    return Measurement(seconds, knee(seconds))


def _time(forward: Callable[[int], object], rows: int, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    forward(rows)
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for the device, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
