"""What both kinds of control training have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ether_diffusion.control.encoder import ControlEncoder
from ether_diffusion.errors import InputError
from ether_diffusion.training import objectives
from ether_diffusion.training.adaptation import Adaptation, Attached
from ether_diffusion.training.card import CONTROL
from ether_diffusion.training.families import Blueprint, Family
from ether_diffusion.training.methods.configs import Method
from ether_diffusion.training.options import CONTROL_LEARNING_RATE, NO_METHOD, ControlTrainingOptions, parse_range


class ControlAdaptation(Adaptation[ControlTrainingOptions]):
    """What both kinds of control have in common: `control`, with a learning rate of its own, beside the method.

    Class attributes:
        control: name of the encoder or the ControlNet among the models.
        objective: what is minimised.
    """

    tags = ("controlnet",)
    second = objectives.CONTROL_IMAGE
    control: str
    objective: type[objectives.DenoisingObjective]

    def __init__(self, options: ControlTrainingOptions, method: Method, family: type[Family], blueprint: Blueprint):
        if options.data.streaming and family.is_flow and not options.adapter.train_text_encoder:
            raise InputError(
                f"--streaming: a {family.pipeline_class} encodes all prompts before the training, and a stream never "
                "tells all of them; drop it"
            )
        self.factor = blueprint.resolution_multiple
        self.interpolation = options.control.conditioning_interpolation
        self.value_range = parse_range(options.control.conditioning_range)
        self.path = options.control.controlnet_model_name_or_path
        self.given = f"--controlnet_model_name_or_path {self.path}"
        super().__init__(options, method, family, blueprint)

    @property
    def one_file(self) -> bool:
        """Whether one file holds all that was trained."""
        return self.method.layout == "ether" or self.method.name == NO_METHOD

    @property
    def folders(self) -> Collection[str]:
        return (self.control,)

    @property
    def default_learning_rate(self) -> float | None:
        return CONTROL_LEARNING_RATE if self.method.name == NO_METHOD else super().default_learning_rate

    def resolve(
        self, options: ControlTrainingOptions, accelerator: Accelerator, *, epoch_samples: int
    ) -> ControlTrainingOptions:
        optimization, control = options.optimization, options.control
        if optimization.optimizer == "prodigy" and control.control_lr != CONTROL_LEARNING_RATE:
            raise InputError(f"--control_lr: got {control.control_lr:g}, --optimizer prodigy takes one learning rate")
        if not self.configs and optimization.optimizer != "prodigy" and optimization.learning_rate is not None:
            raise InputError("--learning_rate: has no effect with --method none; use --control_lr")
        if optimization.scale_lr:
            rate = control.control_lr * optimization.samples_per_step(accelerator.num_processes)
            options = replace(options, control=replace(control, control_lr=rate))
        return super().resolve(options, accelerator, epoch_samples=epoch_samples)

    def modules_trained_as_they_are(self, control: nn.Module) -> list[nn.Module]:
        """What is trained besides the method."""
        return [control]

    def parameter_groups(self, attached: Attached, options: ControlTrainingOptions) -> list[dict[str, Any]]:
        """The method's parameters as in every run, and what else is trained, with a rate of its own."""
        rate = options.control.control_lr
        if options.optimization.optimizer == "prodigy":
            rate = options.optimization.learning_rate
        modules = self.modules_trained_as_they_are(attached.models[self.control])
        own = [each for module in modules for each in module.parameters() if each.requires_grad]
        groups = []
        if self.configs:
            # Where all weights of a ControlNet are trained, the method's are those that are left.
            taken = {id(each) for each in own}
            adapted = replace(attached, models={name: attached.models[name] for name in self.configs})
            for group in super().parameter_groups(adapted, options):
                groups.append({**group, "params": [each for each in group["params"] if id(each) not in taken]})
        return [*groups, {"params": own, "lr": rate, "name": "control"}]

    def showing(self, note: str = "") -> list[str]:
        """Lines of the card's code that read a control image; the note says more of it."""
        if self.value_range is not None:  # diffusers' own reader would clip the values at 255
            return [
                "from ether_diffusion.images import read_image",
                f"control = read_image({CONTROL}, value_range={self.value_range})  # the control image{note}",
            ]
        return [
            "from diffusers.utils import load_image",
            f"control = load_image({CONTROL})  # the control image{note}",
        ]

    def make_encoder(self, denoiser: nn.Module) -> ControlEncoder:
        """An encoder of images for this denoiser, its weights drawn from the global random numbers."""
        return ControlEncoder.for_denoiser(
            denoiser, factor=self.factor, interpolation=self.interpolation, value_range=self.value_range
        )


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Global random numbers from this seed, for what is made on the CPU; afterwards they go on as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
