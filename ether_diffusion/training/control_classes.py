"""What the colours of control images stand for, so that others can draw maps for an adapter."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ether_diffusion.errors import InputError

KEY = "control_classes"
"""In an adapter's metadata: a JSON object of names and colours, such as {"sky": "#0000ff"}; the background first."""
MOST_CLASSES, LONGEST_CLASS = 64, 40
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
FLAG = "--control_classes"


def parse_classes(text: str) -> dict[str, str]:
    """Classes from a JSON object, or from a file that holds one.

    Raises:
        InputError: no such file, no such object, or names and colours that do not fit.
    """
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{FLAG} {text}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{FLAG}: is no JSON ({error})") from error
    if not is_classes(found):
        raise InputError(
            f'{FLAG}: needs a JSON object of 1 to {MOST_CLASSES} names and colours, such as {{"sky": "#0000ff"}}'
        )
    return {name: colour.lower() for name, colour in found.items()}


def is_classes(found: object) -> bool:
    """Whether a value of JSON is an object of names and colours."""
    return (
        isinstance(found, Mapping)
        and 0 < len(found) <= MOST_CLASSES
        and all(
            isinstance(name, str) and 0 < len(name) <= LONGEST_CLASS and isinstance(colour, str)
            for name, colour in found.items()
        )
        and all(COLOUR.fullmatch(colour) for colour in found.values())
    )


def colours_of(control: Image.Image) -> dict[str, str]:
    """The colours of a map as classes without names, the most used first; none where they are too many."""
    counted = control.convert("RGB").getcolors(MOST_CLASSES)
    ordered = Counter({rgb: count for count, rgb in counted or ()}).most_common()
    return {name: name for name in (f"#{red:02x}{green:02x}{blue:02x}" for (red, green, blue), _ in ordered)}
