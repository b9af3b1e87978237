"""Images that say how they were made."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ether_diffusion.files import replace_file

TEXT_KEY = "ether_diffusion"
"""Of the PNG text chunk that holds the settings, as JSON."""


def write_png(path: Path, image: Image.Image, settings: Mapping[str, Any]) -> None:
    """Write a PNG with its settings in one step: what has the name is whole. settings: as `encode_png` takes them."""
    replace_file(path, encode_png(image, settings))


def encode_png(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A PNG with its settings.

    settings: prompt, negative_prompt, adapters, steps, guidance, width, height, seed and images, as the demo reads
        them from an image that is dropped on it.
    """
    info, content = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text(TEXT_KEY, json.dumps(dict(settings)))
    image.save(content, "PNG", pnginfo=info)
    return content.getvalue()
