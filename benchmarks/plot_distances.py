"""The study of bounded distance as an image: how far each method moves the weights, and what the images do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bounded_distance import STUDIED, averages
from matplotlib.figure import Figure
from plot_trials import colour, tidy

OTHER = "#2c3e50"  # of noise, which is no method


def draw(results_dir: Path) -> Iterator[tuple[str, Figure]]:
    path = results_dir / "bounded_distance.json"
    if not path.is_file():
        return
    rows = json.loads(path.read_text())["rows"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for perturbation in STUDIED:
        own = [row for row in rows if row["method"] == perturbation.name]
        found = [
            averages([row for row in own if row["strength"] == strength])
            for strength in perturbation.strengths
            if any(row["strength"] == strength for row in own)
        ]
        found = [each for each in found if each["relative_distance"] is not None]
        line = {
            "color": OTHER if perturbation.config(1) is None else colour(perturbation.name),
            "ls": "--" if "one side" in perturbation.name else "-",
            "label": perturbation.name,
            "marker": "o",
            "ms": 3,
        }
        steps = range(1, len(found) + 1)
        left.plot(steps, [each["relative_distance"] for each in found], **line)
        right.plot([each["relative_distance"] for each in found], [each["drift"] for each in found], **line)
    tidy(left, "‖ΔW‖/‖W‖ over the strengths, smallest to largest")
    left.set_xscale("linear")
    left.set_yscale("log")
    left.set_xlabel("strength, in steps of the method's own")
    tidy(right, "drift of images")
    right.set_xlabel("‖ΔW‖/‖W‖")
    right.set_ylim(0, 1.02)
    left.legend(fontsize=7)
    yield "bounded_distance_plot", figure
