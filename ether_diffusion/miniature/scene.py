"""What an image of the miniature's world shows: shapes and figures on a background, and how it becomes pixels."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from ether_diffusion.miniature.render import COLOURS, JITTER, SIZE, SUPERSAMPLING, draw_pattern, place
from ether_diffusion.miniature.shapes import FIGURES, LABELS, SHAPES, Patch


class Rendering(NamedTuple):
    """`image`: RGB, SIZE × SIZE. `labels`: mode L, SIZE × SIZE, indices into `shapes.LABELS`."""

    image: Image.Image
    labels: Image.Image


@dataclass(frozen=True)
class Shape:
    """A plain shape. Position and radius are fractions of the image's side, tilt is in degrees."""

    name: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    tilt: float = 0.0

    def patches(self) -> list[Patch]:
        return [Patch(SHAPES[self.name], self.colour, self.name)]


@dataclass(frozen=True)
class Figure:
    """A member of a class of figures: colours and styles of its parts, in the order of the class."""

    name: str
    colours: tuple[tuple[str, str], ...]
    styles: tuple[tuple[str, int], ...]
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.4
    tilt: float = 0.0

    def patches(self) -> list[Patch]:
        built = FIGURES[self.name].build(dict(self.colours), dict(self.styles))
        return [patch._replace(part=f"{self.name} {patch.part}") for patch in built]


@dataclass(frozen=True)
class Scene:
    """What an image shows; `caption` is one of the ways to say it."""

    things: tuple[Shape | Figure, ...]
    background: str
    pattern: str
    seed: str
    caption: str

    def render(self) -> Rendering:
        """Draw the scene, antialiased, and its semantic map with the same geometry, not antialiased.

        The colours' jitter and the pattern's phase come from the scene's seed alone, so a scene has one image.
        """
        rng = random.Random(self.seed)
        tones = {
            name: tuple(min(255, max(0, c + rng.randint(-JITTER, JITTER))) for c in rgb)
            for name, rgb in COLOURS.items()
        }
        side = SIZE * SUPERSAMPLING
        image, labels = Image.new("RGB", (side, side), tones[self.background]), Image.new("L", (side, side))
        draw, mark = ImageDraw.Draw(image), ImageDraw.Draw(labels)
        draw_pattern(draw, self.pattern, tones[self.background], side, rng.random())
        for thing in self.things:
            for patch in thing.patches():
                points = place(patch.polygon, thing.x, thing.y, thing.radius, thing.tilt, side)
                draw.polygon(points, fill=tones[patch.colour])
                mark.polygon(points, fill=LABELS.index(patch.part))
        small = (SIZE, SIZE)
        return Rendering(image.resize(small, Image.Resampling.BOX), labels.resize(small, Image.Resampling.NEAREST))
