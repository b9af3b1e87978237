"""Pipelines with a control encoder, in very small."""

import json

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from ether_diffusion import (
    ControlEncoder,
    EtherControlPipeline,
)

WHOLE = ["controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"]


IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def make_encoder(pipe, seed: int | None = 3, **options) -> ControlEncoder:
    """An encoder that fits; without a seed, untrained."""
    encoder = ControlEncoder.for_denoiser(pipe.unet, factor=pipe.vae_scale_factor, **options)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def open_control(folder, **options) -> EtherControlPipeline:
    pipe = EtherControlPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b)


def call_unet(unet, batch=2):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    return unet(latents, 5, torch.randn(batch, 16, 16, generator=generator)).sample


def content(path) -> tuple[dict, dict[str, str]]:
    """Document and digest of a file: what it says, and all that it holds."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return json.loads(metadata["ether"]), metadata["sha256"]
