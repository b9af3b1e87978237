"""Write ETHER adapters as a LoRA: exact, without a decomposition, at any strength, one adapter or several composed.

  ether-diffusion export --to diffusers-lora --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --adapter dog --output_dir dog-lora
  ether-diffusion export --to kohya --base base --adapter dog style --scale 1 0.8 --dtype float16 --output_dir loras

A LoRA is exact on the base weights it was computed from. What the formats hold: docs/export.md. Adapters of control
training hold more than reflections, which no LoRA can, and are refused; but those of FLUX.1 with an encoder of latents
are written for diffusers' FluxControlPipeline (--to diffusers-lora).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ether_diffusion.base_models import base_path
from ether_diffusion.commands.base_version import add_base_version_arguments
from ether_diffusion.dtypes import DTYPES
from ether_diffusion.errors import InputError
from ether_diffusion.export.formats import DEFAULT_NAMES, FORMATS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """What is read: the base, adapters and their strengths."""
    parser.add_argument(
        "--base", required=True, type=base_path, help="base pipeline: a folder in diffusers' layout, or a Hub id"
    )
    add_base_version_arguments(parser)
    parser.add_argument(
        "--adapter", required=True, nargs="+", help="adapters, in the order in which they act: files, folders, Hub ids"
    )
    parser.add_argument(
        "--scale",
        type=float,
        nargs="+",
        default=[1.0],
        help="strength of all, or of each. Only 0 and 1 keep norms; ETHER at 0.5 erases what it reflects. Default: 1",
    )
    parser.add_argument(
        "--allow_other_base",
        action="store_true",
        help="go on where an adapter records that it was trained on other weights than the base's",
    )


def open_inputs(args: argparse.Namespace, result: str) -> tuple[DiffusionPipeline, list[str]]:
    """The base with the adapters on it, as `open_adapted` gives them. `result`: what is to be written, in words.

    Raises:
        InputError: an adapter of control training, whose encoder or modules would be lost; says what to do instead.
    """
    from diffusers import DiffusionPipeline

    from ether_diffusion.adapters.locate import find_adapter_file
    from ether_diffusion.export.beyond import check_expressible
    from ether_diffusion.export.merge import open_adapted

    for adapter in args.adapter:
        file, name = find_adapter_file(adapter), ""
        if file.weights:
            name = DiffusionPipeline.load_config(base_path(args.base), revision=args.revision)["_class_name"]
        try:
            check_expressible(file, result, to=getattr(args, "to", None), base_class=name)
        except InputError as error:
            raise InputError(f"--adapter {adapter}: {error}") from None
    return open_adapted(
        args.base,
        args.adapter,
        args.scale,
        allow_other_base=args.allow_other_base,
        variant=args.variant,
        revision=args.revision,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, choices=FORMATS, help="format")
    add_input_arguments(parser)
    rank_help = "auto: each layer's exact rank. A number: all layers, filled up with zeros. Default: auto"
    parser.add_argument("--rank", type=_rank, metavar="auto|N", help=rank_help)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the file. Default: float32")
    parser.add_argument("--output_dir", required=True, help="folder to write to; made if need be")
    parser.add_argument(
        "--weight_name",
        help="name of the file. Default: " + ", ".join(f"{name} ({to})" for to, name in DEFAULT_NAMES.items()),
    )


def _rank(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs auto or a whole number") from None


def run(args: argparse.Namespace) -> None:
    from ether_diffusion.export.lora import export_lora

    pipe, names = open_inputs(args, "a LoRA")
    options = {"to": args.to, "rank": args.rank, "dtype": DTYPES[args.dtype], "weight_name": args.weight_name}
    print(export_lora(pipe, args.output_dir, adapter_names=names, **options))
