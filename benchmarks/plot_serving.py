"""What serving costs as an image: mixed batches, adapters in memory, the engine's own time, a server under load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_speed import OTHERS, OURS, bars, spread

WIDTH, HEIGHT = 4.6, 3.6
MIXED = ("8 ETHER, rows", "8 ETHER+, rows", "engine, 8 ETHER", "engine, 8 ETHER+")
"""The rows that are this package's serving."""


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def steps(axes: Axes, report: dict[str, Any]) -> None:
    ratios(axes, "a step of 8 rows / no adapter", report["rows"])


def images(axes: Axes, report: dict[str, Any]) -> None:
    ratios(axes, "8 images / stock pipeline, one by one", report["rows"])


def ratios(axes: Axes, title: str, rows: dict[str, dict]) -> None:
    bars(axes, title, {name: spread(row) for name, row in rows.items()}, ours=MIXED)


def residency(axes: Axes, report: dict[str, Any]) -> None:
    rows = {int(count): spread(row) for count, row in report["steps"].items()}
    middles = [middle for _, middle, _ in rows.values()]
    whiskers = [
        [middle - low for low, middle, _ in rows.values()],
        [high - middle for _, middle, high in rows.values()],
    ]
    axes.errorbar([*rows], middles, yerr=whiskers, marker="o", ms=4, color=OURS, capsize=3, lw=1)
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.set_xticks([*rows], [f"{count:,}" for count in rows])
    axes.set_xticks([], minor=True)
    axes.set_ylim(min(0.8, *middles), max(1.2, *middles))
    tidy(axes, "8 rows assigned, and a step", "adapters in main memory", f"/ with {min(rows)}")


def overhead(axes: Axes, report: dict[str, Any]) -> None:
    for clock, colour in (("wall", OURS), ("processor", OTHERS)):
        shares = {row["requests"]: 100 * row[clock]["share"] for row in report["rows"]}
        axes.plot([*shares], [*shares.values()], marker="o", ms=4, color=colour, label=f"{clock} time")
    axes.axhline(0, color="black", lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([*shares], [*map(str, shares)])
    axes.legend(fontsize=7)
    tidy(axes, "the engine's own part of a step", "requests that run together", "%")


def load(axes: Axes, report: dict[str, Any]) -> None:
    loads = [100 * row["load"] for row in report["rows"]]
    for name, colour in (("p95", OTHERS), ("mean", OURS)):
        for kind, line, marker in (("measured", "-", "o"), ("simulated", "--", "x")):
            seconds = [row[kind][name] for row in report["rows"]]
            axes.plot(loads, seconds, ls=line, marker=marker, ms=4, color=colour, label=f"{name}, {kind}")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    tidy(axes, "a request to the server", "load, % of what full batches make", "seconds")


PANELS: dict[str, Callable[[Axes, dict[str, Any]], None]] = {
    "steps": steps,
    "images": images,
    "residency": residency,
    "overhead": overhead,
    "load": load,
}


def draw(results_dir: Path) -> Iterator[tuple[str, Figure]]:
    """One image of all parts that there are."""
    files = {part: results_dir / f"serving_{part}.json" for part in PANELS}
    found = {part: json.loads(path.read_text()) for part, path in files.items() if path.is_file()}
    if not found:
        return
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (part, report) in zip(panels, found.items(), strict=False):
        PANELS[part](axes, report)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    yield "serving", figure
