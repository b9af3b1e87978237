"""Images of trials: metrics over the learning rate, quality over parameters, outcomes over the change of energy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from energy import CHANGES, outcomes
from lr_robustness import ENOUGH, RATES, STUDIED, best_rate, means, window
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox
from parameter_efficiency import variants
from trials import BASE, Variant

COLOURS = {
    "ETHER": "#c0392b",
    "ETHER+": "#e67e22",
    "LoRA": "#2980b9",
    "OFT": "#27ae60",
    "HRA": "#8e44ad",
    "VeRA": "#16a085",
    "full": "#7f8c8d",
}
Rows = Sequence[Mapping[str, Any]]


def draw(results_dir: Path) -> Iterator[tuple[str, Figure]]:
    path = results_dir / "trials.json"
    if not path.is_file():
        return
    found = json.loads(path.read_text())
    model = found["model"]
    base = [row for row in found["rows"] if row["variant"] == BASE]
    tuned = [row for row in found["rows"] if row["variant"] != BASE]
    rows = [row for row in tuned if row["steps"] == found["max_train_steps"]]
    yield "lr_robustness", learning_rates(rows, base, model)
    for steps in sorted({row["steps"] for row in tuned} - {found["max_train_steps"]}):
        longer = [row for row in tuned if row["steps"] == steps]
        yield f"lr_robustness_{steps}", learning_rates(longer, base, f"{model}, {steps} steps")
    if {row["variant"] for row in rows} - {Variant.of(method).name for method in STUDIED}:
        yield "parameter_efficiency", parameters(rows, base, model)
    yield "energy", energies(found["rows"])


def colour(variant: str) -> str:
    return COLOURS[variant.replace(",", " ").split()[0]]


def learning_rates(rows: Rows, base: Rows, title: str) -> Figure:
    """CLIP-I, CLIP-T and drift over the learning rate, with the usable windows as bars below the first."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    names = ("clip_i", "clip_t", "drift")
    headings = ("similarity to the subject (CLIP-I)", "similarity of other prompts (CLIP-T)", "drift of other prompts")
    for axes, name, heading in zip(panels, names, headings, strict=True):
        for k, method in enumerate(STUDIED):
            variant = Variant.of(method).name
            own = [row for row in rows if row["variant"] == variant]
            rates = sorted({row["learning_rate"] for row in own})
            if not rates:
                continue
            at = [[row for row in own if row["learning_rate"] == rate] for rate in rates]
            lost = 1.0 if name == "drift" else 0.0  # of a training that failed
            values = [mean(lost if row[name] is None else row[name] for row in each) for each in at]
            axes.plot(rates, values, marker="o", ms=3, color=colour(variant), label=variant)
            figures = {rate: means(each) for rate, each in zip(rates, at, strict=True) if len(each) == len(base)}
            found = window(figures, means(base)[1], RATES)
            if name == "clip_i" and found.low is not None:
                axes.plot([found.low, found.high], [-0.04 * (k + 1)] * 2, lw=4, color=colour(variant))
        if name == "drift":
            axes.set_ylim(0, 1.02)
        else:
            axes.axhline(means(base)[names.index(name)], color="black", lw=0.8, ls=":")
        if name == "clip_t":
            axes.axhline(ENOUGH * means(base)[1], color="black", lw=0.8, ls="--")
        tidy(axes, heading)
        axes.set_xlabel("learning rate")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{title}; dotted: base model, dashed: its 90 %, bars: usable windows", fontsize=9)
    return figure


def parameters(rows: Rows, base: Rows, model: str) -> Figure:
    """The best CLIP-I of each variant, at a rate that keeps other prompts, over its parameters."""
    base_clip_t = means(base)[1]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, points = figure.subplots(), {}
    for variant in (each for own in variants().values() for each in own):
        by_rate: dict[float, list] = {}
        for row in rows:
            if row["variant"] == variant.name:
                by_rate.setdefault(row["learning_rate"], []).append(row)
        figures = {rate: means(own) for rate, own in by_rate.items() if len(own) == len(base)}
        best = best_rate(figures, base_clip_t)
        if best is None:
            continue
        points[variant.name] = variant.parameters(model), figures[best][0]
        axes.scatter(*points[variant.name], color=colour(variant.name), s=22)
    tidy(axes, f"best similarity to the subject (CLIP-I), {model}")
    axes.set_xlabel("parameters")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if points:
        name_points(axes, points)
    return figure


def name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside their points, each at the first place where it covers no point and no other name."""
    axes.figure.draw_without_rendering()  # what covers what is known once the axes have their place
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(list(points.values()))]
    for name, point in points.items():
        for right, up in ((6, -2.5), (-6, -2.5), (5, 4), (5, -9), (-5, 4), (-5, -9)):
            text = axes.annotate(
                name,
                point,
                fontsize=7,
                xytext=(right, up),
                textcoords="offset points",
                ha="left" if right > 0 else "right",
            )
            if not any(text.get_window_extent().overlaps(box) for box in taken):
                break
            text.set_visible(False)
        text.set_visible(True)
        taken.append(text.get_window_extent())


def energies(rows: Rows) -> Figure:
    """What each trial won and lost, over the change of energy and over the distance of the weights."""
    found = outcomes(rows)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    for line, (outcome, title) in zip(
        figure.subplots(2, 2), (("won", "CLIP-I won"), ("lost", "CLIP-T of others lost")), strict=True
    ):
        for axes, change in zip(line, ("energy_moved", "relative_distance"), strict=True):
            for name in COLOURS:
                own = [row for row in found if row["variant"].replace(",", " ").split()[0] == name]
                if own:
                    points = [row[change] for row in own], [row[outcome] for row in own]
                    axes.scatter(*points, s=8, color=COLOURS[name], label=name)
            tidy(axes, title)
            axes.set_xlabel(CHANGES[change])
    figure.axes[0].legend(fontsize=7)
    return figure


def tidy(axes: Axes, title: str, *, scale: str = "log") -> None:
    axes.set_xscale(scale)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
