"""Z-Image: the states of Qwen3 at their natural length, lists of images and prompts, time that runs to the image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.families.source import ModelSource


class ZImage(FlowFamily):
    """Z-Image.

    Source: its pipeline in diffusers.
    """

    pipeline_class = "ZImagePipeline"
    text_encoders = ("text_encoder",)

    @classmethod
    def base_of(cls, source: ModelSource) -> str | None:
        return "Tongyi-MAI/Z-Image" if source.is_called("turbo") else None

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States (tokens, width) of each prompt."""
        states, _ = self.pipe.encode_prompt(list(prompts), self.device, do_classifier_free_guidance=False)
        return [{"prompt_embeds": row} for row in states]

    def prompt_inputs(self, conditioning: Sequence[Conditioning]) -> dict[str, Any]:
        return {"prompt_embeds": [row["prompt_embeds"] for row in conditioning]}

    def predict(self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """The velocity, in the shape of the latents."""
        transformer = self.component(self.denoiser)
        answers = transformer(
            list(noisy[:, :, None].to(transformer.dtype)),  # with an axis of frames
            1 - levels,
            [row["prompt_embeds"].to(transformer.dtype) for row in conditioning],
            return_dict=False,
        )[0]
        return -torch.stack(list(answers))[:, :, 0]
