"""Run a server on this machine, until it is told to stop and has answered what it took."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable

import uvicorn
from diffusers import DiffusionPipeline

from ether_diffusion.server.app import make_app
from ether_diffusion.server.backend import LocalBackend
from ether_diffusion.server.metrics import Metrics
from ether_diffusion.server.settings import ServerSettings
from ether_diffusion.serving import Engine

GRACE = 5
"""Seconds beyond the longest request after which a stopping server waits no more."""


def serve(
    open_pipeline: Callable[[], DiffusionPipeline],
    address: socket.socket,
    settings: ServerSettings,
    *,
    max_batch: int | str,
    max_line: int,
    host_bytes: int,
) -> None:
    """Load a pipeline and answer requests until SIGTERM or Ctrl-C; then what was taken is answered first.

    Args:
        open_pipeline: loads it, onto its device.
        address: bound, not listening.
        settings: of the server.
        max_batch, max_line, host_bytes: of the engine.
    """
    with Engine(
        open_pipeline(), settings.adapters, max_batch=max_batch, max_line=max_line, host_bytes=host_bytes
    ) as engine:
        backend = LocalBackend(engine, folder=settings.adapters, hang_after=settings.hang_after)
        app = make_app(backend, settings, Metrics(engine))
        config = uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=round(settings.timeout) + GRACE)
        # uvicorn drains, and then raises the signal again, which would end the process as if it had failed.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(config).run(sockets=[address])
        finally:
            signal.signal(signal.SIGTERM, before)
