"""Drawing for the miniature's world: its colours and patterns, where a polygon comes to lie, and semantic maps."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from ether_diffusion.images import to_bytes
from ether_diffusion.miniature.shapes import LABELS, Polygon

SIZE = 64  # pixels
SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 38, 38),
    "orange": (255, 140, 20),
    "yellow": (250, 222, 50),
    "green": (40, 160, 60),
    "cyan": (70, 214, 222),
    "blue": (40, 72, 210),
    "purple": (130, 50, 170),
    "pink": (255, 150, 190),
    "brown": (122, 74, 36),
    "gray": (138, 138, 138),
    "white": (246, 246, 246),
    "black": (24, 24, 24),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
JITTER = 7  # of a channel's 255: a colour's name covers a neighbourhood, not one value
PATTERN_CONTRAST = 0.22  # how far a pattern's second tone lies from the first, towards white or black


def draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, rgb: tuple[int, int, int], side: int, phase: float) -> None:
    """Draw a pattern's second tone over a ground of `rgb`; phase: how far it is shifted, in periods."""
    target = 255 if sum(rgb) < 330 else 0
    second = tuple(round(c + PATTERN_CONTRAST * (target - c)) for c in rgb)
    period = side / 5
    shift = phase * period
    rows = range(-1, 7)
    if pattern == "striped":
        for top in (k * period + shift for k in rows):
            draw.rectangle((0, top, side, top + period / 2), fill=second)
    elif pattern == "dotted":
        radius = period * 0.24
        for j, k in itertools.product(rows, rows):
            x, y = (j + 0.5 * (k % 2)) * period + shift, k * period + shift
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
    elif pattern == "checkered":
        for j, k in itertools.product(rows, rows):
            if (j + k) % 2:
                x, y = j * period + shift, k * period + shift
                draw.rectangle((x, y, x + period, y + period), fill=second)


def place(polygon: Polygon, cx: float, cy: float, radius: float, tilt: float, scale: float) -> list[tuple]:
    """Unit polygon to pixels: rotate by `tilt` degrees, scale by `radius`, move to (cx, cy), in sides."""
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    return [
        ((cx + radius * (x * cos - y * sin)) * scale, (cy + radius * (x * sin + y * cos)) * scale) for x, y in polygon
    ]


def label_image(labels: Image.Image) -> Image.Image:
    """A semantic map as an RGB control image: one fixed, distinct colour for each class."""
    palette = []
    for index in range(len(LABELS)):
        hue, light = (index * 0.618034) % 1.0, 0.35 + 0.15 * (index % 3)
        rgb = (0.0, 0.0, 0.0) if index == 0 else colorsys.hls_to_rgb(hue, light, 0.9)
        palette += [round(255 * c) for c in rgb]
    indexed = labels.copy()
    indexed.putpalette(palette + [0] * (768 - len(palette)))
    return indexed.convert("RGB")


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as (n, 3, h, w), from −1 to 1."""
    return to_bytes(images).float() / 127.5 - 1
