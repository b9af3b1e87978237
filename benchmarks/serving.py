"""What serving costs: mixed batches, whole images, many adapters in memory, the engine itself, a server under load.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --output_dir out/benchmarks           # a quarter of an hour
    OMP_NUM_THREADS=1 python benchmarks/serving.py --output_dir out/benchmarks --quick   # to see that it runs
    OMP_NUM_THREADS=1 python benchmarks/serving.py --output_dir out/benchmarks --parts steps overhead

The parts, each of which writes serving_<part>.json:

    steps      a denoising step of eight rows, with adapters of every kind, against none
    images     eight whole images, by the engine and one after the other
    residency  a step beside 10 to 10,000 adapters in main memory; reading one from the disk; bytes of each
    overhead   what the engine adds between two forwards
    load       `ether-diffusion serve` under several loads, and a simulated line at the same arrivals
    soak       the same server with 1,000 adapters and clients that leave: right images, flat memory

Times are paired: each is taken between two of what it is compared with, and reported are the median of the ratios and
their quartiles. Exit code 1 where the soak found an image that was wrong or lost, or rows that were not free again.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from measuring import machine, make_parser
from result_file import commit, write_json
from serving_parts import images, load, overhead, residency, soak, steps
from serving_parts.settings import QUICK, Settings

from ether_diffusion.base_models import MINIATURE, base_path
from ether_diffusion.commands.serve import check_packages
from ether_diffusion.errors import InputError

PARTS: dict[str, Any] = {
    "steps": steps,
    "images": images,
    "residency": residency,
    "overhead": overhead,
    "load": load,
    "soak": soak,
}
WITH_A_SERVER = ("load", "soak")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--base", default=MINIATURE, help="Any pipeline with a UNet. Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="Of adapters, inputs and arrivals.")
    parser.add_argument("--further", type=int, help=f"Requests while memory is watched. Default: {Settings.further}.")
    parser.add_argument("--host_memory", type=int, help="MiB for adapters of the soak. Default: 8; few fit.")
    parser.add_argument("--quick", action="store_true", help="Small counts, to see that it runs.")
    args = parser.parse_args()
    try:
        check(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raises InputError or OSError for what cannot be measured; makes --output_dir."""
    for name in ("further", "host_memory"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: a positive number fits")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: a number from 0 to {2**32 - 1} fits")
    if "unet" not in DiffusionPipeline.load_config(base_path(args.base)):
        raise InputError(f"--base {args.base}: has no UNet; {MINIATURE} fits")
    if set(args.parts) & {*WITH_A_SERVER}:
        check_packages("local")
    args.output_dir.mkdir(parents=True, exist_ok=True)


def main() -> None:
    args = parse_args()
    given = {name: getattr(args, name) for name in ("further", "host_memory") if getattr(args, name) is not None}
    settings = replace(Settings(base=args.base, seed=args.seed), **{**(QUICK if args.quick else {}), **given})
    described = {"machine": machine(), "commit": commit(), "quick": args.quick}
    described["settings"] = {**asdict(settings), "base": Path(args.base).name}
    faults = []
    for name in dict.fromkeys(args.parts):
        part, busy, began = PARTS[name], os.getloadavg()[0], time.monotonic()
        more = (args.output_dir / f"serving_{name}.log",) if name in WITH_A_SERVER else ()
        report = part.measure(settings, *more)
        seconds = time.monotonic() - began
        write_json(
            args.output_dir / f"serving_{name}.json",
            {**described, "load_average_before": busy, "seconds": seconds, **report},
        )
        print(f"\n{name}, in {seconds:.0f} s, with a load average of {busy:.1f} before it")
        print("\n".join(part.table(report)), flush=True)
        faults += report.get("faults", [])
    if faults:
        raise SystemExit("\n".join(["soak:", *faults]))


if __name__ == "__main__":
    main()
