"""What controlled generation is measured on: control images, the real images they were made from, and their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ether_diffusion.errors import InputError
from ether_diffusion.images import ValueRange, open_image, read_image
from ether_diffusion.miniature.control_data import HELD_OUT, draw_pair, read_label_image
from ether_diffusion.miniature.render import SIZE
from ether_diffusion.training.data.captions import read_metadata

COLUMNS = ("file_name", "conditioning_image", "text")
IGNORED = 255
"""The label of pixels that are not counted."""


@dataclass(frozen=True)
class Sample:
    """A control image, the real image it was made from, its caption; labels (h, w) int64 where they are known."""

    control: Image.Image
    real: Image.Image
    text: str
    labels: Tensor | None


def held_out(count: int, side: int) -> list[Sample]:
    """Scenes of the miniature's world that no training sees.

    Raises:
        InputError: the pipeline's images have other sides than the world's.
    """
    if side != SIZE:
        sides = f"its images have {SIZE} pixels a side, and those of --base {side}"
        raise InputError(f"--miniature: {sides}; use --data_dir")
    pairs = [draw_pair(HELD_OUT, k) for k in range(count)]
    return [Sample(pair.control, pair.image, pair.caption, _to_labels(pair.labels)) for pair in pairs]


def read_samples(
    folder: Path,
    side: int,
    *,
    most: int | None = None,
    reduce_labels: bool = False,
    labels_from_colours: bool = False,
    value_range: ValueRange | None = None,
) -> list[Sample]:
    """Read the images that a folder's metadata file names, cut to a square at their centre and scaled to `side`.

    Args:
        folder, side: of --data_dir, and of the pipeline's images in pixels.
        most: read only the first so many lines.
        reduce_labels: grey value 0 is no class and the classes start at 1, as in ADE20K.
        value_range: of control images, as `images.to_rgb` takes it.
        labels_from_colours: where a line has no labels, read them from the control image: a map of the miniature.

    Raises:
        InputError: no metadata file, a line that lacks a column, an image that cannot be read, or labels in some
            lines only.
    """
    index, rows = read_metadata(folder)
    if index is None:
        raise InputError(f"--data_dir {folder}: has no metadata.jsonl; it names the images, a line for each")
    if not rows:
        raise InputError(f"--data_dir {folder}: its {index.name} has no lines")
    samples = []
    for where, row in rows[:most]:
        _check_row(row, where)
        ranges = (None, value_range)
        real, control = (
            read_image(folder / row[name], row[name], values) for name, values in zip(COLUMNS[:2], ranges, strict=True)
        )
        labels = read_labels(folder / row["labels"], side, reduce_labels) if row.get("labels") else None
        if labels is None and labels_from_colours:
            try:
                labels = _to_labels(_fit(read_label_image(control), side))
            except ValueError as error:
                raise InputError(f"{where}: {row['conditioning_image']}: {error}") from error
        samples.append(Sample(_fit(control, side), _fit(real, side, Image.Resampling.LANCZOS), row["text"], labels))
    known = [sample.labels is not None for sample in samples]
    if any(known) and not all(known):
        odd = f"line {known.index(not known[0]) + 1} has {'no ' * known[0]}labels"
        raise InputError(f"{index}: {odd}; all or none need them")
    return samples


def _check_row(row: Mapping[str, Any], where: str) -> None:
    missing = [name for name in COLUMNS if not isinstance(row.get(name), str)]
    if missing:
        raise InputError(f"{where}: has no text under {', '.join(missing)}; needs {', '.join(COLUMNS)}")
    if not isinstance(row.get("labels", ""), str | None):
        raise InputError(f"{where}: got labels={row['labels']!r}, needs the path of an image")


def read_labels(path: Path, side: int, reduce: bool) -> Tensor:
    """Read an image whose grey values are indices of classes, as `side` × `side` labels; IGNORED is no class.

    Raises:
        InputError: a damaged image, or one that is not of one value for each pixel.
    """
    with open_image(path) as image:
        mode, indices = image.mode, np.asarray(image)  # of a palette the indices are the classes, not its colours
    if mode not in ("L", "P", "I", "I;16"):
        raise InputError(f"{path}: is {mode}, needs one grey value for each pixel: the index of its class")
    labels = _to_labels(_fit(Image.fromarray(indices.astype(np.int32)), side))
    return torch.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1) if reduce else labels


def _to_labels(indices: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(indices).astype(np.int64))


def _fit(image: Image.Image, side: int, resample: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), resample)
