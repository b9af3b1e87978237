"""How much of the subject does a method learn at equal damage to what the model could before?

    python benchmarks/fronts.py --output_dir out/fronts
    python benchmarks/fronts.py --output_dir out/fronts --results_dir out/studies

Reads the rows of trials.json; trains nothing. A point is one setting of a method, a learning rate and a number of
steps. Its damage is the share of the base model's CLIP-T that images of prompts without the subject lose; what it
learns is CLIP-I of the subject's images above the base model's. The front of a method says for every budget of damage
up to 10 % how much the best setting within it learns.

Many settings and few pairs would flatter a method, if the same pairs chose the setting and were its score. So each
pair of a subject and a seed is scored at the setting that the other pairs choose. The area is the mean of the front
over the budgets of 1 % to 10 %, in CLIP-I; where no setting is within the budget nobody finetunes, and nothing is
learned. Its interval (95 %) is of the mean over pairs, drawn anew with replacement; the difference to another method
is paired. Writes fronts.json and prints a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import make_parser
from result_file import write_json
from trials import BASE

BUDGETS = np.arange(1, 11) / 100
REFERENCE = "LoRA r=4"
DRAWS = 10_000


class Points(NamedTuple):
    """What the settings of one variant do to each pair.

    settings: (learning rate, steps) of each.
    learned: CLIP-I above the base model's, (settings, pairs).
    damage: share of the base model's CLIP-T that is lost, likewise; 1 where a training failed.
    """

    settings: list[tuple[float, int]]
    learned: np.ndarray
    damage: np.ndarray


def points_of(rows: Sequence[Mapping[str, Any]], steps: int | None = None) -> dict[str, Points]:
    """The points of every variant, of the settings that all pairs were tried at.

    rows: of trials.json, the base model's among them.
    steps: of the settings; default: any.
    """
    base = {(row["subject"], row["seed"]): row for row in rows if row["variant"] == BASE}
    found: dict[str, dict[tuple[float, int], dict]] = {}
    for row in rows:
        if row["variant"] != BASE and steps in (None, row["steps"]):
            setting = (row["learning_rate"], row["steps"])
            found.setdefault(row["variant"], {}).setdefault(setting, {})[row["subject"], row["seed"]] = row
    points = {}
    for variant, by_setting in found.items():
        settings = sorted(setting for setting, own in by_setting.items() if own.keys() == base.keys())
        if not settings:
            continue
        learned, damage = (np.empty((len(settings), len(base))) for _ in range(2))
        for k, setting in enumerate(settings):
            for p, (pair, before) in enumerate(base.items()):
                row = by_setting[setting][pair]
                learned[k, p] = (row["clip_i"] or 0.0) - before["clip_i"]
                damage[k, p] = 1 - (row["clip_t"] or 0.0) / before["clip_t"]
        points[variant] = Points(settings, learned, damage)
    return points


def choose(points: Points, pairs: Sequence[int], budget: float) -> int | None:
    """The setting that learns most of these pairs while its mean damage to them is within the budget, if any is."""
    learned, damage = points.learned[:, pairs].mean(1), points.damage[:, pairs].mean(1)
    allowed = np.flatnonzero(damage <= budget)
    return int(allowed[learned[allowed].argmax()]) if len(allowed) else None


def front(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """What each pair learns and loses at the setting that the others choose, (budgets, pairs) both."""
    count = points.learned.shape[1]
    if count < 2:
        raise ValueError(f"{count} pair: choosing on the other pairs needs two")
    learned, damage = (np.zeros((len(BUDGETS), count)) for _ in range(2))
    for p in range(count):
        others = [q for q in range(count) if q != p]
        for k, budget in enumerate(BUDGETS):
            chosen = choose(points, others, budget)
            if chosen is not None:
                learned[k, p], damage[k, p] = points.learned[chosen, p], points.damage[chosen, p]
    return learned, damage


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of values: percentiles over DRAWS ways to draw as many with replacement."""
    numbers = np.random.default_rng(0)
    drawn = values[numbers.integers(len(values), size=(DRAWS, len(values)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def summary(points: Mapping[str, Points], reference: str = REFERENCE) -> list[dict[str, Any]]:
    """A row for each variant, the largest area first; `reference` is whom the paired differences are taken to."""
    areas, rows = {}, []
    for variant, own in points.items():
        learned, damage = front(own)
        areas[variant] = learned.mean(0)
        best = choose(own, range(own.learned.shape[1]), BUDGETS[-1])
        rows.append(
            {
                "variant": variant,
                "settings": len(own.settings),
                "area": float(areas[variant].mean()),
                "area_interval": interval(areas[variant]),
                "front": learned.mean(1).tolist(),
                "damage": damage.mean(1).tolist(),
                "chosen": None if best is None else own.settings[best],
            }
        )
    for row in rows:
        difference = areas[row["variant"]] - areas[reference] if reference in areas else None
        row["difference"] = None if difference is None else float(difference.mean())
        row["difference_interval"] = None if difference is None else interval(difference)
    return sorted(rows, key=lambda row: -row["area"])


def table(rows: Sequence[Mapping[str, Any]], reference: str = REFERENCE) -> str:
    lines = [
        "| variant | settings | area, 95 % | learned at 2 % | at 5 % | at 10 % | its damage there "
        f"| minus {reference} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["area_interval"]
        at = dict(zip((BUDGETS * 100).round().astype(int).tolist(), row["front"], strict=True))
        against = ""
        if row["difference"] is not None and row["variant"] != reference:
            bounds = ", ".join(f"{end:+.3f}" for end in row["difference_interval"])
            against = f"{row['difference']:+.3f} [{bounds}]"
        lines.append(
            f"| {row['variant']} | {row['settings']} | {row['area']:.3f} [{low:.3f}, {high:.3f}] | {at[2]:.3f} "
            f"| {at[5]:.3f} | {at[10]:.3f} | {100 * row['damage'][-1]:.1f} % | {against} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--results_dir", type=Path, default=Path("benchmarks/results"), help="where trials.json lies")
    parser.add_argument("--steps", type=int, help="of the trainings; default: any")
    parser.add_argument("--reference", default=REFERENCE, help="the variant that the others are compared to")
    args = parser.parse_args()
    path = args.results_dir / "trials.json"
    if not path.is_file():
        parser.error(f"{path} is not there: run benchmarks/lr_robustness.py first")
    found = json.loads(path.read_text())
    points = points_of(found.pop("rows"), args.steps)
    if args.reference not in points:
        parser.error(f"--reference {args.reference}: there are {', '.join(points) or 'no complete settings'}")
    rows = summary(points, args.reference)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = found | {"steps": args.steps, "reference": args.reference, "budgets": BUDGETS.tolist()}
    write_json(args.output_dir / "fronts.json", settings | {"rows": rows})
    print(table(rows, args.reference))


if __name__ == "__main__":
    main()
