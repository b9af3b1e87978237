"""Sample images of control training: control image, base model, and what the control makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from PIL import Image
from torch import nn

from ether_diffusion.images import image_grid
from ether_diffusion.training.control_objectives import CONTROLNET
from ether_diffusion.training.families import Family
from ether_diffusion.training.options.control import ControlValidationOptions
from ether_diffusion.training.preview import Preview, generate


class ControlPreview(Preview):
    """For every pair of control image and prompt: the control image, the base model, and the controlled one.

    Args:
        pairs: (control image, prompt) of each row.
        family, options, seed: as for `Preview`.

    Attributes:
        pipe: the pipeline with the control, once there is one.
        precision: in which a ControlNet computes, whose frozen weights have it and whose trained ones are in float32.
    """

    precision: torch.dtype = torch.float32

    def __init__(
        self, family: Family, pairs: Sequence[tuple[Image.Image, str]], options: ControlValidationOptions, seed: int
    ):
        self.pairs, self.pipe = list(pairs), None
        super().__init__(family, [prompt for _, prompt in pairs], options, seed)

    def compare(self) -> Image.Image:
        rows: list[tuple[str, list[Image.Image]]] = []
        for (control, prompt), before, after in zip(self.pairs, self.base, self._generate(), strict=True):
            rows += [("control", [control]), (f"base: {prompt}", before), (f"controlled: {prompt}", after)]
        return image_grid(rows)

    def _generate(self) -> list[list[Image.Image]]:
        controlnet = getattr(self.pipe, CONTROLNET, None)
        with (
            self.family.on_device(*self.family.modules()),
            nullcontext() if controlnet is None else computing_in(controlnet, self.precision),
        ):
            return [self._generate_pair(control, prompt) for control, prompt in self.pairs]

    def _generate_pair(self, control: Image.Image, prompt: str) -> list[Image.Image]:
        inputs = {"width": control.width, "height": control.height}
        if self.pipe is not None:
            inputs["image" if hasattr(self.pipe, "controlnet") else "control_image"] = control
        return generate(self.pipe or self.family.pipe, prompt, self.options, self.seed, **inputs)


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model's calls in this precision, whatever that of its weights; float32 leaves them as they are.

    Of this model alone: the autoencoder of SDXL, for one, overflows in float16.
    """
    if dtype == torch.float32:
        yield
        return
    device = next(model.parameters()).device
    model.forward = torch.autocast(device.type, dtype)(model.forward)
    try:
        yield
    finally:
        del model.forward
