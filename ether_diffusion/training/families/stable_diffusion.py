"""Stable Diffusion 1 and 2: one CLIP text encoder, and a UNet that is told the prompt alone."""

from collections.abc import Sequence

from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.families.unet import UNetFamily


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1 (epsilon) and 2 (epsilon at 512 pixels, v at 768)."""

    pipeline_class = StableDiffusionPipeline
    text_encoders = ("text_encoder",)
    text_encoder_classes = (CLIPTextModel,)
    # The safety checker is left out: it costs 1.2 GB and has no part in training.
    loading = {"safety_checker": None, "requires_safety_checker": False}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        states, _ = self.pipe.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states}  # (b, tokens, width)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        unet = self.pipe.unet
        states = conditioning["encoder_hidden_states"].to(unet.dtype)
        return unet(noisy.to(unet.dtype), timesteps, encoder_hidden_states=states).sample
