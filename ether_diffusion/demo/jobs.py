"""A request in line: what the page hears of it, and how it is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from ether_diffusion.demo.settings import Settings

ABANDONED_AFTER = 20.0
"""Seconds without anybody asking for news, after which a request is given up."""


class Cancelled(Exception):
    """The request was cancelled, or nobody waits for it any more."""


class Failed(Exception):
    """The request failed; the message is for the person who asked."""


@dataclass(frozen=True)
class Waiting:
    """In line: `place` requests are to be done before this one, the present one included."""

    place: int


@dataclass(frozen=True)
class Generating:
    """At work on image `image` of `images`, after `step` of `steps`; counted from 1."""

    image: int
    images: int
    step: int
    steps: int
    preview: Image.Image | None


@dataclass(frozen=True)
class Generated:
    """Done: for every image the base model's and the adapted one (None where no adapter was asked for).

    settings, control: as they were asked for.
    """

    images: list[tuple[Image.Image, Image.Image | None]]
    settings: Settings
    control: Image.Image | None
    seconds: float


Event = Waiting | Generating | Generated


class Job:
    """A request in line. `events` is for the one who asked; the rest is the worker's.

    Args:
        settings: what is asked for.
        owner: who asks: `Worker.cancel` takes back all that one owner has in line.
        control: the control image, if one of the adapters is a control adapter.
    """

    def __init__(self, settings: Settings, owner: str, control: Image.Image | None = None):
        self.settings, self.owner, self.control = settings, owner, control
        self._changed = threading.Condition()
        self._event: Event | None = None
        self._error: Exception | None = None
        self._cancelled = False
        self._last_seen = time.monotonic()

    def events(self) -> Iterator[Event]:
        """The news, as they come; the last one is `Generated`. News that nobody fetched in time are left out.

        Raises:
            Cancelled: the request was taken back.
            InputError: it asks for something that is not there.
            Failed: whatever else went wrong, in words.
        """
        seen: Event | None = None
        while True:
            with self._changed:
                while self._event is seen and self._error is None:
                    self._last_seen = time.monotonic()
                    self._changed.wait(1.0)
                self._last_seen = time.monotonic()
                if self._error is not None:
                    raise self._error
                seen = self._event
            yield seen
            if isinstance(seen, Generated):
                return

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True

    @property
    def given_up(self) -> bool:
        return self._cancelled or time.monotonic() - self._last_seen > ABANDONED_AFTER

    def tell(self, event: Event) -> None:
        with self._changed:
            self._event = event
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
