"""How a base model is asked for an image: its sizes, and guidance by the prompt, which differ between pipelines."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from ether_diffusion.control.pipelines import denoiser_name, is_number, native_sides
from ether_diffusion.demo.settings import Settings
from ether_diffusion.serving.checks import parameters_of
from ether_diffusion.training.families import guidance_argument


def sizes(pipe: DiffusionPipeline) -> tuple[int, int]:
    """A pipeline's own image size, and what sizes must be a multiple of, in pixels."""
    config = getattr(pipe, denoiser_name(pipe)).config
    if blocks := getattr(config, "block_out_channels", None):
        smallest = 2 ** (len(blocks) - 1)
    else:  # where the model does not cut latents into patches, its pipeline packs two by two of them
        smallest = max(2, getattr(config, "patch_size", 1))
    return native_sides(pipe)[0], getattr(pipe, "vae_scale_factor", 8) * smallest


def guidance(pipe: DiffusionPipeline) -> tuple[str, float]:
    """What a pipeline calls guidance by the prompt, and what to start with: of a transformer its pipeline's own."""
    argument = guidance_argument(pipe)
    own = parameters_of(pipe)[argument].default if argument in parameters_of(pipe) else None
    return argument, own if denoiser_name(pipe) == "transformer" and is_number(own) else Settings.guidance
