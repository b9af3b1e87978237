"""How long the engine lets the denoiser wait between two forwards, and what of that the pipeline itself takes.

For every number of requests that run together: the median time of a forward, the median time from its end to the next
one's start, and what of that time is the engine's own. The rest is the schedulers' and guidance's work, which the
stock pipeline does as well, once for each request. The processor's time is given beside the clock's: on a machine that
does other things, threads wait for their turn.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from ether_diffusion.serving import Engine
from serving_parts.adapters import open_base
from serving_parts.settings import Settings

REQUESTS = (1, 2, 4, 8, 16)
STEPS = 40
ARGUMENTS = {"prompt": "a red cube", "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Between(NamedTuple):
    """Median seconds of a forward, and from one to the next."""

    forward: float
    gap: float


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[list[tuple[dict[str, float], dict[str, float]]]]:
    """When each forward of a model began and ended, by each clock."""
    times: list[tuple[dict[str, float], dict[str, float]]] = []
    began: list[dict[str, float]] = []

    def now() -> dict[str, float]:
        return {name: clock() for name, clock in CLOCKS.items()}

    hooks = (
        model.register_forward_pre_hook(lambda *_: began.append(now())),
        model.register_forward_hook(lambda *_: times.append((began.pop(), now()))),
    )
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def medians(times: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Between]:
    return {
        clock: Between(
            statistics.median(end[clock] - begin[clock] for begin, end in times),
            statistics.median(begin[clock] - end[clock] for (_, end), (begin, _) in itertools.pairwise(times)),
        )
        for clock in CLOCKS
    }


def measure_stock(pipe: DiffusionPipeline) -> dict[str, Between]:
    with watched(pipe.unet) as times:
        pipe(**ARGUMENTS, generator=torch.Generator().manual_seed(0))
    return medians(times)


def measure_engine(pipe: DiffusionPipeline, requests: int) -> dict[str, Between]:
    with Engine(pipe, max_batch=requests) as engine, watched(pipe.unet) as times:
        for job in engine.submit_all([{**ARGUMENTS, "seed": k} for k in range(requests)]):
            job.result()
    return medians(times)


def measure(settings: Settings) -> dict[str, Any]:
    """rows: for each number of requests, medians over rounds; in each the stock pipeline is measured beside it."""
    pipe = open_base(settings.base)
    measure_stock(pipe)  # warm
    rounds = [
        [(measure_stock(pipe), measure_engine(pipe, requests)) for requests in REQUESTS]
        for _ in range(settings.overhead_rounds)
    ]
    rows = []
    for requests, pairs in zip(REQUESTS, zip(*rounds, strict=True), strict=True):
        row: dict[str, Any] = {"requests": requests}
        for clock in CLOCKS:
            own = [engine[clock].gap - requests * stock[clock].gap for stock, engine in pairs]
            whole = [engine[clock].forward + engine[clock].gap for _, engine in pairs]
            row[clock] = {
                "forward": statistics.median(engine[clock].forward for _, engine in pairs),
                "gap": statistics.median(engine[clock].gap for _, engine in pairs),
                "stock_gap": statistics.median(stock[clock].gap for stock, _ in pairs),
                "engine": statistics.median(own),
                "share": statistics.median(part / all_of_it for part, all_of_it in zip(own, whole, strict=True)),
            }
        rows.append(row)
    return {"steps": STEPS, "rows": rows}


def table(report: dict[str, Any]) -> list[str]:
    heads = ("requests", "forward ms", "gap ms", "stock's ms", "engine's ms", "share", "of processor")
    lines = [" ".join(f"{head:>12}" for head in heads)]
    for row in report["rows"]:
        wall = row["wall"]
        milliseconds = (1e3 * wall[name] for name in ("forward", "gap", "stock_gap", "engine"))
        lines.append(
            f"{row['requests']:>12} "
            + " ".join(f"{each:>12.2f}" for each in milliseconds)
            + f" {wall['share']:>12.1%} {row['processor']['share']:>12.1%}"
        )
    return lines
