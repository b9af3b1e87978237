"""How many adapters are in main memory, and what that costs: a step beside them, admitting one, bytes of each."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from measuring import paired, spread

from ether_diffusion.serving.resident import ResidentAdapters
from serving_parts.adapters import link_names, open_base, write_adapters
from serving_parts.settings import Settings
from serving_parts.steps import BATCH, forward, inputs_of

FILES = 16
"""Different ones; names beyond that are links, and are held like any other."""
PLENTY = 2**40


def step_beside(settings: Settings, adapters: ResidentAdapters, names: list[str], pipe: Any) -> Callable[[], object]:
    """A step of eight rows that hold adapters anew, drawn from all that are in main memory."""
    for name in names:
        adapters.get(name)
    drawn, inputs = random.Random(settings.seed), inputs_of(pipe.unet, BATCH, settings.seed)

    def step() -> None:
        rows = [adapters.take_row([(adapters.get(drawn.choice(names)), 1.0)]) for _ in range(BATCH)]
        with adapters.rows("unet", rows):
            forward(pipe.unet, inputs)
        for row in rows:
            adapters.free_row(row)

    return step


def admission(settings: Settings, folder: Path, names: list[str]) -> dict[str, float]:
    """Seconds from a name to its adapter in main memory, with the file in the system's cache; and to its row.

    Returns the medians, their quartiles, and the bytes of an adapter.
    """
    pipe = open_base(settings.base)
    with closing(ResidentAdapters(pipe, folder, max_rows=1, host_bytes=PLENTY)) as adapters:
        adapters.free_row(adapters.take_row([(adapters.get(names[0]), 1.0)]))  # warm
        reading, placing = [], []
        for name in names[1:]:
            began = time.perf_counter()
            adapter = adapters.get(name)
            read = time.perf_counter()
            adapters.free_row(adapters.take_row([(adapter, 1.0)]))
            reading.append(read - began)
            placing.append(time.perf_counter() - read)
        quartiles = spread(reading)
        return {
            "seconds": quartiles["ratio"],
            "seconds_low": quartiles["ratio_low"],
            "seconds_high": quartiles["ratio_high"],
            "row_seconds": statistics.median(placing),
            "host_bytes": adapters.store.nbytes // len(names),
        }


def measure(settings: Settings) -> dict[str, Any]:
    """steps: residents -> a step beside them, against that beside the fewest; admission: by method."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        files = {
            method: write_adapters(settings.base, method, Path(name) / f"made {method}", FILES, settings.seed)
            for method in ("ETHER", "ETHER+")
        }
        admitted = {}
        for method, own in files.items():
            folder = Path(name) / method
            admitted[method] = admission(settings, folder, link_names(own, folder, settings.admissions + 1))
        folder = Path(name) / "all"
        names = link_names(files["ETHER"], folder, max(settings.residents))
        steps = {}
        for count in (
            settings.residents[0],
            *settings.residents,
        ):  # the first twice, to be the reference, and beside it
            pipe = open_base(settings.base)
            adapters = ResidentAdapters(pipe, folder, max_rows=BATCH, host_bytes=PLENTY)
            stack.enter_context(closing(adapters))
            steps.setdefault(f"{count}", []).append(step_beside(settings, adapters, names[:count], pipe))
        reference = steps[f"{settings.residents[0]}"].pop(0)
        rows = paired(reference, {count: own[0] for count, own in steps.items()}, settings.resident_rounds, "cpu")
    return {"steps": rows, "admission": admitted}


def table(report: dict[str, Any]) -> list[str]:
    lines = [f"{'adapters in main memory':<28} {'ms':>8} {'ratio':>6}  quartiles; 8 rows assigned, and a step"]
    for count, row in report["steps"].items():
        quartiles = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        lines.append(f"{int(count):<28,} {1e3 * row['seconds']:>8.1f} {row['ratio']:>6.3f}  {quartiles}")
    for method, row in report["admission"].items():
        quartiles = f"{1e3 * row['seconds_low']:.1f} to {1e3 * row['seconds_high']:.1f}"
        lines.append(
            f"{method}: from the disk in {1e3 * row['seconds']:.1f} ms ({quartiles}), into a row in "
            f"{1e3 * row['row_seconds']:.1f} ms, {row['host_bytes']:,} bytes"
        )
    return lines
