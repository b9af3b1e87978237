"""What training needs to know about one kind of pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ether_diffusion.latents import LatentSpace
from ether_diffusion.training.data.views import Framing, Target
from ether_diffusion.training.families.source import ModelSource
from ether_diffusion.training.noise import DiscreteNoise, FlowNoise
from ether_diffusion.training.options import FlowOptions, PerformanceOptions
from ether_diffusion.tuner.attention import enable_ether_attention
from ether_diffusion.tuner.model import ATTENTION

Conditioning = Mapping[str, Tensor]
"""What the denoiser is told of one sample besides latents and level, under names of the family's own.

No tensor has a batch axis, and a prompt has its natural length.
"""

_KEPT_PROMPTS = 512


class Family:
    """One kind of pipeline, as training sees it. Shapes: pixels (3, h, w), latents (b, c, h', w'), levels (b,).

    What is here holds for every pipeline. A family adds, as `UNetFamily` and `FlowFamily` do for all of their kind:

    - `read_blueprint(source)`: the pipeline without weights, refused where training does not cover it; `load(source,
      dtype)`: the pipeline with its weights;
    - `noise` and `latents`, and `native_resolution`, the side in pixels that the denoiser was made for;
    - `encode_prompts(prompts)`: their conditioning, and `encode_framings` if the denoiser is told sizes and crops;
    - `predict(noisy, levels, conditioning)`: what the denoiser answers, in the convention of `noise.target`;
    - where there are ControlNets, `residuals(controlnet, noisy, levels, conditioning, control)`: what one adds to the
      denoiser's activations, as `predict` takes it by name.

    Class attributes:
        pipeline_class: name of the pipeline of diffusers that it covers.
        denoiser: name of the component that removes noise.
        text_encoders: the components that encode prompts.
        trained_text_encoders: those of them that can be adapted.
        targets: the denoiser's layers that are adapted by default, as PEFT takes them.
        is_flow: whether noise is added by flow matching.
        takes_references: whether the denoiser sees reference images, as `predict` takes them.
        reads_references: whether the text encoders see them, too, without which they do nothing.
    """

    pipeline_class: ClassVar[str]
    denoiser: ClassVar[str]
    text_encoders: ClassVar[Sequence[str]]
    trained_text_encoders: ClassVar[Sequence[str]]
    targets: ClassVar[Sequence[str] | str] = ATTENTION
    is_flow: ClassVar[bool] = False
    takes_references: ClassVar[bool] = False
    reads_references: ClassVar[bool] = False
    noise: DiscreteNoise | FlowNoise
    latents: LatentSpace

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.device = self.component(self.denoiser).device
        self.vae_tiling = False
        self._offloaded: set[str] = set()
        self._kept_prompts: dict[tuple[str | None, ...], Conditioning] = {}
        self._kept_count = _KEPT_PROMPTS

    @classmethod
    def distilled(cls, source: ModelSource) -> str | None:
        """One sentence that names the model to train on instead, where this one is distilled; None where it is not."""
        return None

    def encode_framings(self, framings: Sequence[Framing]) -> list[Conditioning]:
        """What the denoiser is told of size and crop of each view; nothing unless the family says otherwise."""
        return [{} for _ in framings]

    def conditioning(
        self, prompts: Sequence[str | None], references: Sequence[Sequence[Tensor]] | None = None
    ) -> list[Conditioning]:
        """The encoded prompts, kept: for text encoders that are not trained.

        Args:
            prompts: None among them is the one that guidance steers away from.
            references: for text encoders that see reference images, those of each prompt, as pixels.
        """
        images = [()] * len(prompts) if references is None else references
        keys = self._keys(prompts, references)
        new = {key: seen for key, seen in zip(keys, images, strict=True) if key not in self._kept_prompts}
        if new:
            with torch.no_grad(), self.on_device(*self.text_encoders):
                # One by one, so that the result does not depend on what else is encoded.
                self._kept_prompts |= {key: self._encode(key[0], seen) for key, seen in new.items()}
        rows = [self._kept_prompts[key] for key in keys]
        while len(self._kept_prompts) > self._kept_count:
            del self._kept_prompts[next(iter(self._kept_prompts))]
        return [{name: value.to(self.device) for name, value in row.items()} for row in rows]

    def as_trained(self, prompts: Sequence[str]) -> list[str | None]:
        """Prompts as the training asks for them: an empty one as the pipeline's guidance has it."""
        return list(prompts)

    @staticmethod
    def _keys(prompts: Sequence[str | None], references: Sequence[Sequence[Tensor]] | None) -> list[tuple]:
        """Under what each prompt is kept: the prompt, and digests of the reference images that are read with it."""
        images = [()] * len(prompts) if references is None else references
        return [(prompt, *map(_digest, seen)) for prompt, seen in zip(prompts, images, strict=True)]

    def _encode(self, prompt: str | None, references: Sequence[Tensor]) -> Conditioning:
        return self.encode_prompts([prompt], *([[references]] if references else []))[0]

    def keep_prompts(
        self, prompts: Sequence[str | None], references: Sequence[Sequence[Tensor]] | None = None
    ) -> None:
        """Encode these prompts now, as `conditioning` does, keep them on the CPU, and release the text encoders."""
        self._kept_count = max(self._kept_count, len(self._kept_prompts) + len(prompts))
        self.conditioning(prompts, references)
        for key, row in self._kept_prompts.items():
            self._kept_prompts[key] = {name: value.cpu() for name, value in row.items()}
        self.release(*self.text_encoders)

    def generate(self, prompts: Sequence[str], *, pipe: DiffusionPipeline | None = None, **inputs: Any) -> Any:
        """What the pipeline makes of prompts; `pipe` takes the place of the family's."""
        pipe = pipe or self.pipe
        with self.tiling(pipe):
            return pipe(list(prompts), **inputs)

    @contextmanager
    def tiling(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """A context in which the autoencoder decodes in tiles, if that is wanted."""
        if not self.vae_tiling:
            yield
            return
        pipe.vae.enable_tiling()
        try:
            yield
        finally:
            pipe.vae.disable_tiling()

    def token_count(self, target: Target) -> int:
        """How many tokens an image of this (height, width) has; 1 where levels of noise do not depend on it."""
        return 1

    def size_inputs(self, target: Target) -> dict[str, Any]:
        """What the pipeline is told to generate images of this (height, width); nothing where its own size fits."""
        return {}

    @property
    def component_names(self) -> list[str]:
        """The components that have weights, in memory or not."""
        return [name for name, each in self.pipe.components.items() if isinstance(each, nn.Module)]

    def complete(self) -> None:
        """Have all components in memory, to save the pipeline."""

    def component(self, name: str) -> nn.Module:
        return getattr(self.pipe, name)

    def modules(self) -> dict[str, nn.Module]:
        """The components with their weights, as far as they are in memory."""
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

    def release(self, *names: str) -> None:
        """Let components go whose work is done: out of memory where they can be read again, else off the device."""
        self.offload(*names)

    def set_noise(self, options: FlowOptions) -> None:
        """Take the options of flow matching, where noise is added so."""

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
            self.set_attention(options.attention)
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

    def set_attention(self, backend: str) -> None:
        """Let this backend compute the denoiser's attention."""
        enable_ether_attention(self.component(self.denoiser), backend)


def _digest(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.cpu().contiguous().numpy().tobytes()).hexdigest()


def stacked(conditioning: Sequence[Conditioning], name: str) -> Tensor:
    """What samples are told under one name, all of one shape, as a batch."""
    return torch.stack([row[name] for row in conditioning])


def rows(**batches: Tensor) -> list[Conditioning]:
    """Batches (b, …), each under its name, as the conditioning of b samples."""
    return [dict(zip(batches, row, strict=True)) for row in zip(*batches.values(), strict=True)]
