"""Krea 2: states of twelve layers of Qwen3-VL for each token, 2×2 patches of Qwen-Image's latents as tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.tokens import from_tokens, grid_ids, join_patches, pad_rows, split_patches, to_tokens
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.families.source import ModelSource

LENGTH = 512
"""Tokens of a prompt and of the end of the template, in the pipeline."""


class Krea2(FlowFamily):
    """Krea 2.

    Source: its pipeline in diffusers.
    """

    pipeline_class = "Krea2Pipeline"
    text_encoders = ("text_encoder",)
    # Not the blocks that fuse the states of the text: they see no image.
    targets = r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_gate|to_out\.0)"

    @classmethod
    def base_of(cls, source: ModelSource) -> str | None:
        return "krea/Krea-2-Raw" if source.config().get("is_distilled", False) else None

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States (tokens, layers, width) of each prompt, without the padding in its midst.

        Text has no positions in the transformer, so it makes no difference what the padding was between.
        """
        states, mask = self.pipe.encode_prompt(list(prompts), device=self.device)
        return [{"prompt_embeds": row[seen]} for row, seen in zip(states, mask, strict=True)]

    def prompt_inputs(self, conditioning: Sequence[Conditioning]) -> dict[str, Any]:
        # One length for all: the pipeline takes that of the prompt for the negative one, too.
        states, mask = pad_rows([row["prompt_embeds"] for row in conditioning], LENGTH)
        return {"prompt_embeds": states, "prompt_embeds_mask": mask}

    def predict(self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """The velocity, in the shape of the latents."""
        transformer, patches = self.component(self.denoiser), split_patches(noisy)
        states, mask = pad_rows([row["prompt_embeds"].to(transformer.dtype) for row in conditioning])
        ids = grid_ids(*patches.shape[-2:], axes=3)
        answer = transformer(
            hidden_states=to_tokens(patches).to(transformer.dtype),
            encoder_hidden_states=states,
            timestep=levels,
            position_ids=torch.cat([torch.zeros(states.shape[1], 3), ids]).to(noisy.device),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return join_patches(from_tokens(answer, patches))
