"""The flags that say which files of a base model a command loads."""

from __future__ import annotations

import argparse


def add_base_version_arguments(parser: argparse.ArgumentParser) -> None:
    """--variant and --revision, as `from_pretrained` takes them."""
    parser.add_argument("--variant", help='Variant of the base\'s weight files, such as "fp16".')
    parser.add_argument("--revision", help="Branch, tag or commit of the base on the Hub.")
