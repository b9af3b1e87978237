"""Photographs that users send: read within bounds."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from ether_diffusion.errors import InputError
from ether_diffusion.images import open_image, read_image

MOST_PIXELS = 50_000_000
BAD, MARK = "-unreadable", 256
"""What the name of a mark's file ends with, and its pixels a side."""


def read_photo(path: str | Path, side: int | None = None) -> Image.Image:
    """A photograph as upright RGB, no side longer than `side` if that is given.

    Raises:
        InputError: no image, a damaged one, or one with too many pixels, which is then not decoded.
    """
    name = Path(path).name
    with open_image(path, name) as image:
        pixels = image.width * image.height
    if pixels > MOST_PIXELS:
        raise InputError(f"{name}: has {pixels:,} pixels; {MOST_PIXELS:,} at most fit")
    image = read_image(path, name)
    if side is not None:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def mark_bad(path: Path) -> Path:
    """Write a mark in the place of a photo that cannot be read; its file."""
    marked = path.with_name(f"{path.stem[:40]}{BAD}.png")
    image = Image.new("RGB", (MARK, MARK), "#b91c1c")
    draw = ImageDraw.Draw(image)
    for ends in ((1, 1, 3, 3), (3, 1, 1, 3)):
        draw.line([MARK * each // 4 for each in ends], "white", MARK // 16)
    image.save(marked)
    return marked
