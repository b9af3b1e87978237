"""The geometry of the miniature's world: every thing is a stack of coloured polygons in unit coordinates.

Coordinates: x to the right, y down, the thing fits the unit circle around (0, 0). Later patches cover earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

Polygon = tuple[tuple[float, float], ...]


class Patch(NamedTuple):
    """One filled polygon: `part` names what it belongs to in semantic maps and captions."""

    polygon: Polygon
    colour: str
    part: str


def ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 360.0) -> Polygon:
    """An elliptic arc from `start` to `stop` degrees (0 is right, 90 is down), closed to a polygon."""
    steps = max(8, int(abs(stop - start) / 9))
    angles = (math.radians(start + (stop - start) * k / steps) for k in range(steps + 1))
    return tuple((cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles)


def box(cx: float, cy: float, rx: float, ry: float) -> Polygon:
    return ((cx - rx, cy - ry), (cx + rx, cy - ry), (cx + rx, cy + ry), (cx - rx, cy + ry))


def mirrored(polygon: Polygon) -> Polygon:
    return tuple((-x, y) for x, y in polygon)


def _rays(count: int, outer: float, inner: float) -> Polygon:
    """A star with `count` rays, the first pointing up."""
    turn = math.pi / count
    radii = (outer, inner)
    return tuple((radii[k % 2] * math.sin(k * turn), -radii[k % 2] * math.cos(k * turn)) for k in range(2 * count))


def _heart() -> Polygon:
    points = []
    for k in range(48):
        t = 2 * math.pi * k / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -y / 17 - 0.05))
    return tuple(points)


SHAPES: dict[str, Polygon] = {
    "circle": ellipse(0, 0, 0.9, 0.9),
    "square": box(0, 0, 0.78, 0.78),
    "triangle": ((0, -0.95), (0.95, 0.75), (-0.95, 0.75)),
    "star": _rays(5, 1.05, 0.44),
    "heart": _heart(),
    "cross": (
        (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
        (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
    ),
    "ring": ellipse(0, 0, 0.95, 0.95) + tuple(reversed(ellipse(0, 0, 0.5, 0.5))),
    "moon": ellipse(-0.1, 0, 1.0, 1.0, 60, 300) + ellipse(0.42, 0, 0.87, 0.87, 266, 94),
    "diamond": ((0, -1.0), (0.62, 0), (0, 1.0), (-0.62, 0)),
    "arrow": ((-0.95, -0.28), (0.1, -0.28), (0.1, -0.8), (0.98, 0), (0.1, 0.8), (0.1, 0.28), (-0.95, 0.28)),
}  # fmt: skip


class FigureClass(NamedTuple):
    """A class of figures: coloured parts, the neighbour each must differ from, styles, and how it is assembled."""

    parts: dict[str, str]
    styles: dict[str, int]
    build: Callable[[dict[str, str], dict[str, int]], list[Patch]]


def _toy(colour: dict[str, str], style: dict[str, int]) -> list[Patch]:
    ear = (
        ellipse(-0.36, -0.84, 0.2, 0.2),
        ((-0.52, -0.5), (-0.46, -1.06), (-0.1, -0.74)),
        ellipse(-0.26, -0.88, 0.12, 0.32),
    )[style["ears"]]
    body = (
        ellipse(0, 0.32, 0.46, 0.48),
        box(0, 0.3, 0.42, 0.44),
        ((-0.28, -0.16), (0.28, -0.16), (0.54, 0.8), (-0.54, 0.8)),
    )
    head = (ellipse(0, -0.44, 0.42, 0.38), box(0, -0.44, 0.38, 0.33))[style["head"]]
    arm = (ellipse(-0.58, 0.16, 0.22, 0.13), ellipse(-0.5, 0.3, 0.13, 0.28), ellipse(-0.56, -0.04, 0.14, 0.24))[
        style["limbs"]
    ]
    leg = ellipse(-0.26, 0.84, 0.19, 0.15)
    patches = [Patch(p, colour["ears"], "ears") for p in (ear, mirrored(ear))]
    patches += [Patch(p, colour["limbs"], "limbs") for p in (arm, mirrored(arm), leg, mirrored(leg))]
    patches += [
        Patch(body[style["body"]], colour["body"], "body"),
        Patch(ellipse(0, 0.36, 0.22, 0.26), colour["belly"], "belly"),
        Patch(head, colour["head"], "head"),
    ]
    eye = ellipse(-0.16, -0.5, 0.07, 0.08)
    patches += [Patch(p, "black", "eyes") for p in (eye, mirrored(eye), ellipse(0, -0.3, 0.09, 0.06))]
    return patches


def _face(colour: dict[str, str], style: dict[str, int]) -> list[Patch]:
    head = (ellipse(0, 0.1, 0.66, 0.74), box(0, 0.1, 0.6, 0.7), ellipse(0, 0.14, 0.76, 0.64))[style["head"]]
    spikes = ((-0.74, 0.0), (-0.8, -0.74), (-0.46, -0.42), (-0.26, -0.86))
    hair = (
        ellipse(0, -0.16, 0.76, 0.62, 180, 360),
        (*spikes, (0, -0.46), *reversed(mirrored(spikes))),
        box(-0.68, 0.2, 0.16, 0.62),
    )
    mouth = (ellipse(0, 0.46, 0.3, 0.2, 0, 180), box(0, 0.54, 0.28, 0.07), ellipse(0, 0.54, 0.15, 0.15))[
        style["mouth"]
    ]
    hat = (
        (box(0, -0.5, 0.72, 0.09), box(0, -0.78, 0.4, 0.28)),
        (((-0.6, -0.42), (0, -1.12), (0.6, -0.42)),),
        (ellipse(0, -0.44, 0.62, 0.44, 180, 360), box(0.4, -0.46, 0.46, 0.08)),
    )[style["hat"]]
    eye = (ellipse(-0.26, 0.02, 0.12, 0.13), box(-0.26, 0.02, 0.1, 0.1))[style["eyes"]]
    patches = []
    if style["hair"] == 2:  # long hair hangs behind the head
        patches += [Patch(p, colour["hair"], "hair") for p in (hair[2], mirrored(hair[2]), hair[0])]
        patches.append(Patch(head, colour["head"], "head"))
    else:
        patches += [Patch(head, colour["head"], "head"), Patch(hair[style["hair"]], colour["hair"], "hair")]
        patches.append(Patch(ellipse(0, 0.12, 0.5, 0.42), colour["head"], "head"))
    patches += [Patch(p, colour["hat"], "hat") for p in hat]
    patches += [Patch(p, colour["eyes"], "eyes") for p in (eye, mirrored(eye))]
    patches.append(Patch(mouth, colour["mouth"], "mouth"))
    return patches


def _house(colour: dict[str, str], style: dict[str, int]) -> list[Patch]:
    wide, tall = ((0.66, 0.5), (0.5, 0.56), (0.8, 0.44))[style["walls"]]
    top, bottom = 0.9 - 2 * tall, 0.9
    roof = (
        ((-wide - 0.14, top), (0, top - 0.7), (wide + 0.14, top)),
        ((-wide - 0.1, top), (-wide * 0.55, top - 0.46), (wide * 0.55, top - 0.46), (wide + 0.1, top)),
        ellipse(0, top, wide + 0.08, 0.6, 180, 360),
    )[style["roof"]]
    side = (-1, 1)[style["door"]]
    door = box(side * wide * 0.5, bottom - 0.27, 0.15, 0.27)
    middle = top + tall * 0.75
    window = (box(-side * wide * 0.45, middle, 0.17, 0.17), ellipse(-side * wide * 0.45, middle, 0.19, 0.19))[
        style["windows"]
    ]
    chimney = box((0.42, -0.42)[style["chimney"]] * wide, top - 0.42, 0.1, 0.34)
    return [
        Patch(chimney, colour["chimney"], "chimney"),
        Patch(box(0, (top + bottom) / 2, wide, tall), colour["walls"], "walls"),
        Patch(roof, colour["roof"], "roof"),
        Patch(door, colour["door"], "door"),
        Patch(window, colour["windows"], "windows"),
    ]


FIGURES: dict[str, FigureClass] = {
    "toy": FigureClass(
        {"body": "", "head": "body", "ears": "head", "belly": "body", "limbs": "body"},
        {"ears": 3, "head": 2, "body": 3, "limbs": 3},
        _toy,
    ),
    "face": FigureClass(
        {"head": "", "hair": "head", "hat": "hair", "eyes": "head", "mouth": "head"},
        {"head": 3, "hair": 3, "mouth": 3, "hat": 3, "eyes": 2},
        _face,
    ),
    "house": FigureClass(
        {"walls": "", "roof": "walls", "door": "walls", "windows": "walls", "chimney": "roof"},
        {"walls": 3, "roof": 3, "door": 2, "windows": 2, "chimney": 2},
        _house,
    ),
}

LABELS: tuple[str, ...] = (
    "background",
    *SHAPES,
    *(f"{name} {part}" for name, figure in FIGURES.items() for part in figure.parts),
    "toy eyes",
)
"""Classes of the semantic maps; the value of a pixel is the index in this tuple."""
