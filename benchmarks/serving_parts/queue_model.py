"""A line before one engine, simulated: requests that come at given times share steps as the engine joins them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Costs:
    """Seconds of what a server does.

    steps: rows -> a joint step of all; between two numbers of rows it is a straight line.
    image: of each image beside its steps, for which all others wait (prompt, decoding, file).
    answer: of each request, for which nobody else waits.
    """

    steps: Mapping[int, float]
    image: float = 0.0
    answer: float = 0.0

    def step(self, rows: int) -> float:
        """Of so many rows, which are no more than the most that is known."""
        known = sorted(self.steps.items())
        if rows <= known[0][0]:
            return known[0][1]
        for (low, cheap), (high, dear) in pairwise(known):
            if rows <= high:
                return cheap + (dear - cheap) * (rows - low) / (high - low)
        raise ValueError(f"{rows} rows; the cost is known up to {known[-1][0]}")


def simulate(arrivals: Sequence[float], *, steps: int, rows: int, max_batch: int, costs: Costs) -> list[float]:
    """Seconds from each arrival to its answer, first come, first served.

    As the engine does it: before each joint step requests start while their rows fit; an image that had its last step
    is decoded before the next one; nobody leaves.

    Args:
        arrivals: in order.
        steps, rows: of each request.
        max_batch: rows that a step may have; a request with more has its steps alone.
    """
    now, begun = 0.0, 0
    running: dict[int, int] = {}  # number of a request -> steps that it still needs
    seconds = [0.0] * len(arrivals)
    while begun < len(arrivals) or running:
        if not running:
            now = max(now, arrivals[begun])
        while begun < len(arrivals) and arrivals[begun] <= now:
            if running and (len(running) + 1) * rows > max_batch:
                break
            running[begun] = steps
            begun += 1
        now += costs.step(len(running) * rows)
        for number in list(running):
            running[number] -= 1
            if not running[number]:
                del running[number]
                now += costs.image
                seconds[number] = now + costs.answer - arrivals[number]
    return seconds
