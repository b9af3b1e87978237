"""The forwards of the engine: which of the waiting calls run next, as one forward where they can."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ether_diffusion.serving.joining import count_rows, invoke, join, key_of, kind_of, split
from ether_diffusion.serving.proxies import Call
from ether_diffusion.training.memory import is_out_of_memory

RowsOf = Callable[[str, Sequence[int]], AbstractContextManager]
"""Component and the adapter row of each row -> the context in which a forward has these adapters."""


@dataclass(eq=False)
class Waiting:
    """A call that waits for its forward.

    adapter_row: what holds the request's adapters; 0 for none.
    rows: of the batch; 0 where they cannot be told.
    key: equal for calls that can be one forward; None for one that is alone.
    """

    call: Call
    adapter_row: int
    rows: int = field(init=False)
    key: Hashable | None = field(init=False)
    done: bool = False

    def __post_init__(self) -> None:
        bound, model = self.call.bound, self.call.function
        self.rows = 0 if bound is None else count_rows(bound)
        key = None if bound is None else key_of(kind_of(model), bound)
        self.key = None if key is None else (self.call.component, key)


@dataclass
class Counts:
    """What the forwards have come to.

    forwards, rows, seconds: of the models that are called with adapters; the rows of them all, and their time.
    failed: forwards that raised.
    largest: rows of the largest forward.
    """

    forwards: int = 0
    rows: int = 0
    seconds: float = 0.0
    failed: int = 0
    largest: int = 0


class Forwards:
    """Runs calls one forward after the other.

    Args:
        max_batch: rows that a joint forward may have. A single call with more runs as it is.
        denoisers: components at which requests are meant to meet.
        rows_of: the context of a forward with adapters; None without adapters.
        adaptable: components that adapters may be on.
    """

    def __init__(
        self, max_batch: int, denoisers: Sequence[str], rows_of: RowsOf | None, adaptable: Sequence[str]
    ) -> None:
        self.max_batch, self.denoisers, self.adaptable = max_batch, denoisers, adaptable
        self._rows_of = rows_of
        self._limits: dict[Hashable, int] = {}  # rows that fit, of calls for which more ran out of memory
        self.counts = Counts()
        self.busy_since: float | None = None

    def choose(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """What runs next of these, the longest waiting first in their order: that one, and what can be joined to it.

        Whoever is on the way to the denoiser goes first, so that all meet there.
        """
        ahead = [each for each in waiting if each.call.component not in self.denoisers] or list(waiting)
        first = ahead[0]
        chosen, rows = [first], first.rows
        limit = self._limits.get(first.key, self.max_batch)
        for each in ahead[1:] if first.key is not None else ():
            if each.key == first.key and rows + each.rows <= limit:
                chosen.append(each)
                rows += each.rows
        return chosen

    def run(self, chosen: Sequence[Waiting]) -> None:
        """Answer these calls, by one forward if it succeeds; else by halves, so that only the culprit fails."""
        failed = self._try(chosen)
        if failed is None:
            return
        self.counts.failed += 1
        is_memory = is_out_of_memory(failed)
        traceback.clear_frames(failed.__traceback__)  # they hold the tensors of the forward
        if is_memory and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(chosen) == 1:
            chosen[0].call.error, chosen[0].done = failed, True
            return
        del failed
        if is_memory:
            self._limits[chosen[0].key] = max(1, sum(each.rows for each in chosen) // 2)
        half = len(chosen) // 2
        self.run(chosen[:half])
        self.run(chosen[half:])

    def _try(self, chosen: Sequence[Waiting]) -> Exception | None:
        self.busy_since = time.monotonic()
        try:
            answers = self._forward(chosen)
        except Exception as error:
            return error
        finally:
            self._count(chosen, time.monotonic() - self.busy_since)
            self.busy_since = None
        for each, answer in zip(chosen, answers, strict=True):
            each.call.answer, each.done = answer, True
        return None

    def _forward(self, chosen: Sequence[Waiting]) -> list[Any]:
        first = chosen[0].call
        with self._adapters(chosen):
            if len(chosen) == 1:
                return [first.function(*first.args, **first.kwargs)]
            joined = join(kind_of(first.function), [each.call.bound for each in chosen])
            output = invoke(first.function, joined)
        return split(output, [each.rows for each in chosen])

    def _adapters(self, chosen: Sequence[Waiting]) -> AbstractContextManager:
        component = chosen[0].call.component
        if self._rows_of is None or component not in self.adaptable or not all(each.rows for each in chosen):
            return nullcontext()
        return self._rows_of(component, [each.adapter_row for each in chosen for _ in range(each.rows)])

    def _count(self, chosen: Sequence[Waiting], seconds: float) -> None:
        if chosen[0].call.component in self.adaptable:
            rows = sum(each.rows for each in chosen)
            self.counts.forwards += 1
            self.counts.rows += rows
            self.counts.seconds += seconds
            self.counts.largest = max(self.counts.largest, rows)
