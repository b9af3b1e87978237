"""Small pipelines of transformers with control encoders."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from helpers.flow_zoo import PIPELINES, make
from PIL import Image

from ether_diffusion import ControlEncoder, LatentControlEncoder, control_pipeline_class
from ether_diffusion.control.pipelines import over

NAMES = tuple(name for name in PIPELINES if name != "kontext")  # an editor takes images itself
REQUIRED = ("flux", "flux2", "klein", "sd3", "qwen")
IMAGE, OTHER = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for seed in (0, 1)
)


def make_control(name: str, folder, seed: int = 0) -> DiffusionPipeline:
    """One of the pipelines with light control, without an encoder yet."""
    stock = make(name, Path(tempfile.mkdtemp(dir=folder)), seed)
    stock.transformer.requires_grad_(False)  # as an adapter leaves it: PyTorch may round otherwise
    pipe = over(control_pipeline_class(type(stock)), stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_encoder(pipe: DiffusionPipeline, seed: int | None = 3, **options) -> LatentControlEncoder:
    """An encoder of latents that fits; without a seed, untrained."""
    return _drawn(LatentControlEncoder.for_denoiser(pipe.transformer, **options), seed)


def conv_encoder(pipe: DiffusionPipeline, seed: int | None = 3, **options) -> ControlEncoder:
    """An encoder of images that fits; without a seed, untrained."""
    return _drawn(ControlEncoder.for_denoiser(pipe.transformer, factor=pipe._token_side, **options), seed)


def _drawn(encoder, seed):
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval().requires_grad_(False)
