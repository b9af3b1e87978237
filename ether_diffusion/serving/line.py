"""The line of requests that wait: bounded, and fair between clients."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from ether_diffusion.serving.job import EngineFull, Job


class Line:
    """Clients take turns; the requests of each are in the order in which they came. Not safe between threads.

    Args:
        limit: requests that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()  # whose turn is next, first

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._clients.values() for job in jobs)

    def add(self, job: Job) -> None:
        """Put a request at the end of its client's.

        Raises:
            EngineFull: as many wait as may.
        """
        self.check_room()
        self._clients.setdefault(job.request.client, deque()).append(job)

    def check_room(self, count: int = 1) -> None:
        """Raises EngineFull where there is no room for so many more."""
        if len(self) + count <= self.limit:
            return
        if count == 1:
            raise EngineFull(f"{len(self)} requests wait, which is the limit (max_line={self.limit}): try again later")
        raise EngineFull(f"{len(self)} requests wait, and {count} more exceed the limit (max_line={self.limit})")

    def first(self) -> Job | None:
        """The request whose turn it is; it stays."""
        return next((jobs[0] for jobs in self._clients.values()), None)

    def take(self) -> Job:
        """The request whose turn it is; its client is then the last one."""
        client, jobs = self._clients.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._clients[client] = jobs
        return job

    def remove(self, job: Job) -> bool:
        """Take out one request; whether it was there."""
        jobs = self._clients.get(job.request.client, ())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._clients[job.request.client]
        return True
