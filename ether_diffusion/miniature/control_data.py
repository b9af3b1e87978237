"""Pairs of an image and a control image from the miniature's world, as folders that control training reads.

A folder holds `000000.png` and so on, control images in `control/`, and `metadata.jsonl`: for each image a line
with file_name, conditioning_image and text, and, for scenes, labels: the path of its map of classes.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ether_diffusion.miniature.render import COLOURS, SIZE, SUPERSAMPLING, label_image
from ether_diffusion.miniature.shapes import LABELS
from ether_diffusion.miniature.world import article, draw_scene

KINDS = ("scenes", "circles")
TRAINING_SEED, HELD_OUT = "control training", "control held out"
"""The seeds of the scenes that control is trained on, and of those that it is measured on."""


@dataclass(frozen=True)
class ControlPair:
    """`image`, `control`: RGB, SIZE × SIZE. `labels`: mode L, indices into `shapes.LABELS`; None for circles."""

    image: Image.Image
    control: Image.Image
    caption: str
    labels: Image.Image | None = None


def draw_pair(seed: str | int, index: int, kind: str = "scenes") -> ControlPair:
    """Pair `index` of a seed, the same everywhere.

    kind: "scenes": a scene of the world and its semantic map, as colours; "circles": one to three filled circles on a
        plain background, and their outlines, white on black.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, needs one of {', '.join(KINDS)}")
    if kind == "circles":
        return _draw_circles(random.Random(f"circles/{seed}/{index}"))
    scene = draw_scene(seed, index)
    image, labels = scene.render()
    return ControlPair(image, label_image(labels), scene.caption, labels)


def _draw_circles(rng: random.Random) -> ControlPair:
    background, *colours = rng.sample(list(COLOURS), 1 + rng.choice((1, 1, 2, 3)))
    side = SIZE * SUPERSAMPLING
    image, mask = Image.new("RGB", (side, side), COLOURS[background]), Image.new("L", (SIZE, SIZE))
    draw, outline = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    for k, colour in enumerate(colours):
        width = 1 / len(colours)  # circles stand side by side, so that none is hidden
        radius = rng.uniform(0.28, 0.46) * min(width, 0.8)
        x = (k + 0.5) * width + rng.uniform(-1, 1) * (0.48 * width - radius)
        y = rng.uniform(radius + 0.04, 0.96 - radius)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse([side * edge for edge in box], fill=COLOURS[colour])
        outline.ellipse([SIZE * edge - 0.5 for edge in box], outline=255)
    words = [f"{article(colour)} circle" for colour in colours]
    circles = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    caption = f"{circles} on {article(background)} background"
    return ControlPair(image.resize((SIZE, SIZE), Image.Resampling.BOX), mask.convert("RGB"), caption)


def class_colours() -> dict[str, str]:
    """The classes of scenes and their colours in a semantic map, the background first."""
    return {
        name: f"#{red:02x}{green:02x}{blue:02x}" for name, (red, green, blue) in zip(LABELS, _palette(), strict=True)
    }


def _palette() -> list[tuple[int, int, int]]:
    every_class = Image.fromarray(np.arange(len(LABELS), dtype=np.uint8)[None])
    return [tuple(rgb) for rgb in np.asarray(label_image(every_class))[0].tolist()]


def read_label_image(control: Image.Image) -> Image.Image:
    """The map of classes, mode L, that `label_image` showed as colours.

    Raises:
        ValueError: a colour that stands for no class.
    """
    palette = np.asarray(_palette())  # (k, 3)
    colours = np.asarray(control.convert("RGB"))  # (h, w, 3)
    is_class = (colours[:, :, None] == palette).all(-1)  # (h, w, k)
    if len(strange := colours[~is_class.any(-1)]):
        raise ValueError(f"#{strange[0].tobytes().hex()} is the colour of no class of the miniature's maps")
    return Image.fromarray(is_class.argmax(-1).astype(np.uint8))


def write_control_data(folder: str | Path, count: int, seed: str | int, kind: str = "scenes") -> Path:
    """Write pairs 0 to count − 1 of a seed to a folder, in the layout of this module; returns the folder.

    Raises:
        ValueError: an unknown kind, or a count below 1.
        FileExistsError: the folder has data already.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, needs a whole number from 1")
    folder = Path(folder)
    if (folder / "metadata.jsonl").exists():
        raise FileExistsError(f"{folder}: holds a metadata.jsonl already; name another folder")
    lines = []
    for index in range(count):
        pair, name = draw_pair(seed, index, kind), f"{index:06}.png"
        parts = {"file_name": (name, pair.image), "conditioning_image": (f"control/{name}", pair.control)}
        if pair.labels is not None:
            parts["labels"] = (f"labels/{name}", pair.labels)
        for path, shown in parts.values():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shown.save(folder / path)
        lines.append(json.dumps({key: path for key, (path, _) in parts.items()} | {"text": pair.caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
