"""Eight whole images with an adapter each: joined by the engine, and one after the other as pipelines make them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from measuring import paired

from ether_diffusion.serving import Engine
from serving_parts.adapters import link_names, open_base, with_adapters, write_adapters
from serving_parts.settings import Settings
from serving_parts.steps import NAMES, ratio_line

IMAGES = len(NAMES)
PROMPT = "a red cube"
ROWS = 2 * IMAGES
"""Of a batch with all images: with classifier-free guidance, each has two."""
Way = Callable[[], object]


def one_by_one(settings: Settings, method: str | None) -> Way:
    """The stock pipeline, which is called for each image, with its adapter set before."""
    pipe = open_base(settings.base) if method is None else with_adapters(settings.base, method, NAMES, settings.seed)

    def generate() -> None:
        for k, name in enumerate(NAMES):
            if method is not None:
                pipe.unet.set_adapter(name)
            generator = torch.Generator().manual_seed(settings.seed + k)
            pipe(PROMPT, num_inference_steps=settings.image_steps, generator=generator)

    return generate


def at_once(settings: Settings) -> Way:
    """The stock pipeline, called once with all prompts: no adapters, and one seed after the other."""
    pipe = open_base(settings.base)

    def generate() -> None:
        generators = [torch.Generator().manual_seed(settings.seed + k) for k in range(IMAGES)]
        pipe([PROMPT] * IMAGES, num_inference_steps=settings.image_steps, generator=generators)

    return generate


def by_engine(settings: Settings, stack: ExitStack, adapters: Path | None, max_batch: int = ROWS) -> Way:
    """The engine, with an adapter of the folder for each image."""
    engine = stack.enter_context(Engine(open_base(settings.base), adapters, max_batch=max_batch))

    def generate() -> None:
        requests = [
            {
                "prompt": PROMPT,
                "num_inference_steps": settings.image_steps,
                "seed": settings.seed + k,
                "adapter": None if adapters is None else name,
            }
            for k, name in enumerate(NAMES)
        ]
        for job in engine.submit_all(requests):
            job.result()

    return generate


def measure(settings: Settings) -> dict[str, Any]:
    """rows: name -> eight images against those of the stock pipeline, one by one without adapters."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folders = {method: Path(name) / method for method in ("ETHER", "ETHER+")}
        for method, folder in folders.items():
            files = write_adapters(settings.base, method, Path(name) / f"made {method}", IMAGES, settings.seed)
            link_names(files, folder, IMAGES, prefix="adapter_")
        ways = {
            "one by one, no adapter": one_by_one(settings, None),
            "one by one, ETHER": one_by_one(settings, "ETHER"),
            "one by one, LoRA r=4": one_by_one(settings, "LoRA r=4"),
            "one call, no adapter": at_once(settings),
            "engine, no adapter": by_engine(settings, stack, None),
            "engine, 8 ETHER": by_engine(settings, stack, folders["ETHER"]),
            "engine, 8 ETHER+": by_engine(settings, stack, folders["ETHER+"]),
            "engine, 8 ETHER, max_batch 1": by_engine(settings, stack, folders["ETHER"], max_batch=1),
        }
        rows = paired(one_by_one(settings, None), ways, settings.image_rounds, "cpu")
    for row in rows.values():
        row["images_per_second"] = IMAGES / row["seconds"]
    return {"images": IMAGES, "rows": rows}


def table(report: dict[str, Any]) -> list[str]:
    lines = [f"{'8 images':<28} {'ms':>8} {'ratio':>6}  quartiles"]
    return lines + [ratio_line(name, row) for name, row in report["rows"].items()]
