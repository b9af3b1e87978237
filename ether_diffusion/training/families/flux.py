"""FLUX.1: CLIP's pooled text and T5's states, 2×2 patches as tokens; Kontext adds the tokens of a reference image."""

import inspect
from collections.abc import Sequence
from math import prod
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor, nn

from ether_diffusion.control.controlnets import start_noise
from ether_diffusion.tokens import from_tokens, grid_ids, join_patches, split_patches, to_tokens
from ether_diffusion.training.data.views import Target
from ether_diffusion.training.families.base import Conditioning, rows, stacked
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.families.source import ModelSource
from ether_diffusion.tuner.model import ATTENTION

DOUBLE_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The attention of blocks in which image and text have projections of their own."""


class Flux(FlowFamily):
    """FLUX.1-dev, and what has its architecture.

    Source: its pipeline in diffusers.
    """

    pipeline_class = "FluxPipeline"
    text_encoders = ("text_encoder", "text_encoder_2")
    trained_text_encoders = ("text_encoder",)
    targets = DOUBLE_ATTENTION
    negative_prompt = None

    @classmethod
    def base_of(cls, source: ModelSource) -> str | None:
        has_guidance = source.config(cls.denoiser, FluxTransformer2DModel).get("guidance_embeds", False)
        return None if has_guidance else "black-forest-labs/FLUX.1-dev"

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States of T5 (tokens, width) and pooled text of CLIP (width,) of each prompt."""
        states, pooled, _ = self.pipe.encode_prompt(list(prompts), device=self.device)
        return rows(prompt_embeds=states, pooled_prompt_embeds=pooled)

    def generate(self, prompts: Sequence[str], *, pipe: DiffusionPipeline | None = None, **inputs: Any) -> Any:
        pipe = pipe or self.pipe
        if "controlnet" in pipe.components:
            # As without a ControlNet: with one, the pipeline has another guidance, and the latents of the control
            # image take the first random numbers.
            if inputs.get("guidance_scale") is None:
                call = inspect.signature(getattr(diffusers, self.pipeline_class).__call__)
                inputs["guidance_scale"] = call.parameters["guidance_scale"].default
            self.component(self.denoiser)
            size = (inputs["height"], inputs["width"])
            inputs |= start_noise(pipe, len(prompts), size, inputs["generator"])
        return super().generate(prompts, pipe=pipe, **inputs)

    def predict(
        self,
        noisy: Tensor,
        levels: Tensor,
        conditioning: Sequence[Conditioning],
        references: Sequence[Tensor] = (),
        **residuals: Any,
    ) -> Tensor:
        """The velocity, in the shape of the latents.

        Args:
            noisy, levels, conditioning: as for every family.
            references: latents of a reference image for each.
            residuals: from a ControlNet.
        """
        transformer, patches = self.component(self.denoiser), split_patches(noisy)
        given = self._arguments(transformer, [patches, *map(split_patches, references)], levels, conditioning)
        answer = transformer(**given, **residuals)[0]
        return join_patches(from_tokens(answer, patches))

    def residuals(
        self,
        controlnet: FluxControlNetModel,
        noisy: Tensor,
        levels: Tensor,
        conditioning: Sequence[Conditioning],
        control: Tensor,
    ) -> dict[str, Any]:
        """What a ControlNet adds to the transformer's activations, as `predict` takes it.

        control: latents of the control images (b, c, h, w).
        """
        given = self._arguments(controlnet, [split_patches(noisy)], levels, conditioning)
        seen = to_tokens(split_patches(control)).to(given["hidden_states"].dtype)
        double, single = controlnet(controlnet_cond=seen, **given)
        return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}

    def _arguments(
        self, model: nn.Module, images: Sequence[Tensor], levels: Tensor, conditioning: Sequence[Conditioning]
    ) -> dict[str, Any]:
        """What the transformer or a ControlNet is called with; images: patches (b, 4c, h, w), the noisy ones first."""
        dtype, device = self.component(self.denoiser).dtype, levels.device
        ids = [grid_ids(*each.shape[-2:], axes=3, first=min(k, 1)) for k, each in enumerate(images)]
        text = stacked(conditioning, "prompt_embeds").to(dtype)
        return {
            "hidden_states": torch.cat([to_tokens(each) for each in images], 1).to(dtype),
            "timestep": levels,
            "guidance": self.guidance_of(images[0], model),
            "pooled_projections": stacked(conditioning, "pooled_prompt_embeds").to(dtype),
            "encoder_hidden_states": text,
            "txt_ids": torch.zeros(text.shape[1], 3, device=device),
            "img_ids": torch.cat(ids).to(device),
            "return_dict": False,
        }


class FluxKontext(Flux):
    """FLUX.1-Kontext, which edits a reference image."""

    pipeline_class = "FluxKontextPipeline"
    takes_references = True

    def size_inputs(self, target: Target) -> dict[str, Any]:
        # Without them, the pipeline would take and generate other sizes of about the same proportions.
        return {**super().size_inputs(target), "max_area": prod(target), "_auto_resize": False}
