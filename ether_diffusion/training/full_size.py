"""Models at full size, without their weights: what a recipe for training them is computed from. Nothing is downloaded.

Configurations are those of the models' repositories; where diffusers' class has them as its defaults, only what
differs stands here. `tests/tuner/test_parameter_counts.py` and `tests/training/test_recipe.py` hold their sizes to
what is published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from torch import nn

from ether_diffusion.errors import InputError

SDXL_UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35 = {
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
    "in_channels": 16,
    "out_channels": 16,
    "sample_size": 128,
}
SD35_LARGE = {**SD35, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
SD35_LARGE |= {"pos_embed_max_size": 192}
SD35_MEDIUM = {**SD35, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SD35_MEDIUM |= {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
NO_GUIDANCE = {"guidance_embeds": False}

CLIP_L, CLIP_G, T5 = 123_060_480, 694_659_840, 4_762_310_656
QWEN3_4B, QWEN3_8B, GEMMA2_2B = 4_022_468_096, 8_190_735_360, 2_614_341_888
QWEN25_VL_7B, MISTRAL_24B = 8_292_166_656, 24_011_361_280
"""Parameters of text encoders."""


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """A model at full size.

    hub_id: of the pipeline to train on.
    pipeline: its class, by which training knows its family.
    denoiser: class of the UNet or the transformer; config: what differs from its defaults.
    text_encoders: parameters of each; vae: of the autoencoder.
    native_side: in pixels, of the images that it was made for.
    token_side: in pixels, of the square that one token of a transformer stands for.
    bytes_of_a_pixel: of a UNet, what a step keeps and makes for each pixel of an image, without and with gradient
        checkpointing, in 16 bits; None where it does not fit a card without.
    vae_bytes: of a value in the autoencoder, which SDXL's needs in 32 bits.
    """

    hub_id: str
    pipeline: str
    denoiser: str
    config: Mapping[str, Any] = field(default_factory=dict)
    text_encoders: Sequence[int]
    vae: int = 83_819_683
    native_side: int = 1024
    token_side: int = 16
    bytes_of_a_pixel: tuple[float | None, float] | None = None
    vae_bytes: int = 2

    @property
    def is_unet(self) -> bool:
        return self.bytes_of_a_pixel is not None


# Bytes of a pixel: benchmarks/results/memory.json, peak of a step less weights and what is trained (ETHER+, cached).
MODELS = {
    "sd15": FullSize(
        hub_id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        pipeline="StableDiffusionPipeline",
        denoiser="UNet2DConditionModel",
        config={"cross_attention_dim": 768, "sample_size": 64},
        text_encoders=(CLIP_L,),
        native_side=512,
        bytes_of_a_pixel=(4782, 1083),
    ),
    "sdxl": FullSize(
        hub_id="stabilityai/stable-diffusion-xl-base-1.0",
        pipeline="StableDiffusionXLPipeline",
        denoiser="UNet2DConditionModel",
        config=SDXL_UNET,
        text_encoders=(CLIP_L, CLIP_G),
        bytes_of_a_pixel=(None, 688),
        vae_bytes=4,
    ),
    "sd35-medium": FullSize(
        hub_id="stabilityai/stable-diffusion-3.5-medium",
        pipeline="StableDiffusion3Pipeline",
        denoiser="SD3Transformer2DModel",
        config=SD35_MEDIUM,
        text_encoders=(CLIP_L, CLIP_G, T5),
    ),
    "sd35-large": FullSize(
        hub_id="stabilityai/stable-diffusion-3.5-large",
        pipeline="StableDiffusion3Pipeline",
        denoiser="SD3Transformer2DModel",
        config=SD35_LARGE,
        text_encoders=(CLIP_L, CLIP_G, T5),
    ),
    "flux1": FullSize(
        hub_id="black-forest-labs/FLUX.1-dev",
        pipeline="FluxPipeline",
        denoiser="FluxTransformer2DModel",
        config={"guidance_embeds": True},
        text_encoders=(CLIP_L, T5),
    ),
    "flux2-klein": FullSize(
        hub_id="black-forest-labs/FLUX.2-klein-base-4B",
        pipeline="Flux2KleinPipeline",
        denoiser="Flux2Transformer2DModel",
        config=KLEIN_4B | NO_GUIDANCE,
        text_encoders=(QWEN3_4B,),
    ),
    "flux2-klein-9b": FullSize(
        hub_id="black-forest-labs/FLUX.2-klein-base-9B",
        pipeline="Flux2KleinPipeline",
        denoiser="Flux2Transformer2DModel",
        config=KLEIN_9B | NO_GUIDANCE,
        text_encoders=(QWEN3_8B,),
    ),
    "flux2-dev": FullSize(
        hub_id="black-forest-labs/FLUX.2-dev",
        pipeline="Flux2Pipeline",
        denoiser="Flux2Transformer2DModel",
        text_encoders=(MISTRAL_24B,),
    ),
    "qwen-image": FullSize(
        hub_id="Qwen/Qwen-Image",
        pipeline="QwenImagePipeline",
        denoiser="QwenImageTransformer2DModel",
        text_encoders=(QWEN25_VL_7B,),
        vae=126_892_531,
    ),
    "z-image": FullSize(
        hub_id="Tongyi-MAI/Z-Image",
        pipeline="ZImagePipeline",
        denoiser="ZImageTransformer2DModel",
        text_encoders=(QWEN3_4B,),
    ),
    "chroma": FullSize(
        hub_id="lodestones/Chroma1-HD",
        pipeline="ChromaPipeline",
        denoiser="ChromaTransformer2DModel",
        text_encoders=(T5,),
    ),
    "lumina2": FullSize(
        hub_id="Alpha-VLLM/Lumina-Image-2.0",
        pipeline="Lumina2Pipeline",
        denoiser="Lumina2Transformer2DModel",
        text_encoders=(GEMMA2_2B,),
    ),
    "sana": FullSize(
        hub_id="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        pipeline="SanaPipeline",
        denoiser="SanaTransformer2DModel",
        text_encoders=(GEMMA2_2B,),
        vae=312_250_275,
        token_side=32,
    ),
}


def full_size(name: str) -> FullSize:
    """A model by its short name, or by its id on the Hub. Raises `InputError` for another, with all there are."""
    for short, model in MODELS.items():
        if name.lower() in (short, model.hub_id.lower()):
            return model
    raise InputError(f"--model {name}: there is no recipe for it; there are {', '.join(MODELS)}")


@cache
def denoiser_of(name: str) -> nn.Module:
    """The denoiser of a model, by its short name or id, without weights."""
    model = full_size(name)
    with torch.device("meta"):
        return getattr(diffusers, model.denoiser)(**model.config)
