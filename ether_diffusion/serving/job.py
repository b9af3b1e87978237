"""A request to the engine: its result, how far it is, and how it is cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from diffusers import DiffusionPipeline


class EngineFull(RuntimeError):
    """As many requests wait as may; try again later."""


class EngineClosed(RuntimeError):
    """The engine takes no requests any more."""


class Cancelled(Exception):
    """The request was cancelled."""


class DeadlineExceeded(Exception):
    """The request was not done within its timeout."""


@dataclass(frozen=True)
class Request:
    """What was asked for, checked.

    arguments: of the pipeline's call, but for the generator.
    adapters: as they were when the request came, with their strengths, in the order of composition: on the host, or
        where the request runs alone their files.
    seeds: one, or one for each image.
    alone: whether nothing may run beside it.
    function: what is called with the pipeline in place of the pipeline's own call; alone.
    timeout: the seconds that it was given, or None.
    deadline: when they are over, on `time.monotonic()`'s clock, or None.
    """

    pipe: DiffusionPipeline
    arguments: Mapping[str, Any]
    adapters: Sequence[tuple[Any, float]]
    seeds: int | Sequence[int] | None
    scheduler: Any
    client: str
    timeout: float | None
    deadline: float | None
    on_step: Callable[[Job], None] | None
    alone: bool = False
    function: Callable[[DiffusionPipeline], Any] | None = None


@dataclass(frozen=True)
class Progress:
    """Step `step` of `steps` is done; 0 of 0 before the first."""

    step: int = 0
    steps: int = 0


@dataclass(eq=False)
class Job:
    """One request, from `Engine.submit` to its images.

    Attributes:
        seed: what the images were made from; drawn where none was given.
        future: a `concurrent.futures.Future` of the result, for `asyncio.wrap_future` and callbacks.
        progress: the steps that are done.
        times: when it was submitted, started and done, on `time.monotonic()`'s clock; None before.
    """

    request: Request = field(repr=False)
    future: Future = field(default_factory=Future)
    progress: Progress = Progress()
    times: dict[str, float | None] = field(
        default_factory=lambda: {"submitted": time.monotonic(), "started": None, "done": None}
    )
    _stopped: Exception | None = field(default=None, repr=False)
    _withdraw: Callable[[Job], None] = field(default=lambda _job: None, repr=False)

    @property
    def seed(self) -> int | Sequence[int] | None:
        return self.request.seeds

    @property
    def done(self) -> bool:
        return self.future.done()

    def result(self, timeout: float | None = None) -> Any:
        """What the pipeline returned (`.images`).

        Raises:
            Cancelled, DeadlineExceeded, EngineClosed: it was stopped.
            concurrent.futures.TimeoutError: not done after `timeout` seconds; it goes on.
            Exception: what the pipeline raised.
        """
        try:
            return self.future.result(timeout)
        except CancelledError:  # by `future.cancel()`, as asyncio does
            raise Cancelled("the request was cancelled") from None

    def cancel(self) -> None:
        """Stop it: at once while it waits, at its next step while it runs; no more once it is done."""
        self.stop(Cancelled("the request was cancelled"))

    def stop(self, reason: Exception) -> None:
        """Have it end with this exception, as `cancel` does."""
        if self._stopped is None and not self.done:
            self._stopped = reason
            self._withdraw(self)

    def reason_to_stop(self) -> Exception | None:
        """Why it must not go on: cancelled, or past its deadline."""
        if self._stopped is None and self.future.cancelled():
            self._stopped = Cancelled("the request was cancelled")
        deadline = self.request.deadline
        if self._stopped is None and deadline is not None and time.monotonic() > deadline:
            allowed = self.request.timeout
            self._stopped = DeadlineExceeded(f"the request was not done within its timeout of {allowed:g} seconds")
        return self._stopped

    def release_adapters(self) -> None:
        """Hold them no longer: they are on the device, or needed no more."""
        self.request = replace(self.request, adapters=())

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        """Set what came of it, once; what comes later is dropped."""
        self.release_adapters()
        if self.times["done"] is None:
            self.times["done"] = time.monotonic()
        with suppress(InvalidStateError):  # asyncio cancels futures from its own thread
            if error is None:
                self.future.set_result(result)
            else:
                self.future.set_exception(error)
