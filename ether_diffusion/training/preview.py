"""Sample images: base and tuned model side by side, from the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.images import image_grid
from ether_diffusion.training.families import Family
from ether_diffusion.training.options.groups import ValidationOptions
from ether_diffusion.training.trackers import log_images


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


class Preview:
    """Images of base and tuned model from the same seeds: for every prompt a row of the one above one of the other.

    The base is generated when this is made, so make it before anything is added to the pipeline.

    Args:
        family: the pipeline's family.
        prompts: one pair of rows each.
        options: images per prompt, steps, guidance.
        seed: of the first image of each row.
    """

    def __init__(self, family: Family, prompts: Sequence[str], options: ValidationOptions, seed: int):
        self.family, self.prompts, self.options, self.seed = family, list(prompts), options, seed
        self.base = self._generate()

    def compare(self) -> Image.Image:
        """The grid, with the model as it is now."""
        rows: list[tuple[str, list[Image.Image]]] = []
        for prompt, before, after in zip(self.prompts, self.base, self._generate(), strict=True):
            rows += [(f"base: {prompt}", before), (f"tuned: {prompt}", after)]
        return image_grid(rows)

    def report(self, accelerator: Accelerator, path: Path, step: int) -> None:
        """Save the grid, and send it to the trackers."""
        grid = self.compare()
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        log_images(accelerator, "validation", [grid], step)

    def _generate(self) -> list[list[Image.Image]]:
        """The images of every prompt, by the model as it is."""
        with self.family.on_device(*self.family.modules()):
            return [generate(self.family.pipe, prompt, self.options, self.seed) for prompt in self.prompts]


def is_due(options: ValidationOptions, *, epoch_samples: int, step_samples: int, steps: int) -> Callable[[int], bool]:
    """Whether to generate after a step of the training, by --validation_steps or --validation_epochs.

    Args:
        options: how often.
        epoch_samples: images in an epoch.
        step_samples: images that one step sees.
        steps: in all; the last one is generated in any case, when the training is over.
    """
    if options.validation_steps is not None:
        period, unit = options.validation_steps, 1
    elif options.validation_epochs is not None:
        period, unit = options.validation_epochs * epoch_samples, step_samples
    else:
        return lambda step: False
    return lambda step: step < steps and step * unit // period > (step - 1) * unit // period
