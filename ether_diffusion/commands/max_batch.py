"""--max_batch, of the commands that generate through the engine."""

from __future__ import annotations

import argparse


def add_max_batch_argument(parser: argparse.ArgumentParser) -> None:
    """The flag as the engine takes it."""
    parser.add_argument("--max_batch", type=_max_batch, default="auto", help='Rows of a forward; "auto" measures.')


def _max_batch(word: str) -> int | str:
    if word == "auto":
        return word
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {word!r}, needs a whole number or auto") from None
