"""Rows of small images: what a study's images look like, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ether_diffusion.images import image_grid, read_image


def strip(rows: Sequence[tuple[str, Sequence[tuple[str, Path]]]]) -> Image.Image:
    """Rows of images under their title and the words that belong to each; where a file is missing, a white square."""
    size = next(read_image(path).size for _, cells in rows for _, path in cells if path.is_file())
    titled = []
    for title, cells in rows:
        images = [read_image(path) if path.is_file() else Image.new("RGB", size, "white") for _, path in cells]
        titled.append((f"{title}: {' | '.join(text for text, _ in cells)}", images))
    return image_grid(titled)
