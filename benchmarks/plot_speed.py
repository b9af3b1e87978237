"""Images of what the speed benchmarks wrote: the median ratio of every row with its quartiles, and memory."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS = "#c0392b", "#7f8c8d"


def bars(
    axes: Axes, title: str, rows: dict[str, tuple[float, float, float]], *, ours: Container[str] | None = None
) -> None:
    """Horizontal bars from 1, with the quartiles as whiskers.

    rows: name to (low, median, high). ours: the names with a colour of their own; default: those of ETHER.
    """
    names = list(rows)[::-1]
    for k, name in enumerate(names):
        low, middle, high = rows[name]
        is_ours = name.startswith("ETHER") if ours is None else name in ours
        colour = OURS if is_ours else OTHERS
        axes.barh(k, middle - 1, left=1, color=colour, xerr=[[middle - low], [high - middle]], error_kw={"lw": 1})
        axes.annotate(f" {middle:.2f}", (max(high, 1), k), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    largest = max(high for _, _, high in rows.values())
    smallest = min(low for low, _, _ in rows.values())
    axes.set_xlim(min(0.97, smallest * 0.99), max(1.1, largest * 1.25))
    shown = (0.2, 0.3, 0.5, 0.7, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10)
    ticks = [t for t in shown if t == 1 or smallest * 0.99 <= t < max(1.1, largest * 1.25)]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def spread(row: dict) -> tuple[float, float, float]:
    return row["ratio_low"], row["ratio"], row["ratio_high"]


def panels(results_dir: Path, workload: str) -> list[tuple[str, dict]]:
    found = []
    path = results_dir / f"training_step_{workload}.json"
    if path.is_file():
        rows = json.loads(path.read_text())["rows"]
        limit = rows["frozen limit"]["memory"]
        found.append(("training step / frozen limit", {name: spread(row) for name, row in rows.items()}))
        found.append(("memory / frozen limit", {name: (row["memory"] / limit,) * 3 for name, row in rows.items()}))
    path = results_dir / f"inference_{workload}.json"
    if path.is_file():
        rows = json.loads(path.read_text())["step"]
        found.append(("denoising step / no adapter", {name: spread(row) for name, row in rows.items()}))
    return found


def draw(results_dir: Path) -> Iterator[tuple[str, Figure]]:
    """An image for each workload of training_step_*.json and inference_*.json, and its name."""
    files = [path.stem for kind in ("training_step", "inference") for path in results_dir.glob(f"{kind}_*.json")]
    for workload in sorted({stem.removeprefix("training_step_").removeprefix("inference_") for stem in files}):
        drawn = panels(results_dir, workload)
        figure = Figure(figsize=(4.2 * len(drawn), 3.4), layout="constrained")
        for axes, (title, rows) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            bars(axes, f"{workload}: {title}", rows)
        yield f"speed_{workload}", figure
