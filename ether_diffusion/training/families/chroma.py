"""Chroma: FLUX.1 without CLIP and guidance, whose attention weighs T5's padding by a mask."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ether_diffusion.tokens import from_tokens, grid_ids, join_patches, split_patches, to_tokens
from ether_diffusion.training.families.base import Conditioning, rows, stacked
from ether_diffusion.training.families.flow import FlowFamily
from ether_diffusion.training.families.flux import DOUBLE_ATTENTION


class Chroma(FlowFamily):
    """Chroma.

    Source: its pipeline in diffusers.
    """

    pipeline_class = "ChromaPipeline"
    text_encoders = ("text_encoder",)
    targets = DOUBLE_ATTENTION

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """States of T5 (tokens, width) with all of the padding, and the mask (tokens,) of text and one token more.

        The pipeline adds its mask to the scores of attention as a number, 1 or 0, so the padding has a part in the
        answer and is kept.
        """
        states, _, mask, *_ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return rows(prompt_embeds=states, prompt_attention_mask=mask)

    def predict(self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """The velocity, in the shape of the latents."""
        transformer, patches = self.component(self.denoiser), split_patches(noisy)
        text = stacked(conditioning, "prompt_embeds").to(transformer.dtype)
        mask = stacked(conditioning, "prompt_attention_mask").to(transformer.dtype)
        mask = torch.nn.functional.pad(mask, (0, patches.shape[-2:].numel()), value=1)
        with masked_checkpoints(transformer, mask):
            answer = transformer(
                hidden_states=to_tokens(patches).to(transformer.dtype),
                timestep=levels,
                encoder_hidden_states=text,
                txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
                img_ids=grid_ids(*patches.shape[-2:], axes=3).to(noisy.device),
                attention_mask=mask,
                return_dict=False,
            )[0]
        return join_patches(from_tokens(answer, patches))


@contextmanager
def masked_checkpoints(transformer: nn.Module, mask: Tensor) -> Iterator[None]:
    """A context in which single blocks get the mask under gradient checkpointing, where diffusers leaves it out."""
    checkpoint = getattr(transformer, "_gradient_checkpointing_func", None)
    if checkpoint is None:
        yield
        return
    singles = set(transformer.single_transformer_blocks)

    def masked(block, *inputs):
        return checkpoint(block, *inputs, *([mask] if block in singles and len(inputs) == 3 else []))

    transformer._gradient_checkpointing_func = masked
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = checkpoint
