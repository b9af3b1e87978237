"""Image files and images: find them, read them strictly, bring them to RGB, to tensors and to grids.

The only place that does. Sizes are (width, height), as Pillow has them.
"""

from __future__ import annotations

import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ether_diffusion.errors import InputError

INTERPOLATIONS = {"nearest": Image.Resampling.NEAREST, "lanczos": Image.Resampling.LANCZOS}
"""By their names in options and configs."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, transparency on white."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.float64)
        scale = 257.0 if values.max(initial=0.0) > 255 else 1.0
        return Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


# HEIC is here although Pillow needs a plugin for it: a photograph left out in silence is worse than an error.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}
)

# What Pillow's decoders raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def find_images(folder: str | Path, flag: str = "--instance_data_dir") -> list[Path]:
    """The images that lie directly in a folder, in an order that is the same on every machine.

    Hidden files and files of other kinds (captions, notes) are ignored.

    Args:
        folder: where they lie.
        flag: what the user gave the folder with, for the messages.

    Raises:
        InputError: no such folder, or no images in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        arrived = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise InputError(f"{flag} {folder}: {arrived}")
    files = [each for each in folder.iterdir() if each.is_file() and not each.name.startswith(".")]
    images = [each for each in files if each.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"{flag} {folder}: holds {len(files)} files but no image; "
            "put JPEG, PNG, WebP or BMP files directly into it"
        )
    # Numbers count as numbers, so that 10.jpg follows 9.jpg.
    return sorted(images, key=lambda each: [part.zfill(20) for part in re.split(r"(\d+)", each.name)] + [each.name])


def read_image(file: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    EXIF orientation is applied, transparency is composited on white, greyscale, palette, CMYK and 16-bit images are
    converted; of an animation, the first frame.

    Args:
        file: its path, or an open binary file.
        name: what to call it in a message. Default: the path.

    Raises:
        InputError: not an image, or damaged; names the file.
    """
    name = str(file) if name is None else name
    try:
        image = Image.open(file)
    except DAMAGE as error:
        raise InputError(f"{name}: is not an image that can be read ({error})") from error
    with image:
        try:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
        except DAMAGE as error:
            raise InputError(f"{name}: the image is truncated or damaged ({error})") from error


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as a tensor: (3, height, width), float32, from -1 (black) to 1 (white)."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))  # (h, w, 3)
    return values.permute(2, 0, 1).div(127.5).sub(1.0)


def to_bytes(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images of one size, read as RGB: (n, 3, height, width), uint8."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


SMALLEST_CELL = 128  # pixels; smaller images are enlarged, so that a person can see them
GAP, FONT_SIZE = 8, 16  # pixels


def image_grid(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Titled rows of images as one image, such as the same prompts before and after a training.

    Args:
        rows: (title, images) each, at least one image in the first row. All images are brought to the size of the
            first one, which is enlarged by a whole factor where it is small; a title that is too long is cut short.
    """
    width, height = rows[0][1][0].size
    factor = max(1, -(-SMALLEST_CELL // min(width, height)))
    cell = (width * factor, height * factor)
    font = ImageFont.load_default(FONT_SIZE)
    columns = max(len(images) for _, images in rows)
    row_height = cell[1] + FONT_SIZE + 3 * GAP
    canvas = Image.new("RGB", (columns * (cell[0] + GAP) + GAP, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (title, images) in enumerate(rows):
        draw.text((GAP, k * row_height + GAP), _shortened(title, canvas.width - 2 * GAP, font), "black", font)
        for j, image in enumerate(images):
            corner = (GAP + j * (cell[0] + GAP), k * row_height + FONT_SIZE + 2 * GAP)
            # Nearest: no pixel is shown that the model did not generate, and a label map keeps its colours.
            canvas.paste(image.resize(cell, Image.Resampling.NEAREST), corner)
    return canvas


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, or as much of its beginning as fits into so many pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    # Measuring takes as long as the text is, and prompts can be very long: so search by halves.
    too_long = bisect_right(range(len(text)), width, key=lambda length: font.getlength(text[:length] + "…"))
    return text[: max(too_long - 1, 0)] + "…"
