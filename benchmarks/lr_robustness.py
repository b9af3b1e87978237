"""Over how many decades of learning rate does a method work?

    python benchmarks/lr_robustness.py --output_dir out/studies --processes 2
    python benchmarks/lr_robustness.py --output_dir out/quick --quick

For each method, learning rates on a grid of half decades from 1e-6 to 1e4: from the script's default upwards, until
the method has failed at --patience rates in a row, then downwards likewise. At each rate a training for each pair of
a subject and a seed. Measured: similarity to the subject (CLIP-I) of images of it in four settings, similarity of
images without it to their own prompts (CLIP-T), drift of those from the base model's of the same seeds, the
denoising loss on the image that was held out.

The usable window of a method is the run of rates, around its best, at which the mean CLIP-I is at least 90 % of the
method's best and the mean CLIP-T at least 90 % of the base model's. Its width is log10(highest / lowest), so that
one rate alone has width 0; its interval is that of the pairs, drawn anew with replacement (95 %). A
window that is still open at an end of the grid is wider than what is said. One rate that falls short by chance cuts
a window in two, so the number of all usable rates is given as well, with its interval; each stands for half a decade.

--steps_factor 4 asks the same with four times the steps. What is not a flag here goes to the training script, such as
--mixed_precision bf16 --resolution 512. Writes JSON row by row: the same command goes on where it was stopped. Once
the rows lie in benchmarks/results, benchmarks/plot.py draws them.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from measuring import make_parser
from strips import strip
from trials import BASE, IMAGES, Trial, Trials, Variant, add_settings, image_folder, pairs, read_settings

from ether_diffusion.training.options import LEARNING_RATES

STUDIED = ("ether", "ether_plus", "lora", "oft", "hra", "full")
RATES = [float(f"{10 ** (k / 2):.0e}") for k in range(-12, 9)]  # 1e-6, 3e-6, 1e-5, … 1e4
ENOUGH = 0.9
DRAWS = 2000
STRIPS = "lr_strips.png"
QUICK = {"methods": ("ether_plus",), "pairs": 1, "max_train_steps": 2, "num_inference_steps": 2, "rates": (1e-3, 3e-3)}


class Window(NamedTuple):
    """A run of usable learning rates; all None where no rate is usable."""

    low: float | None
    high: float | None
    open_low: bool
    open_high: bool

    @property
    def decades(self) -> float:
        """log10(high / low); −½ where there is none, so that it is below that of a single rate."""
        return -0.5 if self.low is None or self.high is None else math.log10(self.high / self.low)


def usable(clip_i: float, clip_t: float, *, best_clip_i: float, base_clip_t: float) -> bool:
    return clip_i >= ENOUGH * best_clip_i and clip_t >= ENOUGH * base_clip_t


def best_rate(figures: Mapping[float, tuple[float, float]], base_clip_t: float) -> float | None:
    """The rate of the highest CLIP-I among those whose CLIP-T is high enough; None where none is.

    A model that generates nothing but its subject is no success.

    figures: learning rate -> (CLIP-I, CLIP-T), means over trials; base_clip_t: of the base model.
    """
    faithful = {rate: clip_i for rate, (clip_i, clip_t) in figures.items() if clip_t >= ENOUGH * base_clip_t}
    return max(faithful, key=faithful.__getitem__, default=None)


def usable_rates(figures: Mapping[float, tuple[float, float]], base_clip_t: float) -> list[float]:
    """All rates that are usable beside the best one, in order. Arguments as for `best_rate`."""
    best = best_rate(figures, base_clip_t)
    if best is None:
        return []
    bounds = {"best_clip_i": figures[best][0], "base_clip_t": base_clip_t}
    return sorted(rate for rate, own in figures.items() if usable(*own, **bounds))


def window(figures: Mapping[float, tuple[float, float]], base_clip_t: float, grid: Sequence[float]) -> Window:
    """The run of usable rates around the best one.

    Args:
        figures: learning rate -> (CLIP-I, CLIP-T), means over trials.
        base_clip_t: of the base model.
        grid: all rates that might have been tried; at its ends a window is open. A rate between two usable ones that
            was not tried counts as usable.
    """
    best = best_rate(figures, base_clip_t)
    if best is None:
        return Window(None, None, False, False)
    tried, fitting = sorted(figures), usable_rates(figures, base_clip_t)
    ends = []
    for direction in (-1, 1):
        k = tried.index(best)
        while 0 <= k + direction < len(tried) and tried[k + direction] in fitting:
            k += direction
        ends.append(tried[k])
    return Window(*ends, ends[0] == grid[0], ends[1] == grid[-1])


def means(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Mean CLIP-I and CLIP-T; a training that failed counts as 0."""
    return mean(row["clip_i"] or 0.0 for row in rows), mean(row["clip_t"] or 0.0 for row in rows)


def interval(
    by_rate: Mapping[float, Sequence[Mapping[str, Any]]],
    base_clip_t: Sequence[float],
    size: Callable[[Mapping[float, tuple[float, float]], float], float],
) -> tuple[float, float]:
    """The 95 % interval of a window's size: percentiles over DRAWS ways to draw as many pairs with replacement.

    Args:
        by_rate: learning rate -> rows, one for each pair, in one order.
        base_clip_t: of the pairs, in that order.
        size: of the figures of a draw and its base model's CLIP-T.
    """
    numbers, count = random.Random(0), len(base_clip_t)
    drawn = Counter(tuple(sorted(numbers.choices(range(count), k=count))) for _ in range(DRAWS))
    sizes = []
    for pairs_drawn, times in drawn.items():
        figures = {rate: means([rows[k] for k in pairs_drawn]) for rate, rows in by_rate.items()}
        sizes += [size(figures, mean(base_clip_t[k] for k in pairs_drawn))] * times
    sizes.sort()
    edge = round(0.025 * (DRAWS - 1))
    return sizes[edge], sizes[-1 - edge]


def explore(
    rates: Sequence[float],
    start: float,
    measure: Callable[[float], tuple[float, float]],
    base_clip_t: float,
    patience: int = 2,
) -> dict[float, tuple[float, float]]:
    """Figures at the rates around the start, up and then down, until a side has failed `patience` times in a row.

    Failed at a rate: not `usable` beside the best CLIP-I so far.
    """
    first = min(range(len(rates)), key=lambda k: abs(math.log(rates[k] / start)))
    found: dict[float, tuple[float, float]] = {}
    for side in (rates[first:], rates[:first][::-1]):
        failures = 0
        for rate in side:
            found[rate] = measure(rate)
            failures = 0 if rate in usable_rates(found, base_clip_t) else failures + 1
            if failures == patience:
                break
    return found


def summary(rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], grid: Sequence[float]) -> dict:
    """A method's window with its interval, its best rate and the figures there, and the most that any rate does.

    largest_drift: a training that failed has drifted by 1; largest_distance: mean ‖ΔW‖/‖W‖, None where a weight is not
    finite.
    """
    by_rate = {
        rate: [row for row in rows if row["learning_rate"] == rate] for rate in {row["learning_rate"] for row in rows}
    }
    by_rate = {rate: own for rate, own in by_rate.items() if len(own) == len(base)}  # the last may be under way
    figures = {rate: means(own) for rate, own in by_rate.items()}
    base_clip_t = [row["clip_t"] for row in base]
    found = window(figures, mean(base_clip_t), grid)
    best = best_rate(figures, mean(base_clip_t))
    drifts = [mean(1.0 if row["drift"] is None else row["drift"] for row in own) for own in by_rate.values()]
    distances = [
        None if any(row.get("relative_distance") is None for row in own) else mean(r["relative_distance"] for r in own)
        for own in by_rate.values()
    ]
    return {
        **found._asdict(),
        "decades": found.decades,
        "interval": interval(by_rate, base_clip_t, lambda *draw: window(*draw, grid).decades),
        "usable_rates": usable_rates(figures, mean(base_clip_t)),
        "usable_interval": interval(by_rate, base_clip_t, lambda *draw: len(usable_rates(*draw))),
        "best_rate": best,
        "best_clip_i": None if best is None else figures[best][0],
        "best_clip_t": None if best is None else figures[best][1],
        "largest_drift": max(drifts),
        "largest_distance": None if None in distances else max(distances),
        "failed": sum(row.get("failed") is not None for row in rows),
    }


def line(name: str, found: Mapping[str, Any]) -> str:
    if found["best_rate"] is None:
        return f"{name:18}{'no usable rate':>30}"
    low = f"{'≤' * found['open_low']}{found['low']:.0e}"
    high = f"{'≥' * found['open_high']}{found['high']:.0e}"
    distance = "∞" if found["largest_distance"] is None else f"{found['largest_distance']:.2f}"
    ends = f"[{found['interval'][0]:.1f}, {found['interval'][1]:.1f}]"
    rates = f"{len(found['usable_rates'])} [{found['usable_interval'][0]}, {found['usable_interval'][1]}]"
    return (
        f"{name:18}{low:>8}{high:>9}{found['decades']:>9.1f} {ends:12}{rates:>12}{found['best_rate']:>9.0e}"
        f"{found['best_clip_i']:>8.3f}{found['best_clip_t']:>8.3f}{found['largest_drift']:>8.3f}{distance:>9}"
    )


HEAD = (
    f"{'':18}{'window':>17}{'decades':>9} {'95 %':12}{'rates, 95 %':>12}{'best at':>9}"
    f"{'CLIP-I':>8}{'CLIP-T':>8}{'drift':>8}{'|ΔW|/|W|':>9}"
)


def generated(rows: Sequence[Mapping[str, Any]], output_dir: Path) -> list[tuple[str, list[tuple[str, Path]]]]:
    """For each variant an image at each learning rate that any of them has, for `strip`."""
    rates = sorted({row["learning_rate"] for row in rows})
    folder = output_dir / IMAGES
    return [
        (name, [(f"{rate:.0e}", image_folder(folder, {**row, "learning_rate": rate}) / "0.png") for rate in rates])
        for name, row in {row["variant"]: row for row in rows}.items()
    ]


def main() -> None:
    parser = make_parser(__doc__)
    add_settings(parser)
    parser.add_argument("--methods", nargs="+", choices=tuple(LEARNING_RATES), default=STUDIED)
    parser.add_argument("--rates", nargs="+", type=float, choices=RATES, default=RATES, metavar="RATE")
    parser.add_argument("--steps_factor", type=int, default=1, help="times as many steps")
    parser.add_argument("--patience", type=int, default=2, help="rates in a row at which a method has to fail")
    args, training_flags = parser.parse_known_args()
    if args.quick:
        vars(args).update(QUICK)

    settings = read_settings(args, training_flags)
    chosen = pairs(args.pairs, args.data_dir, args.output_dir / "views")
    steps = args.max_train_steps * args.steps_factor
    grid = sorted(args.rates)
    with Trials(settings, args.output_dir, processes=args.processes) as trials:
        base = trials.base(chosen)
        base_clip_i, base_clip_t = means(base)
        print(f"{HEAD}\n{BASE:18}{'':59}{base_clip_i:>8.3f}{base_clip_t:>8.3f}", flush=True)
        for method in args.methods:
            variant, rows = Variant.of(method), []

            def measure(rate: float, variant: Variant = variant, rows: list = rows) -> tuple[float, float]:
                rows += trials.run([Trial(variant, rate, subject, seed, steps) for subject, seed in chosen])
                return means(rows[-len(chosen) :])

            explore(grid, LEARNING_RATES[method], measure, base_clip_t, args.patience)
            print(line(variant.name, summary(rows, base, grid)), flush=True)
        if steps == args.max_train_steps:
            subject, seed = chosen[0]
            own = [row for row in trials.results.rows if (row["subject"], row["seed"]) == (subject.name, seed)]
            shown = strip(generated([row for row in own if row.get("steps") == steps], args.output_dir))
            shown.save(args.output_dir / STRIPS)
            print(args.output_dir / STRIPS)


if __name__ == "__main__":
    main()
