"""How well a pipeline denoises images that it was not trained on."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.images import to_pixels
from ether_diffusion.training.data.views import center_cut, frame, place_view
from ether_diffusion.training.families import family_of
from ether_diffusion.training.objectives import sample_losses
from ether_diffusion.training.seeds import generator


@torch.no_grad()
def denoising_loss(
    pipe: DiffusionPipeline,
    image: Image.Image,
    prompt: str,
    *,
    timesteps: int = 10,
    noises: int = 4,
    seed: int = 0,
    batch_size: int = 8,
) -> float:
    """How well the pipeline denoises one image under a prompt: the training loss over a fixed grid.

    The mean over `timesteps` x `noises` of |target − prediction|² (mean over the latent's elements): timesteps at the
    middles of equal parts of the schedule, noises drawn from (seed, number of the noise), the latents the mean of the
    autoencoder's distribution. Of flow matching, levels are the middles of equal parts of [0, 1] under the scheduler's
    shift, and the target is the velocity. Nothing else is random, so two pipelines can be compared on equal terms.

    Args:
        pipe: a pipeline that a family covers, adapters active or not.
        image: any size; its central square is used, at the model's native size.
        prompt: what the image shows.
        timesteps: number of timesteps or levels.
        noises: number of noises at each timestep.
        seed: of the noises.
        batch_size: predictions at a time.

    Returns:
        The loss, dimensionless; 1.0 is what an all-zero answer scores on epsilon targets, 1 more than the mean square
        of the latents on velocities of flow matching.

    Raises:
        InputError: no family covers the pipeline.
        ValueError: an empty grid.
    """
    if min(timesteps, noises, batch_size) < 1:
        raise ValueError(f"{timesteps=}, {noises=}, {batch_size=}: each needs to be at least 1")
    family = family_of(pipe)
    target = (family.native_resolution,) * 2
    latents = family.latents.draw(family.latents.encode(to_pixels(center_cut(image, target))), None)  # (c, h, w)
    levels = family.noise.grid(timesteps, family.token_count(target))
    drawn = [torch.randn(latents.shape, generator=generator(seed, "held-out noise", each)) for each in range(noises)]
    grid = [(step, noise) for step in levels for noise in drawn]
    framing = frame(image.size, place_view(0, image.size, target, None), target)
    conditioning = {**family.encode_prompts([prompt])[0], **family.encode_framings([framing])[0]}
    total = 0.0
    for start in range(0, len(grid), batch_size):
        part = grid[start : start + batch_size]
        steps = torch.tensor([step for step, _ in part], device=latents.device)
        noise = torch.stack([each for _, each in part]).to(latents.device)
        clean = latents.expand_as(noise)
        prediction = family.predict(family.noise.add(clean, noise, steps), steps, [conditioning] * len(part))
        total += sample_losses(prediction, family.noise.target(clean, noise, steps)).double().sum().item()
    return total / len(grid)
