"""What one request asks for, checked; and how an image carries it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ether_diffusion.errors import InputError
from ether_diffusion.images import DAMAGE
from ether_diffusion.serving.png import TEXT_KEY

MAP_CHUNK = b"etMp"
"""Of the private PNG chunk that holds the map, as a PNG. Text chunks are read up to one megabyte only."""
LARGEST_MAP = 2048
"""Pixels a side."""
LONGEST_PROMPT, MOST_STEPS, MOST_IMAGES, MOST_ADAPTERS, MOST_STRENGTHS = 1000, 150, 8, 3, 8
HIGHEST_STRENGTH, HIGHEST_GUIDANCE, HIGHEST_SEED = 1.5, 30.0, 2**32 - 1
LARGEST_TEXT_CHUNK = 20_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One request: what is generated, with which adapters.

    adapters: (name, strength) in the order in which they are applied.
    seed: of the first image; the next have the numbers after it.
    width, height: in pixels; what fits them is the base model's to say.
    strengths: of the first adapter, side by side in place of base and adapted.
    change: how much of an image was changed that was started from; 0: none was. The image itself is not kept.

    Raises:
        InputError: a value outside its bounds; says which, what came and what fits.
    """

    prompt: str
    negative_prompt: str = ""
    adapters: tuple[tuple[str, float], ...] = ()
    steps: int = 25
    guidance: float = 5.0
    width: int = 64
    height: int = 64
    seed: int = 0
    images: int = 1
    strengths: tuple[float, ...] = ()
    change: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
                raise InputError(f"{_label(name)}: needs a text of {LONGEST_PROMPT} characters at most")
        if not self.prompt.strip():
            raise InputError("Prompt: is empty; say what the image should show")
        for name, low, high in (
            ("steps", 1, MOST_STEPS),
            ("images", 1, MOST_IMAGES),
            ("seed", 0, HIGHEST_SEED),
            ("width", 1, 1 << 13),
            ("height", 1, 1 << 13),
        ):
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():  # browsers and clients send 25.0 as well as 25
                value = int(value)
                object.__setattr__(self, name, value)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InputError(f"{_label(name)}: got {value!r}, needs a whole number from {low} to {high}")
        _check_number("Guidance", self.guidance, HIGHEST_GUIDANCE)
        names = [name for name, _ in self.adapters]
        if len(names) > MOST_ADAPTERS or len(set(names)) < len(names):
            raise InputError(f"Adapters: got {', '.join(names)}; {MOST_ADAPTERS} at most fit, each once")
        for name, strength in self.adapters:
            _check_number(f"Strength of {name}", strength, HIGHEST_STRENGTH)
        _check_number("Change", self.change, 1.0)
        for strength in self.strengths:
            _check_number("Strengths side by side", strength, HIGHEST_STRENGTH)
        if self.strengths and not self.adapters:
            raise InputError("Strengths side by side: choose an adapter first")
        if len(self.strengths) > MOST_STRENGTHS:
            raise InputError(f"Strengths side by side: got {len(self.strengths)}; {MOST_STRENGTHS} at most fit")

    @property
    def columns(self) -> tuple[tuple[tuple[str, float], ...], ...]:
        """What is generated from each seed, side by side: the adapters of each image, none for the base model's."""
        if self.strengths:
            (name, _), *others = self.adapters
            return tuple(((name, strength), *others) for strength in self.strengths)
        return ((), self.adapters) if self.adapters else ((),)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` wrote.

        Raises:
            InputError: another text.
        """
        try:
            values = json.loads(text)
            known = {each.name for each in fields(cls)}
            if isinstance(values, dict) and "pictures" in values:  # as version 0.1 called it
                values["images"] = values.pop("pictures")
            if not isinstance(values, dict) or not set(values) <= known:
                raise TypeError("other entries than settings")
            values["adapters"] = tuple((str(name), float(strength)) for name, strength in values.get("adapters", ()))
            values["strengths"] = tuple(float(strength) for strength in values.get("strengths", ()))
            return cls(**values)
        except InputError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the settings in the image cannot be read ({error})") from error

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _check_number(what: str, value: Any, highest: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= highest:
        raise InputError(f"{what}: got {value!r}, needs a number from 0 to {highest:g}")


def save_image(image: Image.Image, path: Path, settings: Settings, control: Image.Image | None = None) -> None:
    """Write a PNG that says how it was made, with the map that it was generated under, if there was one."""
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_KEY, settings.to_json())
    if control is not None:
        content = io.BytesIO()
        control.save(content, "PNG")
        info.add(MAP_CHUNK, content.getvalue())
    image.save(path, pnginfo=info)


def read_image(path: str | Path) -> tuple[Settings, Image.Image | None]:
    """Settings and map of an image that `save_image` wrote; None where it was generated without a map.

    Raises:
        InputError: not such an image.
    """
    name = Path(path).name
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(TEXT_KEY)
            maps = [content for kind, content, *_ in image.private_chunks if kind == MAP_CHUNK]
    except DAMAGE as error:
        raise InputError(f"{name}: is not a PNG image that can be read") from error
    if not isinstance(text, str) or len(text) > LARGEST_TEXT_CHUNK:
        raise InputError(f"{name}: holds no settings; images that were downloaded from this page do")
    return Settings.from_json(text), _read_map(name, maps[0]) if maps else None


def _read_map(name: str, content: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            size = image.size
            if max(size) <= LARGEST_MAP:
                return image.convert("RGBA")
    except DAMAGE as error:
        raise InputError(f"{name}: the map in it cannot be read") from error
    raise InputError(f"{name}: the map in it has {size[0]}×{size[1]} pixels; {LARGEST_MAP} a side at most fit")
