"""Images that say how they were made."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin

from ether_diffusion.files import replace_file
from ether_diffusion.serving.checks import parameters_of

TEXT_KEY = "ether_diffusion"
"""Of the PNG text chunk that holds the settings, as JSON."""
RECORDED = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
"""Argument of a pipeline's call -> the name under which an image has it."""


def write_png(path: Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write a PNG with its settings in one step: what has the name is whole. settings: as `encode_png` takes them."""
    replace_file(path, encode_png(image, settings))


def sampling_defaults(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the pipeline decides of a call where nobody does, of what images record."""
    known = parameters_of(pipe)
    return {argument: known[argument].default for argument in RECORDED if argument in known}


def image_settings(
    image: Image.Image,
    *,
    prompt: str,
    seed: int,
    adapters: Sequence[tuple[str, float]],
    arguments: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """All settings of an image, those too that the pipeline decided.

    arguments: of the pipeline's call. defaults: `sampling_defaults` of the pipeline.
    """
    decided = {**defaults, **arguments}
    return {
        "prompt": prompt,
        "negative_prompt": arguments.get("negative_prompt", ""),
        "adapters": adapters,
        **{name: decided[argument] for argument, name in RECORDED.items() if argument in decided},
        "width": image.width,
        "height": image.height,
        "seed": seed,
        "images": 1,
    }


def encode_png(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A PNG with its settings.

    settings: as `image_settings` makes them, and the demo reads them from an image that is dropped on it.
    """
    info, content = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text(TEXT_KEY, json.dumps(dict(settings)))
    image.save(content, "PNG", pnginfo=info)
    return content.getvalue()
