"""Folders of images and label maps, as control training reads them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=np.uint8)


def label_map(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blocks of a few colours."""
    blocks = np.random.default_rng(seed).integers(len(COLOURS), size=(-(-height // 5), -(-width // 5)))
    return Image.fromarray(COLOURS[blocks.repeat(5, 0).repeat(5, 1)[:height, :width]])


def write(folder: Path, sizes=((40, 30), (30, 40), (64, 64), (36, 30)), map_scale: int = 1) -> Path:
    (folder / "maps").mkdir(parents=True)
    rows = []
    for k, (width, height) in enumerate(sizes):
        label_map(width, height, k).save(folder / f"{k}.png")
        label_map(width * map_scale, height * map_scale, k).save(folder / "maps" / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "conditioning_image": f"maps/{k}.png", "text": f"image {k}"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder
