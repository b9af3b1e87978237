"""Write a whole pipeline with ETHER adapters merged into its weights; it opens without this package.

  ether-diffusion merge --base stable-diffusion-v1-5/stable-diffusion-v1-5 --adapter dog \\
      --dtype float16 --output_dir dog-pipeline
"""

from __future__ import annotations

import argparse

from ether_diffusion.commands.export import add_input_arguments, open_inputs
from ether_diffusion.dtypes import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the weights written. Default: float32"
    )
    parser.add_argument("--output_dir", required=True, help="new folder to write the pipeline to")


def run(args: argparse.Namespace) -> None:
    from ether_diffusion.export.merge import merge_adapters

    pipe, names = open_inputs(args, "a stock pipeline")
    path = merge_adapters(pipe, args.output_dir, adapter_names=names, dtype=DTYPES[args.dtype])
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{path}: {type(pipe).__name__} with {', '.join(names)} merged, {args.dtype}, {size:,} bytes")
