"""The benchmark's images with their prompts, and which of them are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import InputError
from ether_diffusion.images import find_images, read_image, to_pixels
from ether_diffusion.training.data.captions import captions_in
from ether_diffusion.training.data.data_sets import IMAGE_COLUMN, content_of, open_data_set
from ether_diffusion.training.data.examples import ImageSource
from ether_diffusion.training.options import InstanceDataOptions
from peft_image_gen.settings import PROMPTS

VALIDATED, TESTED = 2, 4


@dataclass(frozen=True)
class Example:
    image: Image.Image
    prompt: str

    def pixels(self, side: int) -> Tensor:
        """The whole image as a square, its aspect ratio given up as the benchmark does: (3, side, side), −1 to 1."""
        return to_pixels(self.image.resize((side, side), Image.Resampling.BILINEAR))


def read_folder(folder: Path) -> list[Example]:
    """The images of a folder in the order of their names, with their captions; without any, with the benchmark's.

    Raises:
        InputError: no images, captions of a part of them, or neither captions nor the benchmark's number of images.
    """
    paths = find_images(folder, "--data_dir")
    captions = captions_in(folder, paths, None, "--data_dir")
    if captions:
        if missing := [path.name for path in paths if path.name not in captions]:
            raise InputError(f"--data_dir {folder}: {missing[0]} has no caption, others have one; give each its own")
        prompts: Sequence[str] = [captions[path.name] for path in paths]
    else:
        prompts = _own_prompts(len(paths), f"--data_dir {folder}")
    return [Example(read_image(path), prompt) for path, prompt in zip(paths, prompts, strict=True)]


def read_data_set(name: str) -> list[Example]:
    """The images of a data set, on the Hub or in a folder, with the benchmark's prompts.

    Raises:
        InputError: it cannot be loaded, has no column "image", or another number of rows.
    """
    options: Any = InstanceDataOptions(instance_prompt=PROMPTS[0], dataset_name=name)
    rows = open_data_set(options, "dataset_name", images=("image_column",))
    prompts = _own_prompts(len(rows), f"--dataset_name {name}")
    folder = Path(name) if Path(name).is_dir() else None
    sources = [
        ImageSource(f"--dataset_name {name}, row {k}", lambda row=row: content_of(row, IMAGE_COLUMN, folder))
        for k, row in enumerate(rows)
    ]
    return [Example(source.read(), prompt) for source, prompt in zip(sources, prompts, strict=True)]


def _own_prompts(count: int, where: str) -> Sequence[str]:
    if count != len(PROMPTS):
        raise InputError(
            f"{where}: has {count} images without captions; the benchmark's prompts are for {len(PROMPTS)}"
        )
    return PROMPTS


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Those to train on and those to test with; two between them, on which the benchmark validates, stay out.

    Raises:
        InputError: nothing would be left to train on.
    """
    order = np.arange(len(examples))
    np.random.RandomState(0).shuffle(order)
    trained = len(order) - VALIDATED - TESTED
    if trained < 1:
        raise InputError(f"got {len(order)} images, needs {1 + VALIDATED + TESTED}")
    chosen = [examples[k] for k in order]
    return chosen[:trained], chosen[trained + VALIDATED :]
