"""Stable Diffusion XL: two CLIP text encoders, and a UNet that is also told the size and the crop of the image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ether_diffusion.errors import InputError
from ether_diffusion.training.data.views import Framing
from ether_diffusion.training.families.base import Conditioning, rows, stacked
from ether_diffusion.training.families.unet import UNetFamily

SIZE_COUNT = 6  # two numbers each of original size, crop and target size


class StableDiffusionXL(UNetFamily):
    """Stable Diffusion XL base, epsilon or v by the pipeline's own scheduler config.

    The prompt reaches the UNet as the penultimate hidden states of both encoders, concatenated, and as the pooled
    output of the second; size and crop as six numbers.

    Source: SDXL, arXiv:2307.01952, sections 2.1 and 2.2.
    """

    pipeline_class = "StableDiffusionXLPipeline"
    vae_precision = torch.float32  # in float16 SDXL's autoencoder overflows
    encoder_classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}

    @classmethod
    def added_conditions(cls, models: Mapping[str, nn.Module], where: str) -> dict[str, Any]:
        unet, encoder = (models[name].config for name in ("unet", "text_encoder_2"))
        if unet.addition_embed_type != "text_time":
            raise InputError(
                f"{where}: its UNet has addition_embed_type {unet.addition_embed_type!r}, needs 'text_time'"
            )
        given = encoder.projection_dim + SIZE_COUNT * unet.addition_time_embed_dim
        if unet.projection_class_embeddings_input_dim != given:
            raise InputError(
                f"{where}: its UNet takes {unet.projection_class_embeddings_input_dim} numbers for pooled text and "
                f"sizes; text_encoder_2 and {SIZE_COUNT} sizes make {given}"
            )
        pooled = torch.empty(1, encoder.projection_dim)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.empty(1, SIZE_COUNT)}}

    def encode_prompts(self, prompts: Sequence[str]) -> list[Conditioning]:
        """What the UNet is told of each prompt. Gradients flow to the text encoders."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return rows(encoder_hidden_states=states, text_embeds=pooled)  # (tokens, both widths), (projection,)

    def encode_framings(self, framings: Sequence[Framing]) -> list[Conditioning]:
        sizes = [[*each.original_size, *each.crop_top_left, *each.target_size] for each in framings]
        # In float32 whatever the model's precision: bfloat16 would round a size of 1333 to 1336.
        return rows(time_ids=torch.tensor(sizes, dtype=torch.float32, device=self.device))

    def arguments(self, conditioning: Sequence[Conditioning]) -> dict[str, Any]:
        dtype = self.pipe.unet.dtype
        return {
            "encoder_hidden_states": stacked(conditioning, "encoder_hidden_states").to(dtype),
            "added_cond_kwargs": {
                "text_embeds": stacked(conditioning, "text_embeds").to(dtype),
                "time_ids": stacked(conditioning, "time_ids"),
            },
        }

    def freeze_unused(self) -> None:
        # The first encoder is read before its last layer, and its pooled output not at all.
        for unread in (self.pipe.text_encoder.encoder.layers[-1], self.pipe.text_encoder.final_layer_norm):
            unread.requires_grad_(False)
