"""What importing this package and asking its commands for help costs, beside the libraries that it builds on.

    OMP_NUM_THREADS=1 python benchmarks/import_time.py --output_dir out/benchmarks

Every round starts a fresh Python for `import diffusers, transformers, peft`, and for each of the others with that one
again after it. The table has the median seconds of processor time (user and system) of a process, which other
processes on the machine change least, and the median of the ratios to the mean of the two references around it, with
its quartiles; the JSON file has wall times as well.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

from measuring import machine, make_parser
from result_file import commit, write_json

from ether_diffusion.commands.main import COMMANDS

REFERENCE = "import diffusers, transformers, peft"
OWN = "import ether_diffusion"
ROUNDS = 7


def codes() -> dict[str, list[str]]:
    """Name -> the words after `python` of what is measured."""
    command = ["-m", "ether_diffusion.commands.main"]
    helps = {f"ether-diffusion {name} --help": [*command, name, "--help"] for name in COMMANDS}
    return {OWN: ["-c", OWN], "ether-diffusion --help": [*command, "--help"], **helps}


def measure(words: list[str]) -> tuple[float, float]:
    """Seconds of processor time and of wall time of one process."""
    began, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, time.perf_counter() - began


def compare(others: Mapping[str, list[str]], rounds: int) -> list[dict[str, float | str]]:
    """A row for the reference and for each of the others."""
    reference = ["-c", REFERENCE]
    measure(reference)  # the disk's cache
    around: list[tuple[float, float]] = []
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds):
        around.append(measure(reference))
        for name, words in others.items():
            found[name].append(measure(words))
            around.append(measure(reference))
            ratios[name].append(found[name][-1][0] / statistics.mean(each[0] for each in around[-2:]))
    rows = [_row(REFERENCE, around, [1.0, 1.0])]
    return rows + [_row(name, times, ratios[name]) for name, times in found.items()]


def _row(name: str, times: list[tuple[float, float]], ratios: list[float]) -> dict[str, float | str]:
    used, wall = (statistics.median(each) for each in zip(*times, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"name": name, "seconds": used, "wall_seconds": wall, "ratio": middle, "low": low, "high": high}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="Default: %(default)s.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Of the rows, as the table names them.")
    args = parser.parse_args()
    others = {name: words for name, words in codes().items() if args.only is None or name in args.only}
    rows = compare(others, args.rounds)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "commit": commit(), "rounds": args.rounds, "rows": rows}
    write_json(args.output_dir / "import_time.json", report)
    print(f"{'':42}{'seconds':>9}{'ratio':>8}  quartiles")
    for row in rows:
        print(f"{row['name']:42}{row['seconds']:>9.2f}{row['ratio']:>8.3f}  {row['low']:.3f} to {row['high']:.3f}")


if __name__ == "__main__":
    main()
