"""One request while it is generated: what is told of it, and how it is cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue

from PIL import Image

from ether_diffusion.demo.settings import Settings


class Cancelled(Exception):
    """The request was cancelled, or the server is going down."""


class Failed(Exception):
    """The request failed; the message is for the person who asked."""


@dataclass(frozen=True)
class Generating:
    """Image `image` of `images` is at `step` of `steps`; counted from 1."""

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


class Job:
    """Carries news from the thread that generates to the one that asked."""

    def __init__(self) -> None:
        self.cancelled = False
        self._news: SimpleQueue[Generating | Generated | Exception] = SimpleQueue()

    def tell(self, news: Generating | Generated | Exception) -> None:
        self._news.put(news)

    def events(self) -> Iterator[Generating | Generated]:
        """The news, as they come; the last one is `Generated`. Raises what was told in its place."""
        while True:
            news = self._news.get()
            while not self._news.empty():  # a reader slower than the model is told only where it is now
                news = self._news.get()
            if isinstance(news, Exception):
                raise news
            yield news
            if isinstance(news, Generated):
                return
