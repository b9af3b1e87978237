"""What training needs to know about one kind of pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ether_diffusion.training.data.views import Framing
from ether_diffusion.training.options import PerformanceOptions
from ether_diffusion.tuner.attention import enable_ether_attention

Conditioning = Mapping[str, Tensor]
"""What the denoiser is told besides latents and timesteps, under names of the family's own; a row for each sample."""


class Family:
    """One kind of pipeline, as training sees it. Shapes: pixels (3, h, w), latents (b, c, h', w'), timesteps (b,).

    What is here holds for every pipeline. A family adds, as `UNetFamily` does for all with a UNet:

    - `read_blueprint(source)`: the pipeline without weights, refused where training does not cover it; `load(source,
      dtype)`: the pipeline with its weights; `native_resolution`, `timestep_count`;
    - `encode_prompts(prompts)`: their conditioning, and `encode_framings` if the denoiser is told sizes and crops;
    - `encode_pixels(pixels)`, `make_latents(moments, generator)`: an image as a distribution, and a draw from it;
    - `draw_timestep(generator)`, `add_noise(latents, noise, timesteps)`, `target(latents, noise, timesteps)`,
      `min_snr_weights(timesteps, gamma)`: how noise is added and what is to be predicted;
    - `predict(noisy, timesteps, conditioning)`: what the denoiser answers, in the shape of the latents.

    Class attributes:
        pipeline_class: the pipeline that it covers.
        denoiser: name of the component that removes noise.
        text_encoders: the components that encode prompts, name -> class.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser: ClassVar[str]
    text_encoders: ClassVar[Mapping[str, type[nn.Module]]]

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.device = self.component(self.denoiser).device
        self._offloaded: set[str] = set()

    def encode_framings(self, framings: Sequence[Framing]) -> Conditioning:
        """What the denoiser is told of size and crop, one row per view; nothing unless the family says otherwise."""
        return {}

    def component(self, name: str) -> nn.Module:
        return getattr(self.pipe, name)

    def modules(self) -> dict[str, nn.Module]:
        """The components that have weights."""
        return {name: each for name, each in self.pipe.components.items() if isinstance(each, nn.Module)}

    def freeze(self, device: torch.device, offloaded: Sequence[str] = ()) -> None:
        """All components to the device, in evaluation mode and without gradients.

        offloaded: those that stay in the CPU's memory except where `on_device` brings them in.
        """
        self.device = device
        self._offloaded = set(offloaded)
        for name, component in self.modules().items():
            component.to("cpu" if name in self._offloaded else device)
            component.eval().requires_grad_(False)

    def offload(self, *names: str) -> None:
        """Take components off the device; `on_device` brings them in."""
        self._offloaded |= set(names)
        for name in names:
            self.component(name).to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """A context with components on the device; on leaving, those that were offloaded are so again."""
        visitors = [name for name in names if name in self._offloaded]
        self._offloaded -= set(visitors)
        try:
            for name in visitors:
                self.component(name).to(self.device)
            yield
        finally:
            if visitors:
                self.offload(*visitors)

    def freeze_unused(self) -> None:
        """Take the gradients from layers on which `predict` does not depend: data parallel training refuses them."""

    def speed_up(self, options: PerformanceOptions, models: Iterable[nn.Module]) -> None:
        """Attention backend, gradient checkpointing and compilation; called when the adapters are attached.

        models: those through which gradients flow.
        """
        denoiser = self.component(self.denoiser)
        if options.attention:
            enable_ether_attention(denoiser, options.attention)
        if options.gradient_checkpointing:
            for model in models:
                if isinstance(model, ModelMixin):
                    model.enable_gradient_checkpointing()
                else:
                    # Transformers' name for it, and the one that it had up to 5.22.
                    enable = getattr(model, "activation_checkpointing_enable", None)
                    (enable or model.gradient_checkpointing_enable)()
        if options.compile:  # at the first call; block by block where the model is made of equal ones
            if getattr(denoiser, "_repeated_blocks", None):
                denoiser.compile_repeated_blocks()
            else:
                denoiser.compile()
