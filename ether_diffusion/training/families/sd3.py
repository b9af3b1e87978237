"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, latents as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3ControlNetModel
from torch import Tensor, nn

from ether_diffusion.latents import side_factor
from ether_diffusion.training.families.base import Conditioning, rows, stacked
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.families.flux import DOUBLE_ATTENTION
from ether_diffusion.training.families.source import ModelSource


class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3 and 3.5, with or without T5.

    Source: SD3, arXiv:2403.03206, and its pipeline in diffusers.
    """

    pipeline_class = "StableDiffusion3Pipeline"
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    trained_text_encoders = ("text_encoder", "text_encoder_2")
    targets = DOUBLE_ATTENTION
    unread = r"attn\.(add_q_proj|to_add_out)"

    @classmethod
    def native_side(cls, models: Mapping[str, nn.Module]) -> int:
        """As the pipeline has it: what its transformer's config says, in latents."""
        return models[cls.denoiser].config.sample_size * side_factor(models["vae"])

    @classmethod
    def base_of(cls, source: ModelSource) -> str | None:
        return "stabilityai/stable-diffusion-3.5-large" if source.is_called("turbo") else None

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States of all encoders (tokens, width) and pooled text of both CLIPs (width,) of each prompt."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return rows(prompt_embeds=states, pooled_prompt_embeds=pooled)

    def predict(self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning], **residuals: Any) -> Tensor:
        """The velocity, in the shape of the latents; residuals: from a ControlNet."""
        transformer = self.component(self.denoiser)
        return transformer(
            hidden_states=noisy.to(transformer.dtype),
            timestep=1000 * levels,
            encoder_hidden_states=stacked(conditioning, "prompt_embeds").to(transformer.dtype),
            pooled_projections=stacked(conditioning, "pooled_prompt_embeds").to(transformer.dtype),
            return_dict=False,
            **residuals,
        )[0]

    def residuals(
        self,
        controlnet: SD3ControlNetModel,
        noisy: Tensor,
        levels: Tensor,
        conditioning: Sequence[Conditioning],
        control: Tensor,
    ) -> dict[str, Any]:
        """What a ControlNet adds to the transformer's activations, as `predict` takes it.

        control: latents of the control images (b, c, h, w), as `latents.draw` gives them.
        """
        dtype = self.component(self.denoiser).dtype
        pooled = stacked(conditioning, "pooled_prompt_embeds").to(dtype)
        if controlnet.config.force_zeros_for_pooled_projection:
            # Such ControlNets are told no pooled text, and latents without the autoencoder's shift.
            pooled, control = torch.zeros_like(pooled), control + self.latents.shift * self.latents.scale
        has_text = controlnet.context_embedder is not None  # the large ones of 3.5 have none
        added = controlnet(
            hidden_states=noisy.to(dtype),
            timestep=1000 * levels,
            encoder_hidden_states=stacked(conditioning, "prompt_embeds").to(dtype) if has_text else None,
            pooled_projections=pooled,
            controlnet_cond=control.to(dtype),
            return_dict=False,
        )[0]
        return {"block_controlnet_hidden_states": added}
