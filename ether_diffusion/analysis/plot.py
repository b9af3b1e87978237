"""Images of an analysis. Needs matplotlib (the extra `eval`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#c0392b", "#2c3e50")
MOST_NAMES = 48
"""Of layers on the axis; of more, every second, third, … is named."""


def draw_layers(layers: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw what an adapter does to each layer: weight distance, angle and change of energy, a panel each.

    Args:
        layers: the rows that `ether-diffusion analyze` writes. Without an angle in any, that panel is left out.
        path: of the image.
        title: above it, as plain text.
    """
    sides = [side for side in ("input", "output") if any(_angle(row, side) is not None for row in layers)]
    panels = [("‖W' − W‖ / ‖W‖", {"": [row["relative_distance"] for row in layers]})]
    if sides:
        panels.append(("angle in degrees", {side: [_angle(row, side) for row in layers] for side in sides}))
    energies = {"full": "energy_change", "half space": "half_space_energy_change"}
    panels.append(
        ("change of energy, %", {name: [100 * row[key] for row in layers] for name, key in energies.items()})
    )
    figure = Figure(figsize=(max(6.0, 2 + 0.16 * min(len(layers), 4 * MOST_NAMES)), 8.5), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), fontsize=9)
    for axes, (name, series) in zip(figure.subplots(len(panels), 1, sharex=True), panels, strict=True):
        _draw_series(axes, name, series)
    step = -(-len(layers) // MOST_NAMES)
    places = range(0, len(layers), step)
    axes.set_xticks(places, [layers[k]["path"].replace("$", r"\$") for k in places], rotation=90, fontsize=5)
    figure.savefig(path, dpi=120)


def _angle(row: Mapping[str, Any], side: str) -> float | None:
    angle = row["sides"].get(side, {}).get("angle")
    return None if angle is None else angle["mean"]


def _draw_series(axes: Axes, name: str, series: Mapping[str, Sequence[float | None]]) -> None:
    width = 0.8 / len(series)
    for k, (label, values) in enumerate(series.items()):
        shift = (k - (len(series) - 1) / 2) * width
        places = [place + shift for place, value in enumerate(values) if value is not None]
        axes.bar(places, [value for value in values if value is not None], width, color=COLOURS[k], label=label)
    axes.set_ylabel(name, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(fontsize=7, frameon=False)
