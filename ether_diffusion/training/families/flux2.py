"""FLUX.2: states of three layers of a language model, latents of 2×2 patches normalised by a batch norm as tokens."""

from collections.abc import Sequence

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from ether_diffusion.tokens import from_tokens, grid_ids, to_tokens
from ether_diffusion.training.families.base import Conditioning, rows, stacked
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.families.source import ModelSource
from ether_diffusion.tuner.model import DENOISER_TARGETS

REFERENCE_STEP = 10
"""How far apart the first coordinates of the image and of its references are."""

WIDTH_OF_9B = 3 * 4096
"""Width of the text of klein 9B: three layers of Qwen3-8B."""


class Flux2Klein(FlowFamily):
    """FLUX.2-klein: Qwen3 as text encoder.

    Source: its pipeline in diffusers.
    """

    pipeline_class = "Flux2KleinPipeline"
    takes_references = True
    text_encoders = ("text_encoder",)
    targets = DENOISER_TARGETS["Flux2Transformer2DModel"] + r"|.*\.(add_[qkv]_proj|to_add_out)"

    @classmethod
    def base_of(cls, source: ModelSource) -> str | None:
        if not source.config().get("is_distilled", False):
            return None
        width = source.config(cls.denoiser, Flux2Transformer2DModel).get("joint_attention_dim", 0)
        return f"black-forest-labs/FLUX.2-klein-base-{'9B' if width == WIDTH_OF_9B else '4B'}"

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States of three layers side by side, (tokens, 3·width) of each prompt, with its padding, as the pipeline."""
        return rows(prompt_embeds=self.pipe.encode_prompt(list(prompts), device=self.device)[0])

    def predict(
        self,
        noisy: Tensor,
        levels: Tensor,
        conditioning: Sequence[Conditioning],
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """The velocity, in the shape of the latents; references: latents of reference images for each."""
        transformer, given = self.component(self.denoiser), [noisy, *references]
        ids = [grid_ids(*each.shape[-2:], axes=4, first=REFERENCE_STEP * k) for k, each in enumerate(given)]
        text = stacked(conditioning, "prompt_embeds").to(transformer.dtype)
        text_ids = torch.zeros(text.shape[1], 4)
        text_ids[:, 3] = torch.arange(len(text_ids))
        answer = transformer(
            hidden_states=torch.cat([to_tokens(each) for each in given], 1).to(transformer.dtype),
            timestep=levels,
            guidance=self.guidance_of(noisy),
            encoder_hidden_states=text,
            txt_ids=text_ids.expand(len(noisy), -1, -1).to(noisy.device),
            img_ids=torch.cat(ids).expand(len(noisy), -1, -1).to(noisy.device),
            return_dict=False,
        )[0]
        return from_tokens(answer, noisy)


class Flux2(Flux2Klein):
    """FLUX.2-dev: Mistral as text encoder, and an embedding of the guidance."""

    pipeline_class = "Flux2Pipeline"
    negative_prompt = None
