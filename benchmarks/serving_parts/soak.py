"""A server with many adapters and clients, of which some leave: is every image the right one, and memory flat?

Few of the adapters fit the main memory that the server is given, so most are read again when they are asked for. Each
image is compared with what the stock pipeline makes of the same adapter, and with what it makes of all the others.
Then further requests follow while the memory of the server is watched.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from serving_parts.adapters import link_names, open_base, write_adapters
from serving_parts.server_process import GENERATIONS, client_of, metrics_of, server
from serving_parts.settings import Settings

MAX_BATCH = 16
ASKED = {"prompt": "a red cube", "seed": 7, "num_inference_steps": 2}
LONG = {**ASKED, "num_inference_steps": 500}
ONE_GREY_LEVEL = 1
PARTS = 4
"""Of the further requests, after each of which the memory is looked at."""


def references(base: str, files: list[Path]) -> list[np.ndarray]:
    """What the stock pipeline generates with each adapter."""
    pipe, images = open_base(base), []
    arguments = {name: value for name, value in ASKED.items() if name != "seed"}
    for file in files:
        pipe.load_ether_weights(file, adapter_name="default")
        image = pipe(**arguments, generator=torch.Generator().manual_seed(ASKED["seed"])).images[0]
        images.append(np.asarray(image, dtype=int))
        pipe.unload_ether_weights()
    return images


class Soak:
    """Clients of one server, and what became of their requests.

    images: what each kind of adapter has to look like.
    """

    def __init__(self, client: httpx.AsyncClient, images: list[np.ndarray], settings: Settings) -> None:
        self._client, self._images, self._settings = client, images, settings
        self.seconds: list[float] = []
        self.distances: list[int] = []
        self.wrong = self.lost = 0
        self._random = random.Random(settings.seed)

    async def ask_many(self, requests: int) -> None:
        """All clients, each of which asks again when it has its answer."""
        numbers = iter(self._random.choices(range(self._settings.names), k=requests))

        async def client() -> None:
            for number in numbers:
                await self._ask(number)

        await asyncio.gather(*(client() for _ in range(self._settings.clients)))

    async def _ask(self, number: int) -> None:
        began = time.monotonic()
        answer = await self._client.post(GENERATIONS, json={**ASKED, "adapter": f"adapter-{number}"})
        self.seconds.append(time.monotonic() - began)
        if answer.status_code != 200:
            self.lost += 1
            print(f"adapter-{number}: {answer.status_code} {answer.text[:200]}", file=sys.stderr)
            return
        content = base64.b64decode(answer.json()["data"][0]["b64_json"])
        image = np.asarray(Image.open(io.BytesIO(content)), dtype=int)
        distances = [int(np.abs(image - each).sum()) for each in self._images]
        kind = number % len(self._images)
        self.distances.append(int(np.abs(image - self._images[kind]).max()))
        self.wrong += int(np.argmin(distances)) != kind or self.distances[-1] > ONE_GREY_LEVEL

    async def leave_all(self) -> None:
        """Clients that ask for images that take long, and leave without them."""
        await asyncio.gather(*(self._leave(1 + 0.1 * number, number) for number in range(self._settings.leaving)))

    async def _leave(self, after: float, number: int) -> None:
        asked = {**LONG, "adapter": f"adapter-{number % self._settings.names}"}
        try:
            await self._client.post(GENERATIONS, json=asked, timeout=after)
        except httpx.TimeoutException:
            return
        raise AssertionError("it was answered")

    async def seconds_until_free(self) -> float:
        """Until nothing runs or waits any more."""
        began = time.monotonic()
        while True:
            now = await metrics_of(self._client)
            if now["running_requests"] == now["waiting_requests"] == 0:
                return time.monotonic() - began
            await asyncio.sleep(0.02)


async def put_under_load(url: str, images: list[np.ndarray], settings: Settings) -> dict[str, Any]:
    async with client_of(url) as client:
        soak = Soak(client, images, settings)
        began = time.monotonic()
        await asyncio.gather(soak.ask_many(settings.requests), soak.leave_all())
        whole = time.monotonic() - began
        freed = await soak.seconds_until_free()
        loaded = await metrics_of(client)
        memory = [loaded["process_resident_memory_bytes"]]
        for part in range(PARTS):
            await soak.ask_many(settings.further * (part + 1) // PARTS - settings.further * part // PARTS)
            memory.append((await metrics_of(client))["process_resident_memory_bytes"])
        return {
            "answered": len(soak.distances),
            "lost": soak.lost,
            "wrong": soak.wrong,
            "largest_distance": max(soak.distances),
            "images_per_second": settings.requests / whole,
            "median_seconds": statistics.median(soak.seconds),
            "slowest_seconds": max(soak.seconds),
            "left": loaded["cancellations_total"],
            "seconds_until_rows_were_free": freed,
            "rows_per_forward": loaded["forward_rows_total"] / loaded["forwards_total"],
            "adapter_loads": loaded["adapter_loads_total"],
            "adapter_host_bytes": loaded["adapter_host_bytes"],
            "resident_mib": [round(each / 2**20, 1) for each in memory],
        }


def measure(settings: Settings, log: Path) -> dict[str, Any]:
    """faults: what must not be; empty where all is right."""
    with tempfile.TemporaryDirectory() as name:
        methods, half = ("ETHER", "ETHER+"), settings.kinds // 2
        made = [write_adapters(settings.base, each, Path(name) / each, half, settings.seed) for each in methods]
        files = [file for pair in zip(*made, strict=True) for file in pair]
        folder = Path(name) / "adapters"
        link_names(files, folder, settings.names)
        flags = {
            "base": settings.base,
            "adapters": folder,
            "max_batch": MAX_BATCH,
            "max_line": settings.clients + settings.leaving,
            "host_memory": settings.host_memory,
            "dtype": "float32",
            "timeout": 600,
        }
        images = references(settings.base, files)
        with server(log, flags) as url:
            report = asyncio.run(put_under_load(url, images, settings))
    return report | {"faults": faults(report, settings)}


def faults(report: dict[str, Any], settings: Settings) -> list[str]:
    expected = {"answered": settings.requests + settings.further, "lost": 0, "wrong": 0, "left": settings.leaving}
    return [f"{name}: {report[name]}, not {value}" for name, value in expected.items() if report[name] != value]


def table(report: dict[str, Any]) -> list[str]:
    return [
        f"{key:30} {value:.3f}" if isinstance(value, float) else f"{key:30} {value}" for key, value in report.items()
    ]
