"""Photographs that users send: read within bounds, and cut to squares."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.images import open_image, read_image

MOST_PIXELS = 50_000_000
LARGEST_SQUARE = (100, 50, 50)
"""Size and place, for `cut_square`, of the square that training would see."""


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


def cut_square(image: Image.Image, size: float = 100, across: float = 50, down: float = 50) -> Image.Image:
    """A square of an image; by default the one that training would see, the largest in the middle.

    size: its side, in percent of the image's shorter side. across, down: where it lies, from 0, at the left or the
    top, to 100, at the right or the bottom. Numbers beyond 0 and 100 count as these; a square has one pixel at least.
    """
    size, across, down = (min(max(share, 0), 100) / 100 for share in (size, across, down))
    side = max(1, round(size * min(image.size)))
    left, top = round(across * (image.width - side)), round(down * (image.height - side))
    return image.crop((left, top, left + side, top + side))
