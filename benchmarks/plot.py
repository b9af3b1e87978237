"""Draw what the benchmarks wrote.

    python benchmarks/plot.py --results_dir benchmarks/results --output_dir docs
    python benchmarks/plot.py serving

Reads training_step_*.json and inference_*.json for speed_*.png, trials.json for lr_robustness.png (one more for each
other number of steps), parameter_efficiency.png and energy.png, fronts.json for fronts.png, bounded_distance.json for
bounded_distance_plot.png, and serving_*.json for serving.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import plot_distances
import plot_fronts
import plot_serving
import plot_speed
import plot_trials

matplotlib.use("Agg")
KINDS = {
    "speed": plot_speed,
    "trials": plot_trials,
    "fronts": plot_fronts,
    "distances": plot_distances,
    "serving": plot_serving,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"Of {', '.join(KINDS)}; default: all.")
    parser.add_argument("--results_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--output_dir", type=Path, default=Path("docs"))
    args = parser.parse_args()
    if unknown := sorted(set(args.kinds) - set(KINDS)):
        parser.error(f"{', '.join(unknown)}: there is no such kind; there are {', '.join(KINDS)}")
    drawn = 0
    for kind in args.kinds or KINDS:
        for name, figure in KINDS[kind].draw(args.results_dir):
            args.output_dir.mkdir(parents=True, exist_ok=True)
            path = args.output_dir / f"{name}.png"
            figure.savefig(path, dpi=120)
            print(path)
            drawn += 1
    if not drawn:
        parser.error(f"{args.results_dir} holds none of the files named above: run the benchmarks first")


if __name__ == "__main__":
    main()
