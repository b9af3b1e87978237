"""Maps that steer: their colours, their background, and what a person drew made into one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ether_diffusion.adapters.locate import find_adapter_file
from ether_diffusion.demo.library import Adapter
from ether_diffusion.demo.settings import LARGEST_MAP
from ether_diffusion.errors import InputError
from ether_diffusion.miniature.control_data import class_colours
from ether_diffusion.training.control_classes import KEY, colours_of, is_classes

BLACK = "#000000"


def classes_of(adapter: Adapter, sample: Image.Image | None) -> dict[str, str]:
    """The classes of an adapter's maps with their colours, the background first: from its file, or its sample map.

    A class without a name is called by its colour.
    """
    try:
        found = json.loads(str(find_adapter_file(adapter.path).metadata.get(KEY) or "null"))
    except (ValueError, OSError):
        found = None
    if is_classes(found):
        return dict(found)
    colours = {} if sample is None else colours_of(sample)
    known = class_colours()
    # A sample of the miniature's world: its other classes can be drawn as well.
    return known if colours and set(colours) <= set(known.values()) else colours


def background_of(classes: Mapping[str, str]) -> str:
    """The colour that a map has where nothing is drawn; black, as most maps have, where there are no classes."""
    return next(iter(classes.values()), BLACK)


def canvas(side: int, colour: str) -> Image.Image:
    """A map with nothing on it."""
    return Image.new("RGB", (side, side), colour)


def map_of(drawn: dict[str, Any] | None, background: str) -> Image.Image:
    """What was drawn or uploaded, on the background where it is transparent.

    Raises:
        InputError: nothing was, or it is too large.
    """
    image = None if drawn is None else drawn.get("composite") or drawn.get("background")
    if image is None or not np.asarray(image.convert("RGBA"))[..., 3].any():
        raise InputError("Map: is empty; draw one, or upload an image")
    if max(image.size) > LARGEST_MAP:
        raise InputError(f"Map: has {image.width}×{image.height} pixels; {LARGEST_MAP} a side at most fit")
    image = image.convert("RGBA")
    under = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(under, image).convert("RGB")


def fill(drawn: dict[str, Any] | None, colour: str, background: str) -> Image.Image:
    """The map with its largest area, what surrounds all else as a rule, in another colour.

    Raises:
        InputError: as `map_of`.
    """
    pixels = np.array(map_of(drawn, background))
    flat = map(tuple, pixels.reshape(-1, 3).tolist())
    ((largest, _),) = Counter(flat).most_common(1)
    pixels[(pixels == largest).all(-1)] = tuple(bytes.fromhex(colour.removeprefix("#")))
    return Image.fromarray(pixels)


def legend(classes: Mapping[str, str]) -> str:
    """The classes with their colours, as a list."""
    items = "".join(
        f'<li><span class="ether-swatch" style="background:{escape(colour)}"></span>{escape(name)}</li>'
        for name, colour in classes.items()
    )
    return (
        f'<ul class="ether-legend" tabindex="0" aria-label="Classes and their colours">{items}</ul>' if items else ""
    )
