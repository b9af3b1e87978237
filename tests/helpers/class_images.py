"""Class images in small: the options that ask for them, images of the user's own, and what a folder holds."""

import weakref
from pathlib import Path

import numpy as np
from PIL import Image

from ether_diffusion.training.families import StableDiffusion
from ether_diffusion.training.options import PriorOptions

PROMPT, SEED, STEPS = "a photo of a dog", 3, 2
PRIOR = ["--with_prior_preservation", "--class_prompt", "a photo of a toy", "--num_class_images", 2]
"""Flags of a run with class images."""


class Watched(StableDiffusion):
    """The real family, which notes what it has loaded; `prepare` may change the pipeline first."""

    prepare = staticmethod(lambda pipe: None)

    @classmethod
    def load(cls, source, dtype):
        family = super().load(source, dtype)
        cls.prepare(family.pipe)
        unet, parameter = family.pipe.unet, next(family.pipe.unet.parameters())
        cls.loaded.append(
            (dtype, {each.dtype for each in unet.parameters()}, weakref.ref(unet), weakref.ref(parameter))
        )
        return family


def prior(folder, number=5, **options) -> PriorOptions:
    return PriorOptions(
        with_prior_preservation=True,
        class_data_dir=str(folder),
        num_class_images=number,
        **{"class_prompt": PROMPT, **options},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    """Grey levels, signed."""
    return np.asarray(Image.open(path), dtype=np.int16)


def put(folder: Path, *files: str) -> dict[str, bytes]:
    """Images of the user's own."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(files):
        Image.new("RGB", (20, 12), (40 * k, 80, 120)).save(folder / name)
    return {name: (folder / name).read_bytes() for name in files}
