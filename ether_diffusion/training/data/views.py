"""Training views: which rectangle of an image is cut out, and how that is told to the model.

Sizes of images are (width, height), as Pillow has them; targets are (height, width), as models have them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

Size = tuple[int, int]
"""(width, height) in pixels."""
Target = tuple[int, int]
"""(height, width) in pixels of a training image."""

SMOOTH = Image.Resampling.LANCZOS


@dataclass(frozen=True)
class View:
    """One rectangle cut from one image: the image's number, the corner in pixels, and whether it is mirrored.

    The corner counts in the image as `shrink` leaves it.
    """

    image: int
    left: int
    top: int
    flip: bool


@dataclass(frozen=True)
class Framing:
    """How a training view came out of its image, in pixels, vertical before horizontal.

    original_size: (height, width) of the image as it was read.
    crop_top_left: (top, left) corner of the view, after the image was scaled (and mirrored) as the view is.
    target_size: (height, width) of the view.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


def nearest_target(size: Size, targets: Sequence[Target]) -> Target:
    """The target whose aspect ratio is nearest to the image's; of equals, the one nearest in area.

    Ratios are compared as ratios: 1:2 is as far from 1:1 as 2:1 is.
    """
    width, height = size

    def distance(target: Target) -> tuple[float, float]:
        rows, columns = target
        ratio = width * rows / (height * columns)
        area = width * height / (rows * columns)
        return round(max(ratio, 1 / ratio), 6), max(area, 1 / area)

    return min(targets, key=distance)


def shrunk_size(size: Size, target: Target) -> Size:
    """The size to which `shrink` brings an image of this one."""
    width, height = size
    rows, columns = target
    if width <= columns or height <= rows:
        return size
    scale = max(rows / height, columns / width)
    return max(columns, round(width * scale)), max(rows, round(height * scale))


def shrink(image: Image.Image, target: Target, resample: Image.Resampling = SMOOTH) -> Image.Image:
    """Reduce an image until it just covers the target; one that does not cover it stays as it is."""
    size = shrunk_size(image.size, target)
    return image if size == image.size else image.resize(size, resample)


def crop_size(size: Size, target: Target) -> Size:
    """The largest rectangle of the target's proportions in a shrunk image: the target itself where it fits."""
    width, height = size
    rows, columns = target
    scale = max(rows / height, columns / width, 1.0)
    return min(width, max(1, round(columns / scale))), min(height, max(1, round(rows / scale)))


def cut(image: Image.Image, view: View, target: Target, resample: Image.Resampling = SMOOTH) -> Image.Image:
    """The rectangle of a view of a shrunk image, brought to the target's size.

    Only the rectangle is enlarged, so a small image that is far longer than wide costs no more than a square one.
    """
    width, height = crop_size(image.size, target)
    rectangle = image.crop((view.left, view.top, view.left + width, view.top + height))
    rows, columns = target
    if rectangle.size != (columns, rows):
        rectangle = rectangle.resize((columns, rows), resample)
    return ImageOps.mirror(rectangle) if view.flip else rectangle


def frame(original_size: Size, view: View, target: Target) -> Framing:
    """Size and crop of a view of an image that was read at this size.

    The corner counts in the image scaled so that the view has the target's size. A mirrored view is cut from the
    mirrored image, so what counts is then the margin to the right of the rectangle.
    """
    size = shrunk_size(original_size, target)
    width, height = crop_size(size, target)
    rows, columns = target
    left = size[0] - width - view.left if view.flip else view.left
    return Framing(
        original_size=(original_size[1], original_size[0]),
        crop_top_left=(round(view.top * rows / height), round(left * columns / width)),
        target_size=target,
    )


def place_view(
    image: int, original_size: Size, target: Target, draw: torch.Generator | None, *, flip: bool = False
) -> View:
    """The view of image number `image`, read at this size: central where `draw` is None."""
    size = shrunk_size(original_size, target)
    margins = [side - part for side, part in zip(size, crop_size(size, target), strict=True)]
    if draw is None:
        left, top = (margin // 2 for margin in margins)
    else:
        left, top = (int(torch.randint(margin + 1, (), generator=draw)) for margin in margins)
    return View(image, left, top, flip)


def center_cut(image: Image.Image, target: Target, resample: Image.Resampling = SMOOTH) -> Image.Image:
    """The central rectangle of an image at the target's size."""
    central = place_view(0, image.size, target, None)
    return cut(shrink(image.convert("RGB"), target, resample), central, target, resample)
