"""A server under several loads, and a simulated line at the same arrivals with the costs that the server has.

Requests come from many clients at random times that are drawn before; none waits for the one before it. A load is a
share of the images that the server makes in a second when its batches are full. What a step of b rows and an image
cost is measured on the server itself before each load, from requests that come when nothing else does.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from serving_parts.adapters import link_names, write_adapters
from serving_parts.queue_model import Costs, simulate
from serving_parts.server_process import GENERATIONS, client_of, metrics_of, server
from serving_parts.settings import Settings

MAX_BATCH = 16
ROWS = 2
"""Of an image, with classifier-free guidance."""
TOGETHER = (1, 2, 4, 8)
"""Images that are asked for at once to measure what their steps cost."""
LONGER = 10
"""Steps by which one of two requests is longer, to tell steps from the rest."""
REPEATS = 3
ASKED = {"prompt": "a red cube"}


def arrivals_of(clients: int, count: int, per_second: float, seed: int) -> list[float]:
    """When requests come from so many clients, each at random and equally often: seconds from 0, in order."""
    drawn, times = random.Random(seed), []
    for _ in range(clients):
        now = 0.0
        for _ in range(-(-count // clients) * 3):
            now += drawn.expovariate(per_second / clients)
            times.append(now)
    return sorted(times)[:count]


async def seconds_of(client: httpx.AsyncClient, adapters: Sequence[str], steps: int) -> float:
    """From asking for an image with each of these adapters, all at once, to the last answer."""
    began = time.perf_counter()
    await asyncio.gather(*(generate(client, adapter, steps) for adapter in adapters))
    return time.perf_counter() - began


async def generate(client: httpx.AsyncClient, adapter: str, steps: int) -> None:
    answer = await client.post(
        GENERATIONS, json={**ASKED, "adapter": adapter, "num_inference_steps": steps, "seed": 0}
    )
    answer.raise_for_status()


async def measure_costs(client: httpx.AsyncClient, adapters: Sequence[str]) -> Costs:
    """Medians of few: a step of b rows is a tenth of what ten steps more take.

    The rest of a request with one step grows by the same for each further image, and has a part that does not.
    """
    steps: dict[int, float] = {}
    rest: dict[int, float] = {}
    for images in TOGETHER:
        pairs = []
        for _ in range(REPEATS):
            short = await seconds_of(client, adapters[:images], 1)
            pairs.append((short, await seconds_of(client, adapters[:images], 1 + LONGER)))
        steps[ROWS * images] = max(0.0, statistics.median((long - short) / LONGER for short, long in pairs))
        rest[images] = statistics.median(short for short, _ in pairs) - steps[ROWS * images]
    slope, intercept = statistics.linear_regression(list(rest), list(rest.values()))
    return Costs(steps, image=max(0.0, slope), answer=max(0.0, intercept))


async def put_under_load(client: httpx.AsyncClient, adapters: Sequence[str], steps: int, times: list[float]) -> list:
    """Seconds from each of these times to the answer."""
    began = time.perf_counter()

    async def ask(number: int, at: float) -> float:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        await generate(client, adapters[number % len(adapters)], steps)
        return time.perf_counter() - began - at

    return await asyncio.gather(*(ask(number, at) for number, at in enumerate(times)))


async def measure_load(client: httpx.AsyncClient, adapters: Sequence[str], load: float, settings: Settings) -> dict:
    costs, steps = await measure_costs(client, adapters), settings.load_steps
    full = MAX_BATCH // ROWS
    capacity = full / (steps * costs.step(MAX_BATCH) + full * costs.image)
    times = arrivals_of(settings.clients, settings.arrivals, load * capacity, settings.seed)
    before = await metrics_of(client)
    measured = await put_under_load(client, adapters, steps, times)
    after = await metrics_of(client)
    forwards, rows = (after[name] - before[name] for name in ("forwards_total", "forward_rows_total"))
    simulated = simulate(times, steps=steps, rows=ROWS, max_batch=MAX_BATCH, costs=costs)
    return {
        "load": load,
        "images_per_second": load * capacity,
        "costs": {"steps": costs.steps, "image": costs.image, "answer": costs.answer},
        "rows_per_forward": rows / forwards,
        "measured": summary(measured),
        "simulated": summary(simulated),
    }


def summary(seconds: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(seconds), "p95": statistics.quantiles(seconds, n=20)[-1]}


async def measure_all(url: str, adapters: Sequence[str], settings: Settings) -> list[dict]:
    async with client_of(url) as client:
        await seconds_of(client, adapters, 2)  # warm, and all adapters are read
        return [await measure_load(client, adapters, load, settings) for load in settings.loads]


def measure(settings: Settings, log: Path) -> dict[str, Any]:
    """rows: for each load the seconds of a request, measured and simulated."""
    with tempfile.TemporaryDirectory() as name:
        methods = ("ETHER", "ETHER+")
        made = [write_adapters(settings.base, each, Path(name) / each, 4, settings.seed) for each in methods]
        mixed = list(itertools.chain(*zip(*made, strict=True)))
        folder = Path(name) / "adapters"
        adapters = link_names(mixed, folder, settings.clients)
        flags = {
            "base": settings.base,
            "adapters": folder,
            "max_batch": MAX_BATCH,
            "max_line": settings.arrivals,
            "dtype": "float32",
            "timeout": 600,
        }
        with server(log, flags) as url:
            return {"steps": settings.load_steps, "rows": asyncio.run(measure_all(url, adapters, settings))}


def table(report: dict[str, Any]) -> list[str]:
    heads = ("load", "images/s", "mean ms", "simulated", "p95 ms", "simulated", "rows/forward")
    lines = [" ".join(f"{head:>12}" for head in heads)]
    for row in report["rows"]:
        times = [1e3 * row[kind][name] for name in ("mean", "p95") for kind in ("measured", "simulated")]
        lines.append(
            f"{row['load']:>12.0%} {row['images_per_second']:>12.1f} "
            + " ".join(f"{each:>12.0f}" for each in times)
            + f" {row['rows_per_forward']:>12.1f}"
        )
    return lines
