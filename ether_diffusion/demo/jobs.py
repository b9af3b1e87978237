"""What is told of a request while its images are generated, and what comes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ether_diffusion.demo.settings import Settings
from ether_diffusion.serving.job import Cancelled, Job

__all__ = ["Cancelled", "Failed", "Generated", "Generating", "News"]

PREVIEW_SHARE = 0.25
"""Of the time that a request takes, what previews may add at most."""


class Failed(Exception):
    """The request failed; the message is for the person who asked."""


@dataclass(frozen=True)
class Generating:
    """Image `image` of `images`, the first that is not done, is at `step` of `steps`; counted from 1.

    done: the share of all steps of all images, from 0 to 1.
    """

    image: int
    images: int
    step: int
    steps: int
    done: float
    preview: Image.Image | None


@dataclass(frozen=True)
class Generated:
    """Done: for every seed the images of `settings.columns`, such as the base model's and the adapted one.

    settings, control: as they were asked for. seconds: with the reading of adapters.
    """

    images: list[tuple[Image.Image, ...]]
    settings: Settings
    control: Image.Image | None
    seconds: float


class News:
    """Carries news of a request's images from the threads of the engine, of which one runs at a time, to who asked.

    decode: makes a preview of half-finished latents; None where it cannot.
    """

    def __init__(self, images: int, steps: int, decode: Callable[[torch.Tensor], Image.Image | None]) -> None:
        self.images, self.steps, self._decode = images, steps, decode
        self._done = [0] * images  # steps of each image
        self._previews: list[Image.Image | None] = [None] * images
        self._began: float | None = None
        self._spent = self._cost = 0.0
        self._changed = threading.Event()

    def step(self, image: int, job: Job) -> None:
        """For the engine, after each step of an image, counted from 0."""
        # Some schedulers take more steps than were asked for.
        self._done[image] = max(1, self.steps * job.progress.step // job.progress.steps)
        self._changed.set()

    def look(self, image: int, _pipe: Any, _step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        """For the pipeline, at the end of each step: previews of the image that is told of, while they cost little."""
        begun = time.perf_counter()
        if self._began is None:
            self._began = begun
        is_told = image == self._current and self._done[image] < self.steps
        # The first preview tells what one costs.
        if is_told and self._spent + self._cost <= PREVIEW_SHARE * (begun - self._began):
            self._previews[image] = self._decode(values["latents"])
            self._cost = time.perf_counter() - begun
            self._spent += self._cost
        return {}

    @property
    def _current(self) -> int:
        return next((k for k, done in enumerate(self._done) if done < self.steps), self.images - 1)

    def follow(self, jobs: Sequence[Job]) -> Iterator[Generating]:
        """How far they are, until all are done; a reader slower than the model is told only where it is now.

        Raises:
            Exception: that of the first that fails.
        """
        for job in jobs:
            job.future.add_done_callback(lambda _future: self._changed.set())
        while True:
            self._changed.wait()
            self._changed.clear()
            finished = [job for job in jobs if job.done]
            for job in finished:
                job.result()
            if len(finished) == len(jobs):
                return
            if any(self._done):
                image = self._current
                share = sum(self._done) / (self.images * self.steps)
                yield Generating(image + 1, self.images, self._done[image], self.steps, share, self._previews[image])
