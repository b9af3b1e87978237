"""`ether-diffusion serve` as a process of its own, and what it tells of itself."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

STARTS_WITHIN = 300
GENERATIONS = "/v1/images/generations"


@contextmanager
def server(log: Path, flags: Mapping[str, Any]) -> Iterator[str]:
    """The address of a server with these flags that runs meanwhile; it must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word for name, value in {**flags, "port": port}.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "ether_diffusion.commands.main", "serve", *words]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_start(process, url, log)
        yield url
        process.terminate()
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
    finally:
        process.kill()
        process.wait()


def _await_start(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")


def client_of(url: str) -> httpx.AsyncClient:
    """With as many connections as there are requests."""
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))


async def metrics_of(client: httpx.AsyncClient) -> dict[str, float]:
    """What a server tells, without its histograms' buckets."""
    lines = (await client.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line)
    return {name.removeprefix("ether_diffusion_"): float(value) for name, value in pairs}
