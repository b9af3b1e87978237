"""Rows of small images under words: what a study's images look like, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

CELL, MARGIN, TITLE = 96, 16, 132  # pixels


def strip(rows: Sequence[tuple[str, Sequence[tuple[str, Path]]]]) -> Image.Image:
    """Titled rows of images, a line of text above each; a place whose file is not there stays empty."""
    columns = max(len(cells) for _, cells in rows)
    canvas = Image.new("RGB", (TITLE + columns * CELL, len(rows) * (CELL + MARGIN)), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (title, cells) in enumerate(rows):
        top = k * (CELL + MARGIN)
        draw.text((4, top + MARGIN + CELL // 2), title, fill="black", anchor="lm")
        for j, (text, path) in enumerate(cells):
            if not path.is_file():
                continue
            left = TITLE + j * CELL
            draw.text((left + CELL // 2, top + MARGIN // 2), text, fill="black", anchor="mm")
            with Image.open(path) as image:
                canvas.paste(image.resize((CELL - 2, CELL), Image.Resampling.LANCZOS), (left, top + MARGIN))
    return canvas
