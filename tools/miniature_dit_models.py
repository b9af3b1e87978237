"""The second miniature's pipeline: SD3's architecture in small, with autoencoder and text encoders of the first."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPT_LENGTH = 48  # tokens
T5_LENGTH = 256
"""Rows of zeros that the pipeline gives the transformer after them, where it has no T5."""
WIDTH, HEADS, LAYERS = 160, 2, 6


def build_transformer(text_width: int) -> SD3Transformer2DModel:
    """About 5.5 million parameters; text_width: of both text encoders side by side."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        joint_attention_dim=text_width,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=text_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def with_projection(tower: CLIPTextModel, projection: torch.Tensor) -> CLIPTextModelWithProjection:
    """The tower as Stable Diffusion 3 reads it: with a projection of its pooled text."""
    model = CLIPTextModelWithProjection(tower.config)
    missing, unexpected = model.load_state_dict(
        {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tower.state_dict().items()},
        strict=False,
    )
    if unexpected or set(missing) != {"text_projection.weight"}:
        raise ValueError(f"the text encoder has other weights: {missing}, {unexpected}")
    model.text_projection.weight.data.copy_(projection)
    return model.eval().requires_grad_(False)


def assemble(first: Path) -> StableDiffusion3Pipeline:
    """The pipeline with an untrained transformer.

    first: folder of the first miniature. Its text encoder and the text tower of its CLIP are the two text encoders.
    """
    tokenizer = CLIPTokenizer.from_pretrained(first / "tokenizer")
    text_encoder, clip = (
        CLIPTextModel.from_pretrained(first / "text_encoder"),
        CLIPModel.from_pretrained(first / "clip"),
    )
    width = text_encoder.config.hidden_size
    tower = CLIPTextModel(clip.config.text_config)
    tower.load_state_dict(clip.text_model.state_dict())
    return StableDiffusion3Pipeline(
        vae=AutoencoderKL.from_pretrained(first / "vae"),
        text_encoder=with_projection(text_encoder, torch.eye(width)),
        tokenizer=tokenizer,
        text_encoder_2=with_projection(tower, clip.text_projection.weight),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=build_transformer(2 * width),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
