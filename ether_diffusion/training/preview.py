"""Sample images: base and tuned model side by side, from the same seeds."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image

from ether_diffusion.errors import InputError
from ether_diffusion.images import image_grid
from ether_diffusion.training.data.views import Target
from ether_diffusion.training.families import Family, ModelSource
from ether_diffusion.training.memory import is_out_of_memory
from ether_diffusion.training.options import SEEDS, ValidationOptions
from ether_diffusion.training.trackers import log_images

logger = logging.getLogger(__name__)


@contextmanager
def without_memory_a_warning() -> Iterator[None]:
    """A context whose work is given up with a warning where the memory is not enough: images are worth no run."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning(
            "no sample images: the memory is not enough (%s); --vae_tiling, --offload or a smaller --resolution need "
            "less. The run goes on.",
            error,
        )
        clear_device_cache(garbage_collection=True)


def sampling_scheduler(own: SchedulerMixin, options: ValidationOptions) -> SchedulerMixin:
    """The scheduler that images are generated with: the one asked for, with the noise schedule of the pipeline's own.

    Raises:
        InputError: it does not take so many steps.
    """
    if options.num_validation_images == 0:
        return own
    name = options.validation_scheduler or type(own).__name__
    scheduler = getattr(diffusers, name, type(own)).from_config(own.config)
    try:
        shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}  # of any size of image
        scheduler.set_timesteps(options.num_inference_steps, **shift)
    except Exception as error:  # of many kinds, as configs and numbers of steps are
        raise InputError(
            f"--num_inference_steps {options.num_inference_steps}: the {name} does not take so many ({error}); try "
            "from 4 to 1000, or another --validation_scheduler"
        ) from error
    return scheduler


def check_sampling(source: ModelSource, options: ValidationOptions) -> None:
    """Make sure, before weights are read, that the pipeline's scheduler can do what is asked of it.

    Raises:
        InputError: it cannot, or its config cannot be read.
    """
    with source.reading():
        kind = getattr(diffusers, source.config()["scheduler"][1])
        own = kind.from_config(source.config("scheduler", kind))
    sampling_scheduler(own, options)


class Preview:
    """Images of base and tuned model from the same seeds: for every prompt a row of the one above one of the other.

    The base is generated when this is made, so make it before anything is added to the pipeline.

    Args:
        family: the pipeline's family.
        prompts: one pair of rows each.
        options: images per prompt, steps, guidance.
        seed: of the first image of each row; the next has the next seed.
        target: (height, width) of training images.
        reference: image that all are edited from, which the pipeline takes.
        controls: control image of each prompt, which gets a row of its own; without them, control is not trained.
    """

    def __init__(
        self,
        family: Family,
        prompts: Sequence[str],
        options: ValidationOptions,
        seed: int,
        controls: Sequence[Image.Image] | None = None,
        *,
        target: Target,
        reference: Image.Image | None = None,
    ):
        self.family, self.prompts, self.options, self.seed = family, list(prompts), options, seed
        self.controls, self.inputs = controls, family.size_inputs(target)
        if reference is not None:
            self.inputs["image"] = reference
        self.base = self._generate(family.pipe)

    def compare(self, pipe: DiffusionPipeline | None = None) -> Image.Image:
        """The grid, with the model as it is now.

        pipe: generates in place of the family's pipeline; takes the control images.
        """
        rows: list[tuple[str, list[Image.Image]]] = []
        tuned = self._generate(pipe or self.family.pipe, controlled=self.controls is not None)
        for k, prompt in enumerate(self.prompts):
            if self.controls is not None:
                rows.append(("control", [self.controls[k]]))
            elif "image" in self.inputs:
                rows.append(("reference", [self.inputs["image"]]))
            name = "tuned" if self.controls is None else "controlled"
            rows += [(f"base: {prompt}", self.base[k]), (f"{name}: {prompt}", tuned[k])]
        return image_grid(rows)

    def report(self, accelerator: Accelerator, path: Path, step: int, pipe: DiffusionPipeline | None = None) -> None:
        """Save the grid, and send it to the trackers. Every process that generates calls it; the first one writes."""
        grid = self.compare(pipe)
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)
            log_images(accelerator, "validation", [grid], step)

    @torch.no_grad()
    def _generate(self, pipe: DiffusionPipeline, *, controlled: bool = False) -> list[list[Image.Image]]:
        """The images of every prompt, by the model as it is, under the control images or not."""
        quiet, scheduler = dict(getattr(pipe, "_progress_bar_config", {})), pipe.scheduler
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = sampling_scheduler(scheduler, self.options)
        numbers = range(self.options.num_validation_images)
        try:
            # One at a time: large images side by side need more memory than the training did.
            with self.family.on_device(*self.family.modules()):
                return [
                    [self._image(pipe, row, number, controlled) for number in numbers]
                    for row in range(len(self.prompts))
                ]
        finally:
            pipe.scheduler = scheduler
            pipe.set_progress_bar_config(**{"disable": False, **quiet})

    def _image(self, pipe: DiffusionPipeline, row: int, number: int, controlled: bool) -> Image.Image:
        inputs: dict[str, Any] = dict(self.inputs)
        if self.controls is not None:
            control = self.controls[row]
            size = {"width": control.width, "height": control.height}
            inputs = {**self.family.size_inputs((control.height, control.width)), **size}
            if controlled:
                taken = inspect.signature(pipe.__call__).parameters
                inputs["control_image" if "control_image" in taken else "image"] = control
        return self.family.generate(
            [self.prompts[row]],
            pipe=pipe,
            num_inference_steps=self.options.num_inference_steps,
            guidance_scale=self.options.guidance_scale,
            generator=torch.Generator().manual_seed((self.seed + number) % SEEDS),
            **inputs,
        ).images[0]


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
