"""FLUX.1: CLIP's pooled text and T5's states, 2×2 patches as tokens; Kontext adds the tokens of a reference image."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

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

    def predict(
        self,
        noisy: Tensor,
        levels: Tensor,
        conditioning: Sequence[Conditioning],
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """The velocity, in the shape of the latents; references: latents of a reference image for each."""
        transformer, patches = self.component(self.denoiser), split_patches(noisy)
        given = [patches, *(split_patches(each) for each in references)]
        ids = [grid_ids(*each.shape[-2:], axes=3, first=min(k, 1)) for k, each in enumerate(given)]
        text = stacked(conditioning, "prompt_embeds").to(transformer.dtype)
        answer = transformer(
            hidden_states=torch.cat([to_tokens(each) for each in given], 1).to(transformer.dtype),
            timestep=levels,
            guidance=self.guidance_of(noisy),
            pooled_projections=stacked(conditioning, "pooled_prompt_embeds").to(transformer.dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            img_ids=torch.cat(ids).to(noisy.device),
            return_dict=False,
        )[0]
        return join_patches(from_tokens(answer, patches))


class FluxKontext(Flux):
    """FLUX.1-Kontext, which edits a reference image."""

    pipeline_class = "FluxKontextPipeline"
    takes_references = True

    def size_inputs(self, target: Target) -> dict[str, Any]:
        # Without them, the pipeline would take and generate other sizes of about the same proportions.
        return {**super().size_inputs(target), "max_area": prod(target), "_auto_resize": False}
