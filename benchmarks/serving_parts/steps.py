"""A denoising step of eight rows: what an adapter for each costs, against none, one for all, and one call each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import paired

from ether_diffusion.serving.rows import AdapterRows
from ether_diffusion.tuner.mixed_batch import adapters_by_row
from serving_parts.adapters import open_base, with_adapters, write_adapters
from serving_parts.settings import Settings

BATCH = 8
NAMES = [f"adapter_{k}" for k in range(BATCH)]
MIXED, ONE_LORA = "8 ETHER, rows", "one LoRA r=4"
Step = Callable[[], object]


def inputs_of(unet: torch.nn.Module, rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, unet.config.in_channels, size, size, generator=generator)
    return latents, torch.full((rows,), 500), torch.randn(rows, 16, width, generator=generator)


@torch.no_grad()
def forward(unet: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return unet(*inputs, return_dict=False)[0]


def no_adapter(settings: Settings) -> Step:
    unet = open_base(settings.base).unet
    return partial(forward, unet, inputs_of(unet, BATCH, settings.seed))


def one_for_all(settings: Settings, method: str) -> Step:
    unet = with_adapters(settings.base, method, NAMES[:1], settings.seed).unet
    return partial(forward, unet, inputs_of(unet, BATCH, settings.seed))


def in_rows(settings: Settings, method: str, folder: Path) -> Step:
    """Eight adapters of a method, one in each row, as the engine has them."""
    files = write_adapters(settings.base, method, folder / method, BATCH, settings.seed)
    pipe = open_base(settings.base)
    table = AdapterRows(pipe, max_rows=BATCH)
    for row, file in enumerate(files, start=1):
        table.assign(row, [(table.read(file), 1.0)])
    inputs = inputs_of(pipe.unet, BATCH, settings.seed)

    def step() -> None:
        with table.rows("unet", range(1, BATCH + 1)):
            forward(pipe.unet, inputs)

    return step


def by_peft(settings: Settings, method: str) -> Step:
    """Eight adapters of a method, mixed by `adapter_names`."""
    unet = with_adapters(settings.base, method, NAMES, settings.seed).unet
    inputs = inputs_of(unet, BATCH, settings.seed)

    def step() -> None:
        with adapters_by_row(unet, NAMES):
            forward(unet, inputs)

    return step


def one_by_one(settings: Settings, method: str) -> Step:
    """Eight calls of one row, with the adapter set before each."""
    unet = with_adapters(settings.base, method, NAMES, settings.seed).unet
    inputs = inputs_of(unet, BATCH, settings.seed)
    parts = [tuple(tensor[k : k + 1] for tensor in inputs) for k in range(BATCH)]

    def step() -> None:
        for name, part in zip(NAMES, parts, strict=True):
            unet.set_adapter(name)
            forward(unet, part)

    return step


def measure(settings: Settings) -> dict[str, Any]:
    """rows: name -> a step against one without an adapter; direct: the mixed batch against one LoRA for all."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            "none, again": no_adapter(settings),
            "one ETHER": one_for_all(settings, "ETHER"),
            MIXED: in_rows(settings, "ETHER", Path(folder)),
            "8 ETHER+, rows": in_rows(settings, "ETHER+", Path(folder)),
            "8 ETHER, adapter_names": by_peft(settings, "ETHER"),
            ONE_LORA: one_for_all(settings, "LoRA r=4"),
            "8 LoRA r=4, adapter_names": by_peft(settings, "LoRA r=4"),
            "8 calls, switching ETHER": one_by_one(settings, "ETHER"),
            "8 calls, switching LoRA r=4": one_by_one(settings, "LoRA r=4"),
        }
        rows = paired(no_adapter(settings), steps, settings.rounds, "cpu")
        direct = paired(steps[ONE_LORA], {MIXED: steps[MIXED]}, settings.rounds, "cpu")
    return {"rows": rows, "direct": direct}


def table(report: dict[str, Any]) -> list[str]:
    lines = [f"{'a step of 8 rows':<28} {'ms':>8} {'ratio':>6}  quartiles"]
    lines += [ratio_line(name, row) for name, row in report["rows"].items()]
    return [*lines, ratio_line(f"{MIXED} / {ONE_LORA}", report["direct"][MIXED])]


def ratio_line(name: str, row: dict[str, float]) -> str:
    quartiles = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
    return f"{name:<28} {1e3 * row['seconds']:>8.1f} {row['ratio']:>6.3f}  {quartiles}"
