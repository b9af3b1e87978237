"""The fronts of fronts.json: what each method learns of a subject, over what it may damage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from lr_robustness import STUDIED
from matplotlib.figure import Figure
from plot_trials import colour, tidy
from trials import Variant


def draw(results_dir: Path) -> Iterator[tuple[str, Figure]]:
    path = results_dir / "fronts.json"
    if not path.is_file():
        return
    found = json.loads(path.read_text())
    shown = {Variant.of(method).name for method in STUDIED}
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in found["rows"]:
        if row["variant"] in shown:
            label = f"{row['variant']} (area {row['area']:.3f})"
            budgets = [100 * budget for budget in found["budgets"]]
            axes.plot(budgets, row["front"], marker="o", ms=3, color=colour(row["variant"]), label=label)
    tidy(axes, f"learned of the subject at a budget of damage, {found['model']}", scale="linear")
    axes.set_xlabel("budget: CLIP-T of other prompts that may be lost, %")
    axes.set_ylabel("CLIP-I above the base model")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    yield "fronts", figure
