"""What the comparisons of methods learn, and how: a subject is a folder of images."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.base_models import base_path, miniature_name
from ether_diffusion.files import checksum
from ether_diffusion.images import find_images, read_image
from ether_diffusion.miniature import world
from ether_diffusion.training import dreambooth
from ether_diffusion.training.data.views import center_cut
from ether_diffusion.training.loop import TrainingResult
from ether_diffusion.training.options import ValidationOptions

MINIATURE, PHOTOGRAPHS = "miniature", "photographs"

# Prompts without a subject, for models of the whole world; our own.
PROMPTS_WITHOUT = (
    "a photo of a mountain lake", "a photo of a crowded street in the rain", "a bowl of fruit on a wooden table",
    "an oil painting of a harbour", "a portrait of an old man", "a photo of a red bicycle", "a house in the snow",
    "a field of sunflowers",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A folder of images of one thing; the last of them is held out, the others are learned from.

    origin: whose world it is of, MINIATURE or PHOTOGRAPHS.
    """

    name: str
    class_name: str
    origin: str
    folder: Path

    @property
    def prompt(self) -> str:
        return f"a photo of sks {self.class_name}"

    @property
    def seen(self) -> list[Path]:
        return find_images(self.folder)[:-1]

    @property
    def held_out(self) -> Path:
        return find_images(self.folder)[-1]

    def copy_seen(self, folder: Path) -> Path:
        """The images to learn from, alone in a folder."""
        folder.mkdir(parents=True)
        for path in self.seen:
            shutil.copy(path, folder)
        return folder


def add_base(parser: argparse.ArgumentParser) -> None:
    """The flag that names the model which is trained; `pretrained_model_name_or_path` of the arguments."""
    parser.add_argument(
        "--base",
        "--pretrained_model_name_or_path",
        dest="pretrained_model_name_or_path",
        default=MINIATURE,
        help="miniature, miniature-dit, or any pipeline: a folder or an id on the Hub. Default: %(default)s",
    )


def base_settings(model: str) -> dict[str, str]:
    """Which weights of a miniature the rows of a result file are of; nothing of other models."""
    return {"weights_sha256": checksum(Path(base_path(model)))} if miniature_name(model) else {}


def photographed(data_dir: Path) -> list[Subject]:
    """One subject for every folder of photographs; the folder's name is that of the class.

    Raises:
        SystemExit: a folder with fewer than two photographs, or none at all.
    """
    folders = sorted(path for path in data_dir.iterdir() if path.is_dir()) if data_dir.is_dir() else []
    if not folders:
        raise SystemExit(f"error: --data_dir {data_dir}: needs a folder with one folder of photographs per subject")
    if lacking := next((each for each in folders if len(find_images(each, "--data_dir")) < 2), None):
        raise SystemExit(f"error: --data_dir {lacking}: holds one photograph, needs one to learn and one to hold out")
    return [Subject(each.name, each.name.replace("_", " "), PHOTOGRAPHS, each) for each in folders]


def drawn(count: int, folder: Path) -> Iterator[Subject]:
    """Subjects of the miniature's world, spread over its classes; their views are drawn into folders in `folder`."""
    everyone = world.subjects()
    for subject in everyone[:: max(1, len(everyone) // max(count, 1))][:count]:
        own = folder / subject.name
        own.mkdir(parents=True, exist_ok=True)
        for k in range(world.VIEWS):
            subject.view(k).render().image.save(own / f"{k}.png")
        yield Subject(subject.name, subject.class_name, MINIATURE, own)


def squares(subject: Subject, size: tuple[int, int]) -> list[Image.Image]:
    """The images that the subject is learned from, as the model sees them: cut to a size in pixels."""
    return [center_cut(read_image(path), size) for path in subject.seen]


def learn(
    folder: Path, prompt: str, output_dir: Path, flags: Mapping[str, Any], words: Sequence[str] = ()
) -> TrainingResult:
    """Train on a folder of images by the DreamBooth training's own `main`, in this process and without previews.

    flags: more flags and their values. words: what else stands on the command line.
    """
    usual = {"instance_data_dir": folder, "instance_prompt": prompt, "output_dir": output_dir}
    named = {**usual, "num_validation_images": 0, **flags}
    given = [str(word) for name, value in named.items() for word in (f"--{name}", value)]
    return dreambooth.main([*given, "--overwrite_output_dir", *words])  # a benchmark's folder is its own


@torch.no_grad()
def generate(
    pipe: DiffusionPipeline, prompt: str, options: ValidationOptions, seed: int, **inputs: Any
) -> list[Image.Image]:
    """`num_validation_images` images of a prompt, from the seeds `seed`, `seed + 1`, …

    inputs: more that the pipeline is called with.
    """
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        # One at a time: large images side by side need more memory than the training did.
        return [
            pipe(
                prompt,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                generator=torch.Generator().manual_seed(seed + k),
                **inputs,
            ).images[0]
            for k in range(options.num_validation_images)
        ]
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **quiet})
