"""How long the serving engine lets the denoiser wait between two forwards, and what of that the pipeline itself takes.

    python benchmarks/engine_overhead.py --output_dir out/benchmarks

For every number of requests that run together: the median time of a forward, the median time from its end to the next
one's start, and what of that time is the engine's own: the rest is the schedulers' and guidance's work, which the
stock pipeline does as well, once for each request. Runs the miniature; OMP_NUM_THREADS=1 makes it one thread.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from measuring import machine, make_parser
from result_file import commit, write_json

from ether_diffusion.miniature import load_pipeline
from ether_diffusion.serving import Engine

REQUESTS = (1, 2, 4, 8, 16)
STEPS = 40
ARGUMENTS = {"prompt": "a red cube", "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[list[tuple[float, float]]]:
    """When each forward of a model began and ended."""
    times: list[tuple[float, float]] = []
    began = [0.0]

    def before(*_) -> None:
        began[0] = time.perf_counter()

    def after(*_) -> None:
        times.append((began[0], time.perf_counter()))

    hooks = model.register_forward_pre_hook(before), model.register_forward_hook(after)
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def medians(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds of a forward, and from one to the next."""
    forward = statistics.median(end - begin for begin, end in times)
    gap = statistics.median(begin - end for (_, end), (begin, _) in itertools.pairwise(times))
    return forward, gap


def measure_stock(pipe: DiffusionPipeline) -> tuple[float, float]:
    pipe(**ARGUMENTS)  # warm
    with watched(pipe.unet) as times:
        pipe(**ARGUMENTS, generator=torch.Generator().manual_seed(0))
    return medians(times)


def measure_engine(pipe: DiffusionPipeline, requests: int) -> tuple[float, float]:
    with Engine(pipe, max_batch=requests) as engine, watched(pipe.unet) as times:
        for job in [engine.submit(**ARGUMENTS, seed=k) for k in range(requests)]:
            job.result()
    # The first and last forwards may have fewer requests: those in the middle are together.
    return medians(times[STEPS // 4 : -STEPS // 4])


def main() -> None:
    args = make_parser(__doc__).parse_args()
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    stock_forward, stock_gap = measure_stock(pipe)
    print(f"stock pipeline: forward {1e3 * stock_forward:.2f} ms, then {1e3 * stock_gap:.2f} ms to the next")
    print(f"{'requests':>8} {'forward ms':>10} {'gap ms':>8} {'engine ms':>9} {'for each':>8} {'share':>6}")
    rows = []
    for requests in REQUESTS:
        forward, gap = measure_engine(pipe, requests)
        own = gap - requests * stock_gap
        share = own / (forward + gap)
        rows.append({"requests": requests, "forward": forward, "gap": gap, "engine": own, "share": share})
        print(
            f"{requests:>8} {1e3 * forward:>10.2f} {1e3 * gap:>8.2f} {1e3 * own:>9.2f} {1e3 * own / requests:>8.3f} "
            f"{share:>6.1%}"
        )
    described = {"machine": machine(), "commit": commit(), "steps": STEPS}
    stock = {"forward": stock_forward, "gap": stock_gap}
    write_json(args.output_dir / "engine_overhead.json", {**described, "stock": stock, "rows": rows})


if __name__ == "__main__":
    main()
