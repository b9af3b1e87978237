"""What was asked of the page: each job has an address, goes on whether somebody looks or not, and keeps its result."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ether_diffusion.demo.jobs import Cancelled, Failed
from ether_diffusion.errors import InputError

logger = logging.getLogger(__name__)

MOST_UNFINISHED = 16
"""Jobs of one owner that wait or run at the same time."""
LONGEST_LINE = 64
"""Jobs of all owners that wait or run at the same time."""
MOST_KEPT = 200
"""Finished jobs that are remembered, of all owners: each may hold images of a few megabytes."""


@dataclass(frozen=True)
class Waiting:
    """The news of a job in line: how many jobs are before it."""

    before: int


class Job:
    """One of them. Threads of the board write, any number of readers follow.

    Attributes:
        address: a random name that finds it again; who has it may look at it and cancel it.
        kind, owner: as `Board.submit` got them.
        news: the last that was told of it, or None.
        error: why it ended without a result, or None.
        done: nothing more will be told.
    """

    def __init__(self, board: Board, lane: str, kind: str, owner: str, work: Callable[[], Iterator[Any]]):
        self.address = secrets.token_urlsafe(16)
        self.lane, self.kind, self.owner = lane, kind, owner
        self.news: Any = None
        self.error: Exception | None = None
        self.done = self.started = False
        self._board, self._work = board, work
        self._cancelled = False

    def cancel(self) -> None:
        """Let it end before its next news; one that is done stays as it is."""
        with self._board.changed:
            self._cancelled = True
            if not self.started:
                self._finish(Cancelled("cancelled"))

    def follow(self) -> Iterator[Any]:
        """Its news until it is done, `Waiting` while it is in line; who is slow is told only the latest.

        News with a true `is_result` come when it is done: nothing comes after them.

        Raises:
            Exception: the job's own.
        """
        told = object()
        while True:
            with self._board.changed:
                self._board.changed.wait_for(lambda told=told: self.done or self._has_more_than(told))
                news, done = self._told(), self.done
            if news is not None and news != told:
                yield news
            told = news
            if done:
                if self.error is not None:
                    raise self.error.with_traceback(None)
                return

    def run(self) -> None:
        """For the board's thread."""
        with self._board.changed:
            if self.done:
                return
            self.started = True
            self._board.changed.notify_all()
        error: Exception | None = None
        try:
            self._drain()
        except (Cancelled, InputError, Failed) as known:
            error = known
        except Exception as unknown:
            logger.error("a job of the page failed", exc_info=unknown)
            error = Failed(f"This failed ({type(unknown).__name__}: {unknown}). The next one starts afresh.")
        with self._board.changed:
            self._finish(error)

    def _drain(self) -> None:
        news = self._work()
        try:
            for each in news:
                with self._board.changed:
                    if self._cancelled:
                        raise Cancelled("cancelled")
                    self.news = each
                    self._board.changed.notify_all()
        finally:
            news.close()

    def _has_more_than(self, told: Any) -> bool:
        news = self._told()
        return news != told and not getattr(news, "is_result", False)

    def _told(self) -> Any:
        if self.started or self.done:
            return self.news
        return Waiting(self._board.before(self))

    def _finish(self, error: Exception | None) -> None:
        if not self.done:
            self.done, self.error, self._work = True, error, None
            self._board.changed.notify_all()


class Board:
    """The jobs of a server, in lanes: those of one lane run one after the other.

    Args:
        lanes: their names.
    """

    def __init__(self, *lanes: str) -> None:
        self.changed = threading.Condition(threading.RLock())
        self._threads = {lane: ThreadPoolExecutor(1, f"page-{lane}") for lane in lanes}
        self._jobs: dict[str, Job] = {}

    def submit(self, lane: str, kind: str, owner: str, work: Callable[[], Iterator[Any]]) -> Job:
        """Put a job in line: `work()` gives its news, of which the last is its result. Closing that must end it.

        kind: what its news are, for who follows.

        Raises:
            InputError: too many are unfinished, of the owner or in all.
        """
        with self.changed:
            unfinished = [job.owner for job in self._jobs.values() if not job.done]
            if (own := unfinished.count(owner)) >= MOST_UNFINISHED:
                raise InputError(f"{own} of your jobs are not done yet; wait for one, or cancel one")
            if len(unfinished) >= LONGEST_LINE:
                raise InputError(f"{len(unfinished)} jobs are in line, and no more fit; try again in a while")
            for old in [job.address for job in self._jobs.values() if job.done][: max(0, len(self._jobs) - MOST_KEPT)]:
                del self._jobs[old]
            job = Job(self, lane, kind, owner, work)
            self._jobs[job.address] = job
            self._threads[lane].submit(job.run)
        return job

    def find(self, address: str) -> Job | None:
        """The job at an address; None where there is none, or no more."""
        with self.changed:
            return self._jobs.get(address)

    def latest(self, kind: str, owner: str) -> Job | None:
        """The last job of a kind that an owner submitted."""
        with self.changed:
            mine = (job for job in reversed(self._jobs.values()) if (job.kind, job.owner) == (kind, owner))
            return next(mine, None)

    def before(self, job: Job) -> int:
        """How many unfinished jobs are before one in its lane."""
        with self.changed:
            ahead = 0
            for other in self._jobs.values():
                if other is job:
                    break
                ahead += other.lane == job.lane and not other.done
            return ahead

    def close(self) -> None:
        """Cancel all, and wait for those that run."""
        with self.changed:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancel()
        for thread in self._threads.values():
            thread.shutdown()
