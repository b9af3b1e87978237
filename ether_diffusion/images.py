"""Image files and images: find them, read them strictly, bring them to RGB, to tensors and to grids.

The only place that does. Sizes are (width, height), as Pillow has them.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from ether_diffusion.errors import InputError, printable

INTERPOLATIONS = {"nearest": Image.Resampling.NEAREST, "lanczos": Image.Resampling.LANCZOS}
"""By their names in options and configs."""

ValueRange = Sequence[float]
"""(what is black, what is white) in an image of more than 8 bits."""
FLOATS, INTEGERS, TWELVE_BITS = (0.0, 1.0), (0.0, 65535.0), (0.0, 4095.0)
BITS_PER_SAMPLE, ORIENTATION = 258, 274  # tags of TIFF and of EXIF data
TURNED = (5, 6, 7, 8)  # orientations in which a row is a column

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
# Pillow knows these by name alone, has other programs read them, or takes their bytes in the wrong order (FITS).
NOT_DECODED = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"})

PNG_SIGNATURE_BYTES, JPEG_END, JPEG_TAIL_BYTES = 8, b"\xff\xd9", 64


# What Pillow's decoders raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def rising(value_range: ValueRange) -> ValueRange:
    """The range, where it is one. Raises `ValueError` for all but two finite numbers, the first below the second."""
    if len(value_range) != 2 or not all(map(math.isfinite, value_range)) or value_range[0] >= value_range[1]:
        raise ValueError(f"value_range={tuple(value_range)}: two finite numbers fit, the first below the second")
    return value_range


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """An image of any mode as upright 8-bit RGB, transparency on white.

    Args:
        image: as it was opened.
        value_range: (black, white) where there are more than 8 bits; values beyond count as these. Default: from 0 to
            1 for floats, to 65535 for integers and to 4095 in TIFF files of 12 bits, and values beyond are refused.

    Raises:
        ValueError: values that are not finite, or beyond the range of the mode.
    """
    if _is_deep(image):
        # By the mode, never by the values: two images of one kind are to have one scale.
        image = _eight_bits(image, value_range)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Whether a pixel is one value of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _eight_bits(image: Image.Image, value_range: ValueRange | None) -> Image.Image:
    """A grey image of more than 8 bits with 8, its EXIF data kept."""
    black, white = value_range or _range_of(image)
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite; numbers fit")
    if value_range is None and values.size and not black <= values.min() <= values.max() <= white:
        raise ValueError(
            f"holds values from {values.min():g} to {values.max():g}; of mode {image.mode}, {black:g} to {white:g} "
            "fit, or state the range of control images (--conditioning_range)"
        )
    grey = ((values - black) / (white - black) * 255).round().clip(0, 255).astype(np.uint8)
    result = Image.fromarray(grey)
    result.info = {name: image.info[name] for name in ("exif",) if name in image.info}
    if ORIENTATION in (exif := image.getexif()):
        result.getexif()[ORIENTATION] = exif[ORIENTATION]
    return result


def _range_of(image: Image.Image) -> ValueRange:
    """What an image says of its values: its mode, and in TIFF files the number of bits."""
    if image.mode == "F":
        return FLOATS
    return TWELVE_BITS if getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (12,) else INTEGERS


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the files that are read as images, in lower case: those of Pillow, and those of HEIC."""
    Image.init()
    formats = Image.registered_extensions().items()
    return HEIF_SUFFIXES | {suffix for suffix, name in formats if name in Image.OPEN and name not in NOT_DECODED}


def is_image(path: Path) -> bool:
    """Whether a file is taken for an image: by its suffix, or, where it has none, by what it holds."""
    if not path.is_file() or path.name.startswith("."):
        return False
    if path.suffix:
        return path.suffix.lower() in image_suffixes()
    try:
        with open_image(path):
            return True
    except InputError:
        return False


def find_images(folder: str | Path, flag: str = "--instance_data_dir") -> list[Path]:
    """The images that lie directly in a folder, in an order that is the same on every machine.

    Hidden files and files of other kinds (captions, notes) are ignored; `left_out` names them.

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
    images = [each for each in folder.iterdir() if is_image(each)]
    if not images:
        others = left_out(folder, ())
        files = [each for each in folder.iterdir() if each.is_file() and not each.name.startswith(".")]
        raise InputError(
            f"{flag} {folder}: holds {len(files)} files but no image{f' ({some(others)})' if others else ''}; "
            "put JPEG, PNG, WebP or BMP files directly into it"
        )
    # Numbers count as numbers, so that 10.jpg follows 9.jpg.
    return sorted(images, key=lambda each: [part.zfill(20) for part in re.split(r"(\d+)", each.name)] + [each.name])


def left_out(folder: Path, used: Collection[Path]) -> list[str]:
    """What lies in a folder and is not used, but for hidden files: names, in words where they alone would mislead."""
    kept = {each.name for each in used}
    rest = [each for each in folder.iterdir() if each.name not in kept and not each.name.startswith(".")]
    return [f"{each.name}{_kind(each)}" for each in sorted(rest)]


def some(names: Sequence[str], most: int = 20) -> str:
    """Names for a message, in one line: the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return printable(", ".join(names[:most]) + more)


def _kind(path: Path) -> str:
    if path.is_dir():
        return "/ (a folder)"
    return " (a broken link)" if path.is_symlink() and not path.exists() else ""


@contextmanager
def open_image(file: str | Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """A context with an image whose header was read; whatever fails in it is told in one sentence.

    Args:
        file: its path, or an open binary file.
        name: what to call it in a message. Default: the path.

    Raises:
        InputError: not there, no image, too large, or damaged; names the file.
    """
    name = str(file) if name is None else name
    try:
        with _open(file, name) as image:
            yield image
    except InputError:
        raise
    except Exception as error:  # decoders raise what they like, of many classes
        raise InputError(f"{name}: {_problem(error)}") from error


def _open(file: str | Path | BinaryIO, name: str) -> Image.Image:
    """By Pillow, or by pillow-heif: called by us, as its registering would change Pillow for the whole process."""
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if not _is_heif(file):
            raise
    if importlib.util.find_spec("pillow_heif") is None:
        raise InputError(
            f'{name}: HEIC images need the package pillow-heif; pip install "ether-diffusion[heif]", or convert it '
            "to JPEG"
        )
    import pillow_heif

    return pillow_heif.open_heif(file).to_pillow()


def _is_heif(file: str | Path | BinaryIO) -> bool:
    """Whether a file begins as HEIF images do: a box "ftyp" with one of their brands."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as opened:
            start = opened.read(12)
    else:
        file.seek(0)
        start = file.read(12)
        file.seek(0)
    return start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif", b"msf")


def _problem(error: Exception) -> str:
    """What is wrong with an image, in words, by the error that came of reading it."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, ValueError) and str(error) == "embedded null byte":
        return "is no path of a file"
    if isinstance(error, (PermissionError, IsADirectoryError)):
        return f"cannot be read ({error.strerror})"
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        return f"is too large ({error}); make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that can be read"
    if isinstance(error, ValueError) and ("MAX_TEXT_CHUNK" in str(error) or "text chunks" in str(error)):
        return f"carries more text than is read with an image ({error}); save it without its metadata"
    return f"the image is truncated or damaged ({error})"


def read_image(
    file: str | Path | BinaryIO, name: str | None = None, value_range: ValueRange | None = None
) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    EXIF orientation is applied, transparency is composited on white, images of every mode are converted; of an
    animation, the first frame.

    Args:
        file: its path, or an open binary file.
        name: what to call it in a message. Default: the path.
        value_range: as for `to_rgb`.

    Raises:
        InputError: not an image, damaged, or with values that do not fit; names the file.
    """
    name = str(file) if name is None else name
    with open_image(file, name) as image:
        image.load()
        return _named_rgb(image, name, value_range)


def check_image(
    file: str | Path | BinaryIO, name: str | None = None, value_range: ValueRange | None = None
) -> tuple[int, int]:
    """Make sure that an image can be read, and return its size as `read_image` gives it.

    PNG and JPEG files show that they are whole without being decoded; all others, and those of more than 8 bits, are
    decoded.

    Args, raises: as `read_image`.
    """
    name = str(file) if name is None else name
    with open_image(file, name) as image:
        if _is_deep(image) or not _is_whole(image):
            image.load()
            return _named_rgb(image, name, value_range).size
        turned = image.getexif().get(ORIENTATION) in TURNED if "exif" in image.info else False
        return image.size[::-1] if turned else image.size


def _named_rgb(image: Image.Image, name: str, value_range: ValueRange | None) -> Image.Image:
    try:
        return to_rgb(image, value_range)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _is_whole(image: Image.Image) -> bool:
    """Whether the file of an opened image shows its end, and all that tells its size."""
    file = getattr(image, "fp", None)
    if file is None or image.format not in ("PNG", "JPEG"):
        return False
    place = file.tell()
    try:
        return _has_png_end(file) if image.format == "PNG" else _has_jpeg_end(file)
    finally:
        file.seek(place)


def _has_jpeg_end(file: BinaryIO) -> bool:
    file.seek(max(file.seek(0, io.SEEK_END) - JPEG_TAIL_BYTES, 0))
    return JPEG_END in file.read()


def _has_png_end(file: BinaryIO) -> bool:
    """Whether the chunks go on to the last one, and none after the pixels can turn the image or be too large."""
    size, place, pixels = file.seek(0, io.SEEK_END), PNG_SIGNATURE_BYTES, False
    while place + 12 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        place += length + 12  # length, kind and checksum around the content
        if kind == b"IEND" or (pixels and kind != b"IDAT"):
            return kind == b"IEND" and place <= size
        pixels = kind == b"IDAT"
    return False


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
