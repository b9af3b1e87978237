"""What makes the images of requests: the engine of this process, or of replicas elsewhere, behind one interface."""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.server.errors import ApiError, of_engine, of_file
from ether_diffusion.serving import DeadlineExceeded, Engine, Job, UnknownAdapter
from ether_diffusion.serving.png import encode_png, image_settings, sampling_defaults

JPEG_QUALITY = 95
THREADS = 8
"""For what would hold up the event loop: reading adapters, encoding images."""


@dataclass(frozen=True, kw_only=True)
class ImageTask:
    """One image to make; it says everything, the seed too, so that whoever makes it makes the same.

    timeout: seconds from now. arguments: further ones of the pipeline's call.
    """

    prompt: str
    seed: int
    adapters: tuple[tuple[str, float], ...] = ()
    client: str = ""
    timeout: float = 120.0
    output_format: str = "png"
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MadeImage:
    """An image as a file, and the seconds that it waited and that each of its steps took."""

    content: bytes
    width: int
    height: int
    line: float
    steps: tuple[float, ...]


class Backend(Protocol):
    """What an app needs."""

    async def image(self, task: ImageTask) -> MadeImage:
        """Make an image. Stopped within a step when it is cancelled.

        Raises:
            ApiError: what the request is answered instead.
        """

    async def check_adapter(self, path: Path) -> None:
        """Read an adapter with all checks, and let go of it.

        Raises:
            ApiError: 422, it does not fit.
        """

    async def fault(self) -> str | None:
        """Why no images can be made any more; None where they can."""


class LocalBackend:
    """The engine of this process.

    Args:
        engine: closed by whoever made it.
        folder: of its adapters; errors about them leave it out.
        hang_after: seconds after which a forward counts as hung.
    """

    def __init__(self, engine: Engine, *, folder: Path | None, hang_after: float) -> None:
        self.engine, self._folder, self._hang_after = engine, folder, hang_after
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="server")
        self._defaults = sampling_defaults(engine.pipe)
        self._typical = 1.0  # seconds of an image, a running mean

    async def image(self, task: ImageTask) -> MadeImage:
        """As `Backend.image`."""
        clock = StepClock()
        deadline = time.monotonic() + task.timeout
        job = await self._submit(task, clock)
        try:
            future = asyncio.wrap_future(job.future)
            # A job looks at its deadline after each step; who waits is answered in time.
            result = await asyncio.wait_for(future, max(0.001, deadline - time.monotonic()))
        except (TimeoutError, asyncio.TimeoutError):
            raise of_engine(DeadlineExceeded(f"not done within {task.timeout:.3g} seconds")) from None
        except Exception as error:
            raise of_engine(error, retry_after=self.retry_after) from error
        finally:
            job.cancel()  # does nothing once it is done
        self._typical += 0.1 * (job.times["done"] - job.times["submitted"] - self._typical)
        image = result.images[0]
        line = job.times["started"] - job.times["submitted"]
        return MadeImage(
            content=await self._in_thread(encode, image, task, self._defaults),
            width=image.width,
            height=image.height,
            line=line,
            steps=tuple(clock.seconds),
        )

    async def _submit(self, task: ImageTask, clock: StepClock) -> Job:
        submitting = asyncio.get_running_loop().run_in_executor(self._threads, self._submit_now, task, clock)
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the thread goes on; what it submits is not wanted any more
            submitting.add_done_callback(_cancel_job)
            raise

    def _submit_now(self, task: ImageTask, clock: StepClock) -> Job:
        try:
            return self.engine.submit(
                prompt=task.prompt,
                adapter=dict(task.adapters) or None,
                seed=task.seed,
                client=task.client,
                timeout=task.timeout,
                on_step=clock,
                **task.arguments,
            )
        except Exception as error:
            raise self._explained(error, task) from error

    def _explained(self, error: Exception, task: ImageTask) -> ApiError:
        """What is answered when a request is not taken: whether an adapter is at fault is asked of the store."""
        store = self.engine.store
        for name, _ in task.adapters if isinstance(error, ValueError | OSError) else ():
            if store is None:
                return of_engine(UnknownAdapter("this server has no adapters"))
            try:
                store.get(name)
            except InputError as refused:
                return of_engine(refused)
            except (ValueError, OSError) as broken:
                return of_file(broken, self._folder, name)
        return of_engine(error, retry_after=self.retry_after)

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room: what an image takes, between 1 and 60."""
        return min(60, max(1, math.ceil(self._typical)))

    async def check_adapter(self, path: Path) -> None:
        """As `Backend.check_adapter`."""
        try:
            await self._in_thread(self.engine.check_adapter, path)
        except (ValueError, OSError) as error:
            raise of_file(error, path.parent, path.stem) from error

    async def fault(self) -> str | None:
        """As `Backend.fault`."""
        busy_since = self.engine.busy_since
        if busy_since is not None and time.monotonic() - busy_since > self._hang_after:
            return f"a forward has run for more than {self._hang_after:.3g} seconds"
        return None if self.engine.alive else "the engine has stopped"

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


def _cancel_job(submitting: asyncio.Future) -> None:
    """Cancel what was submitted, if anything was."""
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


class StepClock:
    """Called after each step of a job: the seconds between them, the first from when the job started."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def __call__(self, job: Job) -> None:
        now = time.monotonic()
        self.seconds.append(now - (job.times["started"] if self._last is None else self._last))
        self._last = now


def encode(image: Image.Image, task: ImageTask, defaults: Mapping[str, Any]) -> bytes:
    """An image as a PNG that says how it was made, or as a JPEG. defaults: of what the task leaves to the pipeline."""
    if task.output_format == "jpeg":
        content = io.BytesIO()
        image.convert("RGB").save(content, "JPEG", quality=JPEG_QUALITY)
        return content.getvalue()
    settings = image_settings(
        image,
        prompt=task.prompt,
        seed=task.seed,
        adapters=task.adapters,
        arguments=task.arguments,
        defaults=defaults,
    )
    return encode_png(image, settings)


async def cancel_and_wait(task: asyncio.Task) -> None:
    """End a task, and let it clean up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
