"""Does the change of hyperspherical energy predict how well a training went?

    python benchmarks/energy.py --results benchmarks/results/trials.json

Reads the trials of benchmarks/lr_robustness.py and benchmarks/parameter_efficiency.py and trains nothing. Over all
trials with finite figures: Spearman's rank correlation of three changes of the weights (the mean |ΔE|/E of the
hyperspherical energy of the adapted layers, its sign kept, and the relative distance ‖W' − W‖_F/‖W‖_F) with what the
training won (CLIP-I to the subject above the base model's) and what it lost (CLIP-T of other prompts below the base
model's), with the 95 % interval of pairs of subject and seed drawn anew with replacement. A change below ROUNDING,
such as all of ETHER's, counts as none, and what does not vary has no correlation. Prints a table and writes it as
energy.json beside the trials.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from result_file import write_json
from trials import BASE

CHANGES = {"energy_moved": "|ΔE|/E", "energy_change": "ΔE/E", "relative_distance": "‖ΔW‖/‖W‖"}
OUTCOMES = ("won", "lost")
DRAWS = 1000
ROUNDING = 1e-7  # of energies of weights in float32
FEWEST = 8  # trials of a method that say anything


def outcomes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The trials with finite figures, with what each won and lost beside the base model of its pair."""
    base = {(row["subject"], row["seed"]): row for row in rows if row["variant"] == BASE}
    found = []
    for row in rows:
        if row["variant"] == BASE or any(row.get(name) is None for name in (*CHANGES, "clip_i", "clip_t")):
            continue
        before = base[row["subject"], row["seed"]]
        changes = {name: row[name] if abs(row[name]) > ROUNDING else 0.0 for name in CHANGES}
        found.append(
            {**row, **changes, "won": row["clip_i"] - before["clip_i"], "lost": before["clip_t"] - row["clip_t"]}
        )
    return found


def ranks(values: NDArray) -> NDArray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def rank_correlation(a: NDArray, b: NDArray) -> float:
    """Spearman's ρ: the correlation of the ranks, from −1 to 1; NaN where one of the two is constant."""
    a, b = ranks(a), ranks(b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def with_interval(rows: Sequence[Mapping[str, Any]], change: str, outcome: str) -> tuple[float, ...] | None:
    """ρ and its 95 % interval over DRAWS sets of as many pairs, drawn with replacement; None where one is constant.

    Trials of one pair share its subject and its noise, so pairs are drawn, not trials.
    """
    a, b = (np.array([row[name] for row in rows]) for name in (change, outcome))
    middle = rank_correlation(a, b)
    if math.isnan(middle):
        return None
    pairs = sorted({(row["subject"], row["seed"]) for row in rows})
    places = [np.array([k for k, row in enumerate(rows) if (row["subject"], row["seed"]) == pair]) for pair in pairs]
    generator = np.random.default_rng(0)
    spread = []
    for drawn in generator.integers(0, len(pairs), (DRAWS, len(pairs))):
        chosen = np.concatenate([places[k] for k in drawn])
        spread.append(rank_correlation(a[chosen], b[chosen]))
    low, high = np.nanpercentile(spread, (2.5, 97.5))
    return middle, float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/trials.json"))
    args = parser.parse_args()
    if not args.results.is_file():
        parser.error(f"--results {args.results}: no such file; run benchmarks/lr_robustness.py first")
    rows = outcomes(json.loads(args.results.read_text())["rows"])
    groups = {"all trials": rows}
    for name in sorted({row["variant"] for row in rows}):
        groups[name] = [row for row in rows if row["variant"] == name]
    print(f"{'':20}{'trials':>7}" + "".join(f"{f'{CHANGES[c]}, {o}':>26}" for c in CHANGES for o in OUTCOMES))
    report: dict[str, dict[str, Any]] = {}
    for name, own in groups.items():
        if len(own) < FEWEST:
            continue
        report[name] = {"trials": len(own)}
        text = f"{name:20}{len(own):>7}"
        for change in CHANGES:
            for outcome in OUTCOMES:
                found = report[name][f"{change}, {outcome}"] = with_interval(own, change, outcome)
                text += f"{'–' if found is None else '{:+.2f} [{:+.2f}, {:+.2f}]'.format(*found):>26}"
        print(text)
    write_json(args.results.with_name("energy.json"), report)


if __name__ == "__main__":
    main()
