"""The server on a Ray cluster: the same app in front, and the same engine in each replica behind it.

Ray places, restarts, scales and updates replicas, and sends each image to one with a short line. Loading an adapter
takes milliseconds, so no replica owns one, and each mixes adapters in its batches: Serve's own batching and
multiplexing would split the batches by adapter, and pin one that many ask for to one replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Gauge

from ether_diffusion.base_models import MINIATURE, open_for_inference
from ether_diffusion.server.app import make_app
from ether_diffusion.server.backend import ImageTask, LocalBackend, MadeImage
from ether_diffusion.server.errors import ApiError, of_engine
from ether_diffusion.server.metrics import COUNTERS, GAUGES, PREFIX, engine_values
from ether_diffusion.server.settings import MIB, ServerSettings
from ether_diffusion.server.tokens import read_tokens
from ether_diffusion.serving import DeadlineExceeded, Engine
from ether_diffusion.serving.limits import MAX_LINE

APP = "ether-diffusion"
TYPICAL_BATCH = 16
"""Rows that replicas are taken to have where they measure their own."""
DIED = (RayActorError, ReplicaUnavailableError)
"""A replica that died or cannot be reached while it had an image to make."""
PAUSE = 0.2
MANY = 10_000


class RayArguments(BaseModel):
    """What `build` takes: from the command's flags, or from `args` of a Serve config file.

    num_gpus, num_cpus: of a replica; default: a GPU where the cluster has any.
    """

    model_config = ConfigDict(extra="forbid")

    base: str = MINIATURE
    variant: str | None = None
    revision: str | None = None
    dtype: str | None = None
    adapters: Path | None = None
    max_batch: int | Literal["auto"] = "auto"
    max_line: int = MAX_LINE
    timeout: float = 120.0
    token_file: Path | None = None
    token_limit: int = 16
    uploads: bool = False
    max_upload: int = Field(256, description="MiB")
    host_memory: int = Field(2048, description="MiB")
    hang_after: float = 300.0
    min_replicas: int = 1
    max_replicas: int = 1
    num_gpus: float | None = None
    num_cpus: float = 1.0

    def settings(self) -> ServerSettings:
        return ServerSettings(
            adapters=self.adapters,
            timeout=self.timeout,
            tokens=frozenset() if self.token_file is None else read_tokens(self.token_file),
            token_limit=self.token_limit,
            uploads=self.uploads,
            max_upload=self.max_upload * MIB,
            hang_after=self.hang_after,
        )


class EngineReplica:
    """One engine, on a device of its own."""

    def __init__(self, arguments: RayArguments) -> None:
        pipe = open_for_inference(
            arguments.base, dtype=arguments.dtype, variant=arguments.variant, revision=arguments.revision
        )
        self._engine = Engine(
            pipe,
            arguments.adapters,
            max_batch=arguments.max_batch,
            max_line=MANY,  # Ray's line is the one that is bounded
            host_bytes=arguments.host_memory * MIB,
        )
        self._backend = LocalBackend(self._engine, folder=arguments.adapters, hang_after=arguments.hang_after)
        self._gauges = {name: Gauge(f"{PREFIX}_{name}", text) for name, text in {**GAUGES, **COUNTERS}.items()}

    async def image(self, task: ImageTask) -> MadeImage | ApiError:
        """What the backend makes; a refusal is an answer, not a failure of the replica for Ray to log."""
        try:
            return await self._backend.image(task)
        except ApiError as refused:
            return refused

    async def check_adapter(self, path: Path) -> ApiError | None:
        try:
            return await self._backend.check_adapter(path)
        except ApiError as refused:
            return refused

    async def check_health(self) -> None:
        """Called by Ray every few seconds; a replica that raises is replaced."""
        if (fault := await self._backend.fault()) is not None:
            raise RuntimeError(fault)
        for name, value in engine_values(self._engine).items():
            self._gauges[name].set(value)


class RayBackend:
    """The replicas, as an app sees them.

    engines: the handle of their deployment.
    """

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines

    async def image(self, task: ImageTask) -> MadeImage:
        """As `Backend.image`. Where a replica dies, another makes the same image: its seed is in the task."""
        deadline = time.monotonic() + task.timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                return await _answer(self._engines.image.remote(replace(task, timeout=left)), left)
            except DIED:
                await asyncio.sleep(PAUSE)
        raise of_engine(DeadlineExceeded(f"not done within {task.timeout:.3g} seconds"))

    async def check_adapter(self, path: Path) -> None:
        """As `Backend.check_adapter`; the folder is one that all machines see."""
        await _answer(self._engines.check_adapter.remote(path), None)

    async def fault(self) -> None:
        """None: Ray looks after the replicas, and replaces those that fail."""


async def _answer(response: Any, timeout: float | None) -> Any:
    """What a replica answers; it stops when nobody waits any more.

    Raises:
        ApiError: what the replica answered instead, or that the line is full.
        DIED: it died.
    """
    waiting = asyncio.ensure_future(_awaited(response))
    try:
        answer = await asyncio.wait_for(waiting, timeout)
    except (TimeoutError, asyncio.TimeoutError):
        raise of_engine(DeadlineExceeded("not done within the timeout")) from None
    except BackPressureError:
        raise ApiError(429, "too many requests wait: try again later", code="line_full", retry_after=5) from None
    finally:
        if not waiting.done() or waiting.cancelled():
            response.cancel()
    if isinstance(answer, ApiError):
        raise answer
    return answer


async def _awaited(response: Any) -> Any:
    return await response


@serve.ingress()
class Ingress:
    """The app, which holds no model."""

    def __init__(self, engines: DeploymentHandle, settings: ServerSettings) -> None:
        self._engines, self._settings = engines, settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(RayBackend(self._engines), self._settings)


def build(arguments: RayArguments) -> serve.Application:
    """The application, for `serve.run`, or as `import_path` of a Serve config file.

    Raises:
        InputError: arguments that cannot be used.
    """
    settings = arguments.settings()
    rows = TYPICAL_BATCH if arguments.max_batch == "auto" else arguments.max_batch
    gpus = arguments.num_gpus
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0
    engines = serve.deployment(EngineReplica).options(
        name="engines",
        max_ongoing_requests=2 * rows,  # so that the next ones are there when a batch has room
        max_queued_requests=arguments.max_line,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": rows,
        },
        ray_actor_options={"num_gpus": gpus, "num_cpus": arguments.num_cpus},
        graceful_shutdown_timeout_s=arguments.timeout,
    )
    ingress = serve.deployment(Ingress).options(
        name="ingress",
        max_ongoing_requests=MANY,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=arguments.timeout,
    )
    return ingress.bind(engines.bind(arguments), settings)


def serve_on_ray(arguments: RayArguments, *, host: str, port: int) -> None:
    """Serve on the cluster of this machine, or on one that is started for it, until SIGTERM or Ctrl-C.

    Raises:
        InputError: arguments that cannot be used.
    """
    arguments.settings()
    with ray.init(log_to_driver=True):
        for each in (signal.SIGTERM, signal.SIGINT):  # in place of Ray's own, which end the process at once
            signal.signal(each, signal.default_int_handler)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                serve.start(http_options={"host": host, "port": port})
                serve.run(build(arguments), name=APP, route_prefix="/")
                print(f"ether-diffusion serve: http://{host}:{port} on Ray", flush=True)
                threading.Event().wait()
        finally:
            serve.shutdown()
