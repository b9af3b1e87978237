"""Instance pictures: find them, read them strictly, and cut training views from them."""

import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ether_diffusion.training.options import InputError
from ether_diffusion.training.seeds import generator

# HEIC is here although Pillow needs a plugin for it: a photograph left out in silence is worse than an error.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif"}
)

# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

_KEPT_IMAGES = 64


def find_images(folder: str | Path) -> list[Path]:
    """The pictures that lie directly in a folder, in an order that is the same on every machine.

    Hidden files and files of other kinds (captions, notes) are ignored.

    Raises:
        InputError: no such folder, or no pictures in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        arrived = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise InputError(f"--instance_data_dir {folder}: {arrived}")
    files = [each for each in folder.iterdir() if each.is_file() and not each.name.startswith(".")]
    images = [each for each in files if each.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"--instance_data_dir {folder}: holds {len(files)} files but no picture; "
            "put JPEG, PNG, WebP or BMP files directly into it"
        )
    # Numbers count as numbers, so that 10.jpg follows 9.jpg.
    return sorted(images, key=lambda each: [part.zfill(20) for part in re.split(r"(\d+)", each.name)] + [each.name])


def read_image(path: str | Path) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    EXIF orientation is applied, transparency is composited on white, greyscale, palette, CMYK and 16-bit pictures are
    converted; of an animation, the first frame.

    Raises:
        InputError: not a picture, or damaged; names the file.
    """
    path = Path(path)
    try:
        image = Image.open(path)
    except _DAMAGE as error:
        raise InputError(f"{path}: is not a picture that can be read ({error})") from error
    with image:
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
        except _DAMAGE as error:
            raise InputError(f"{path}: the picture is truncated or damaged ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
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


@dataclass(frozen=True)
class View:
    """One square cut from one picture: its number, the corner of the square in pixels, and whether it is mirrored."""

    image: int
    left: int
    top: int
    flip: bool


@dataclass(frozen=True)
class Framing:
    """How a training view came out of its picture, in pixels, vertical before horizontal.

    original_size: (height, width) of the picture as it was read.
    crop_top_left: (top, left) corner of the view, after the picture was scaled (and mirrored) as the view is.
    target_size: (height, width) of the view.
    """

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


class InstanceImages:
    """Square training views of a few pictures of a subject, addressed by the global index of the sample.

    Sample s belongs to epoch s // len(paths); every epoch visits every picture once, in an order of its own. The
    order, the place of the crop and the mirroring follow from (seed, s) alone.

    Args:
        paths: the picture files.
        prompt: the instance prompt, the same for every picture.
        resolution: side of a view in pixels; the shorter side of a picture is fitted to it.
        center_crop: cut at the centre instead of at a random place.
        random_flip: mirror with probability one half.
        seed: of the run.

    Raises:
        InputError: a file that is no picture, or a damaged one: all files are read here, before any training.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        prompt: str,
        resolution: int,
        center_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
    ):
        self.paths = list(paths)
        self.prompt = prompt
        self.resolution = resolution
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.seed = seed
        self._picture = lru_cache(maxsize=_KEPT_IMAGES)(self._read)
        self._order = lru_cache(maxsize=2)(self._shuffle)
        self.original_sizes = [self._picture(number)[1] for number in range(len(self.paths))]

    def __len__(self) -> int:
        return len(self.paths)

    def view(self, sample: int) -> View:
        """Which part of which picture sample number `sample` shows."""
        epoch, place = divmod(sample, len(self.paths))
        image = self._order(epoch)[place]
        if self.center_crop:
            center = center_view(self.original_sizes[image], self.resolution)
            left, top = center.left, center.top
        else:
            width, height = shrunk_size(self.original_sizes[image], self.resolution)
            side = min(width, height)
            draw = generator(self.seed, "crop", sample)
            left = int(torch.randint(width - side + 1, (), generator=draw))
            top = int(torch.randint(height - side + 1, (), generator=draw))
        flip = self.random_flip and bool(torch.rand((), generator=generator(self.seed, "flip", sample)) < 0.5)
        return View(image, left, top, flip)

    def pixels(self, view: View) -> torch.Tensor:
        """The view as (3, resolution, resolution), float32, from -1 (black) to 1 (white)."""
        return to_pixels(cut(self._picture(view.image)[0], view, self.resolution))

    def framing(self, view: View) -> Framing:
        """Size and crop of the view."""
        return frame(self.original_sizes[view.image], view, self.resolution)

    def _read(self, number: int) -> tuple[Image.Image, tuple[int, int]]:
        """A picture, reduced for training, and the (width, height) that it had."""
        image = read_image(self.paths[number])
        return shrink(image, self.resolution), image.size

    def _shuffle(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.paths), generator=generator(self.seed, "order", epoch)).tolist()


def shrink(image: Image.Image, resolution: int) -> Image.Image:
    """Reduce a picture until its shorter side is `resolution`; smaller pictures stay as they are."""
    size = shrunk_size(image.size, resolution)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def shrunk_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """The (width, height) to which `shrink` brings a picture of this one."""
    width, height = size
    side = min(width, height)
    if side <= resolution:
        return size
    return max(resolution, round(width * resolution / side)), max(resolution, round(height * resolution / side))


def cut(image: Image.Image, view: View, resolution: int) -> Image.Image:
    """The square of a view, brought to `resolution` x `resolution` pixels.

    Only the square is enlarged, so a small picture that is far longer than wide costs no more than a square one.
    """
    side = min(image.size)
    square = image.crop((view.left, view.top, view.left + side, view.top + side))
    if side != resolution:
        square = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return ImageOps.mirror(square) if view.flip else square


def frame(original_size: tuple[int, int], view: View, resolution: int) -> Framing:
    """Size and crop of a view of a picture that was read at this (width, height).

    The corner counts in the picture scaled by resolution / shorter side. A mirrored view is cut from the mirrored
    picture, so what counts is then the margin to the right of the square.
    """
    width, height = shrunk_size(original_size, resolution)
    side = min(width, height)
    left = width - side - view.left if view.flip else view.left
    return Framing(
        original_size=(original_size[1], original_size[0]),
        crop_top_left=(round(view.top * resolution / side), round(left * resolution / side)),
        target_size=(resolution, resolution),
    )


def center_view(size: tuple[int, int], resolution: int) -> View:
    """The central square of a picture that was read at this (width, height), without any chance."""
    width, height = shrunk_size(size, resolution)
    side = min(width, height)
    return View(0, (width - side) // 2, (height - side) // 2, flip=False)


def center_square(image: Image.Image, resolution: int) -> Image.Image:
    """The central square of a picture at `resolution` x `resolution` pixels."""
    return cut(shrink(image.convert("RGB"), resolution), center_view(image.size, resolution), resolution)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB picture as a tensor: (3, height, width), float32, from -1 (black) to 1 (white)."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))  # (h, w, 3)
    return values.permute(2, 0, 1).div(127.5).sub(1.0)
