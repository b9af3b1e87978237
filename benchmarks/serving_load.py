"""A server under load: many adapters, many clients, clients that leave; is every image the right one, and memory flat?

    python benchmarks/serving_load.py --output_dir out/benchmarks
    python benchmarks/serving_load.py --output_dir out/benchmarks --further 2000

Starts `ether-diffusion serve` with --names adapters, links to --kinds random ones, of which few fit the main memory
that it is given. --clients ask for --requests images, each of another name, while --leaving clients ask for long ones
and leave. Each image is compared with what the stock pipeline makes of the same adapter, and with what it makes of
all the others. Then --further requests follow while the memory of the server is watched. Exit code 1 where an image
was wrong or lost, or rows were not free again. OMP_NUM_THREADS=1 makes it one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch
from diffusers import DiffusionPipeline
from measuring import machine, make_parser
from PIL import Image
from result_file import commit, write_json

from ether_diffusion import EtherConfig
from ether_diffusion.base_models import MINIATURE, open_pipeline

ASKED = {"prompt": "a red cube", "seed": 7, "num_inference_steps": 2}
LONG = {**ASKED, "num_inference_steps": 500}
STARTS_WITHIN = 300
GENERATIONS = "/v1/images/generations"
ONE_GREY_LEVEL = 1


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--base", default=MINIATURE)
    parser.add_argument("--names", type=int, default=1000)
    parser.add_argument("--kinds", type=int, default=16)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--leaving", type=int, default=30)
    parser.add_argument("--further", type=int, default=200)
    parser.add_argument("--host_memory", type=int, default=8, help="MiB for adapters; few of them fit.")
    parser.add_argument("--max_batch", type=int, default=16)
    return parser.parse_args()


def open_base(base: str) -> DiffusionPipeline:
    pipe = open_pipeline(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_adapters(base: str, folder: Path, kinds: int, names: int) -> list[np.ndarray]:
    """Random adapters of both methods under many names; what the stock pipeline generates with each."""
    images = []
    for kind in range(kinds):
        pipe = open_base(base)
        torch.manual_seed(kind)
        method = ("ether", "ether_plus")[kind % 2]
        pipe.unet.add_adapter(EtherConfig(method=method, init_weights=False), adapter_name="default")
        pipe.save_ether_weights(folder.parent / f"kind-{kind}")
        arguments = {name: value for name, value in ASKED.items() if name != "seed"}
        image = pipe(**arguments, generator=torch.Generator().manual_seed(ASKED["seed"])).images[0]
        images.append(np.asarray(image, dtype=int))
    for number in range(names):
        (file,) = (folder.parent / f"kind-{number % kinds}").glob("*.safetensors")
        os.link(file, folder / f"adapter-{number}.safetensors")
    return images


@contextmanager
def server(args: argparse.Namespace, adapters: Path, log: Path) -> Iterator[str]:
    """The address of a server that runs meanwhile; it must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {
        "base": args.base,
        "adapters": adapters,
        "port": port,
        "max_batch": args.max_batch,
        "max_line": args.clients + args.leaving,
        "host_memory": args.host_memory,
        "dtype": "float32",
        "timeout": 600,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ether_diffusion.commands.main", "serve", *words],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
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


class Load:
    """Clients of one server, and what became of their requests.

    images: what each kind of adapter has to look like.
    """

    def __init__(self, client: httpx.AsyncClient, images: list[np.ndarray], names: int) -> None:
        self._client, self._images, self._names = client, images, names
        self.seconds: list[float] = []
        self.distances: list[int] = []
        self.wrong = self.lost = 0
        self._random = random.Random(0)

    async def ask_many(self, clients: int, requests: int) -> None:
        """So many clients, each of which asks again when it has its answer."""
        numbers = iter(self._random.choices(range(self._names), k=requests))

        async def client() -> None:
            for number in numbers:
                await self._ask(number)

        await asyncio.gather(*(client() for _ in range(clients)))

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

    async def leave(self, after: float, number: int) -> None:
        """Ask for an image that takes long, and leave without it."""
        try:
            await self._client.post(GENERATIONS, json={**LONG, "adapter": f"adapter-{number}"}, timeout=after)
        except httpx.TimeoutException:
            return
        raise AssertionError("it was answered")

    async def metrics(self) -> dict[str, float]:
        """What the server tells, without its histograms' buckets."""
        lines = (await self._client.get("/metrics")).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line)
        return {name.removeprefix("ether_diffusion_"): float(value) for name, value in pairs}

    async def seconds_until_free(self) -> float:
        """Until nothing runs or waits any more."""
        began = time.monotonic()
        while True:
            now = await self.metrics()
            if now["running_requests"] == now["waiting_requests"] == 0:
                return time.monotonic() - began
            await asyncio.sleep(0.02)


async def put_under_load(args: argparse.Namespace, url: str, images: list[np.ndarray]) -> dict:
    """The load, and a report of it."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        load = Load(client, images, args.names)
        began = time.monotonic()
        leaving = [
            load.leave(1 + 0.1 * number, number % args.names) for number in range(args.leaving)
        ]  # while the others ask
        await asyncio.gather(load.ask_many(args.clients, args.requests), *leaving)
        whole = time.monotonic() - began
        freed = await load.seconds_until_free()
        loaded = await load.metrics()
        memory = [loaded["process_resident_memory_bytes"]]
        for part in range(4):
            await load.ask_many(args.clients, args.further * (part + 1) // 4 - args.further * part // 4)
            memory.append((await load.metrics())["process_resident_memory_bytes"])
        order = sorted(load.seconds)
        return {
            "answered": len(load.distances),
            "lost": load.lost,
            "wrong": load.wrong,
            "largest_distance": max(load.distances),
            "images_per_second": args.requests / whole,
            "median_seconds": statistics.median(order),
            "slowest_seconds": order[-1],
            "left": loaded["cancellations_total"],
            "seconds_until_rows_were_free": freed,
            "rows_per_forward": loaded["forward_rows_total"] / loaded["forwards_total"],
            "adapter_loads": loaded["adapter_loads_total"],
            "adapter_host_bytes": loaded["adapter_host_bytes"],
            "resident_mib": [round(each / 2**20, 1) for each in memory],
        }


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        adapters = Path(name) / "adapters"
        adapters.mkdir()
        images = make_adapters(args.base, adapters, args.kinds, args.names)
        with server(args, adapters, args.output_dir / "serving_load.log") as url:
            report = asyncio.run(put_under_load(args, url, images))
    for key, value in report.items():
        print(f"{key:30} {value:.3f}" if isinstance(value, float) else f"{key:30} {value}")
    asked = {name: value for name, value in vars(args).items() if name != "output_dir"}
    asked["base"] = Path(str(args.base)).name
    write_json(
        args.output_dir / "serving_load.json",
        {"machine": machine(), "commit": commit(), "settings": asked, **report},
    )
    is_right = report["lost"] == report["wrong"] == 0 and report["left"] == args.leaving
    if not is_right or report["answered"] != args.requests + args.further:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
