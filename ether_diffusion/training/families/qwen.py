"""Qwen-Image: the states of a language model at their natural length, 2×2 patches as tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.tokens import from_tokens, join_patches, pad_rows, split_patches, to_tokens
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.families.flux import DOUBLE_ATTENTION


class QwenImage(FlowFamily):
    """Qwen-Image.

    Source: its pipeline in diffusers.
    """

    pipeline_class = "QwenImagePipeline"
    text_encoders = ("text_encoder",)
    targets = DOUBLE_ATTENTION
    unread = r"attn\.(add_q_proj|to_add_out)"
    negative_prompt = " "  # as the model's authors have it
    guidance_argument = "true_cfg_scale"

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States (tokens, width) of each prompt, without the tokens of the template."""
        states, mask = self.pipe.encode_prompt(list(prompts), device=self.device)
        lengths = [states.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return [{"prompt_embeds": row[:length]} for row, length in zip(states, lengths, strict=True)]

    def prompt_inputs(self, conditioning: Sequence[Conditioning]) -> dict[str, Any]:
        states, mask = pad_rows([row["prompt_embeds"] for row in conditioning])
        full = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return {"prompt_embeds": states, "prompt_embeds_mask": full if mask is None else mask}

    def predict(
        self,
        noisy: Tensor,
        levels: Tensor,
        conditioning: Sequence[Conditioning],
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """The velocity, in the shape of the latents; references: latents of reference images for each."""
        transformer, given = self.component(self.denoiser), [split_patches(each) for each in (noisy, *references)]
        states, mask = pad_rows([row["prompt_embeds"] for row in conditioning])
        answer = transformer(
            hidden_states=torch.cat([to_tokens(each) for each in given], 1).to(transformer.dtype),
            timestep=levels,
            guidance=self.guidance_of(noisy),
            encoder_hidden_states=states.to(transformer.dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *each.shape[-2:]) for each in given]] * len(noisy),
            return_dict=False,
        )[0]
        return join_patches(from_tokens(answer, given[0]))
