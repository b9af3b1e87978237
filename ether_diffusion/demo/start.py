"""Images that start from another image: which pipelines do so, and what they are given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline
from PIL import Image, ImageOps

from ether_diffusion.errors import InputError
from ether_diffusion.serving.checks import call_parameters

LARGEST_START = 4096
"""Pixels a side of an image that is started from."""


@dataclass(frozen=True)
class Start:
    """What an image starts from.

    image: RGB.
    change: from 0, it stays as it is, to 1, it is only noise in the beginning.
    mask: white where it is painted anew and black where it stays; None: all of it changes.
    """

    image: Image.Image
    change: float = 0.6
    mask: Image.Image | None = None


def task_class(base_class: str, task: str) -> type[DiffusionPipeline] | None:
    """The pipeline class of diffusers that does "image2image" or "inpainting" with the models of another, if any does.

    base_class: the name of the class that generates from text.
    """
    mapping = {
        "image2image": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        "inpainting": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    }[task]
    return auto_pipeline._get_task_class(mapping, base_class, throw_error_if_not_exist=False)


def start_arguments(kind: type[DiffusionPipeline], start: Start, size: tuple[int, int]) -> dict[str, Any]:
    """What a pipeline's call is given of a start, at a size of (width, height).

    Raises:
        InputError: a change that is no number from 0 to 1.
    """
    if not math.isfinite(start.change) or not 0 < start.change <= 1:
        raise InputError(f"Change: got {start.change!r}, needs a number above 0, to 1")
    arguments = {"image": ImageOps.fit(start.image, size, Image.Resampling.LANCZOS), "strength": float(start.change)}
    if start.mask is not None:
        arguments["mask_image"] = ImageOps.fit(start.mask.convert("L"), size, Image.Resampling.NEAREST)
    if "width" in call_parameters(kind):
        arguments |= {"width": size[0], "height": size[1]}
    return arguments


def read_start(drawn: dict[str, Any] | None, change: float) -> Start | None:
    """What was put into the page's editor, if anything: its image, and what was painted over it as the mask.

    Raises:
        InputError: more pixels than fit.
    """
    image = None if drawn is None else drawn.get("background")
    if image is None or not np.asarray(image.convert("RGBA"))[..., 3].any():
        return None
    if max(image.size) > LARGEST_START:
        raise InputError(f"Start image: has {image.width}×{image.height} pixels; {LARGEST_START} a side at most fit")
    painted = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in drawn.get("layers") or ()]
    mask = np.logical_or.reduce(painted) if painted else np.zeros(1, bool)
    return Start(image.convert("RGB"), change, Image.fromarray(np.uint8(255 * mask), "L") if mask.any() else None)
