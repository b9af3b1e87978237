"""From a request for images to its answer: its images are made side by side, and given up together."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Coroutine
from typing import Any

from fastapi import Request, Response

from ether_diffusion.server.backend import Backend, ImageTask, MadeImage, cancel_and_wait
from ether_diffusion.server.errors import CLIENT_LEFT, ApiError
from ether_diffusion.server.messages import ImageData, ImagesRequest, ImagesResponse
from ether_diffusion.server.metrics import Metrics
from ether_diffusion.server.settings import ServerSettings
from ether_diffusion.server.tokens import Clients
from ether_diffusion.serving.lines import HIGHEST_SEED

BUSY_FOR = 5
"""Seconds after which a client that has as many images as it may have should ask again."""


class Generation:
    """Answers requests for images.

    Args:
        backend: makes them.
        clients: who asks.
        metrics: is told what came of it.
        settings: what fits.
    """

    def __init__(self, backend: Backend, clients: Clients, metrics: Metrics, settings: ServerSettings) -> None:
        self._backend, self._clients, self._metrics, self._settings = backend, clients, metrics, settings

    async def answer(self, asked: ImagesRequest, client: str) -> ImagesResponse:
        """Make the images; all of them are stopped if one fails, or if this is cancelled.

        Raises:
            ApiError: what is answered instead.
        """
        began = time.monotonic()
        tasks = self.tasks_of(asked, client)
        with self._clients.taking(client, len(tasks), retry_after=BUSY_FOR):
            images = await all_or_none([self._backend.image(task) for task in tasks])
        self._metrics.made(images, time.monotonic() - began)
        encoded = [base64.b64encode(image.content).decode() for image in images]
        return ImagesResponse(
            created=int(time.time()),
            data=[ImageData(b64_json=text, seed=task.seed) for text, task in zip(encoded, tasks, strict=True)],
            output_format=asked.output_format,
            size=f"{images[0].width}x{images[0].height}",
        )

    def tasks_of(self, asked: ImagesRequest, client: str) -> list[ImageTask]:
        """The images of a request, with what the server adds. Raises ApiError for what does not fit."""
        timeout = self._settings.timeout if asked.timeout is None else asked.timeout
        if timeout > self._settings.timeout:
            message = f"timeout: got {timeout:.6g} seconds; up to {self._settings.timeout:.6g} fit"
            raise ApiError(400, message, param="timeout")
        width, height = asked.width_and_height or (None, None)
        if width and width * height > self._settings.max_pixels:
            message = f"size: {asked.size} has {width * height:,} pixels; up to {self._settings.max_pixels:,} fit"
            raise ApiError(400, message, param="size")
        given = {
            "negative_prompt": asked.negative_prompt,
            "num_inference_steps": asked.num_inference_steps,
            "guidance_scale": asked.guidance_scale,
            "width": width,
            "height": height,
        }
        first = secrets.randbelow(HIGHEST_SEED + 1) if asked.seed is None else asked.seed
        return [
            ImageTask(
                prompt=asked.prompt,
                seed=(first + k) % (HIGHEST_SEED + 1),
                adapters=asked.adapters,
                client=client,
                timeout=timeout,
                output_format=asked.output_format,
                arguments={name: value for name, value in given.items() if value is not None},
            )
            for k in range(asked.n)
        ]


async def all_or_none(making: list[Coroutine[Any, Any, MadeImage]]) -> list[MadeImage]:
    """What all of these return; the others are stopped where one raises."""
    tasks = [asyncio.ensure_future(each) for each in making]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            await cancel_and_wait(task)


async def unless_client_leaves(request: Request, answering: Coroutine[Any, Any, Any]) -> Any:
    """What this returns; it is stopped, and the answer is one that nobody reads, when the client leaves before."""
    answer = asyncio.ensure_future(answering)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else Response(status_code=CLIENT_LEFT)
    finally:
        await cancel_and_wait(answer)
        await cancel_and_wait(leaving)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
