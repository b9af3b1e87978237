"""Stable Diffusion 1 and 2: one CLIP text encoder, and a UNet that is told the prompt alone."""

from collections.abc import Sequence
from typing import Any

from transformers import CLIPTextModel

from ether_diffusion.training.families.base import Conditioning, rows, stacked
from ether_diffusion.training.families.unet import UNetFamily


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1 (epsilon) and 2 (epsilon at 512 pixels, v at 768)."""

    pipeline_class = "StableDiffusionPipeline"
    encoder_classes = {"text_encoder": CLIPTextModel}
    # The safety checker is left out: it costs 1.2 GB and has no part in training.
    loading = {"safety_checker": None, "requires_safety_checker": False}

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """What the UNet is told of each prompt. Gradients flow to the text encoders."""
        states, _ = self.pipe.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return rows(encoder_hidden_states=states)  # (tokens, width) each

    def arguments(self, conditioning: Sequence[Conditioning]) -> dict[str, Any]:
        return {"encoder_hidden_states": stacked(conditioning, "encoder_hidden_states").to(self.pipe.unet.dtype)}
