"""Say how to train a model on a card: the command, the memory that it takes by part, and why each choice was made.

  ether-diffusion recipe --model flux2-klein --vram 12 --images 8

Computed from the models' configurations at full size; nothing is downloaded, and no weights are read. The figures are
estimates (docs/recipes.md has the formulas): with the model at hand, the training's own --dry_run tells them for its
files.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ether_diffusion.commands.tables import show, table

if TYPE_CHECKING:
    from ether_diffusion.training.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="Such as sd15, sdxl, flux2-klein, or an id on the Hub; another word lists all."
    )
    parser.add_argument("--vram", type=float, required=True, help="Memory of the card, in GB as it is sold.")
    parser.add_argument("--images", type=int, default=5, help="How many there are to train on. Default: %(default)s.")


def run(args: argparse.Namespace) -> None:
    """Print the recipe. Raises `InputError` for an unknown model or a card that is too small."""
    from ether_diffusion.training.recipe import recipe

    render(recipe(model=args.model, vram=args.vram, images=args.images))


def render(found: Recipe) -> None:
    """The command first, so that it can be copied; then the memory, and the reasons."""
    from ether_diffusion.training.memory import format_bytes

    show(found.command, "")
    rows = [(part, format_bytes(size)) for part, size in found.parts.items()]
    show(table(("memory in a step", "estimate"), rows, texts=1), "")
    rows = [(moment, format_bytes(size)) for moment, size in found.moments.items()]
    show(table(("needed, with 1 GB for CUDA", "estimate"), rows, texts=1), "")
    show(table(("choice", "why"), list(found.reasons.items())))
