"""The denoising objective: what is trained on, and what is measured on pictures that were held out.

Axes: b samples, (c, h, w) latents.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from ether_diffusion.training.data import InstanceImages, View, center_square, center_view, frame, to_pixels
from ether_diffusion.training.families import Family, family_of
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.seeds import generator

_KEPT_VIEWS = 512


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, in float32: (b, c, h, w) twice to (b,).

    Raises:
        ValueError: the shapes differ; a broadcast would hide the mistake.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    return F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


class DreamBoothObjective(nn.Module):
    """Denoise views of the subject under the instance prompt.

    A module, so that one wrapper (precision, data parallel) holds all that is trained. `forward` takes the global
    indices of the samples; each draws its crop, mirroring, latents, noise and timestep from (seed, index) alone.

    Args:
        family: the pipeline's family; its components are on their device.
        images: the subject's pictures.
        trained: names of the components that are trained.
        seed: of the run.

    Source: DreamBooth, arXiv:2208.12242, without prior preservation.
    """

    def __init__(self, family: Family, images: InstanceImages, *, trained: Sequence[str], seed: int):
        super().__init__()
        self.family = family
        self.images = images
        self.seed = seed
        self.components = nn.ModuleDict({name: family.component(name) for name in trained})
        family.freeze_unused()
        self._moments: dict[View, Tensor] = {}
        self._fixed_conditioning: dict[str, Conditioning] = {}

    def forward(self, samples: Sequence[int]) -> Tensor:
        """The loss of each sample: (b,), float32.

        samples: global indices of the samples, b of them.
        """
        family = self.family
        device = next(self.components.parameters()).device
        views = [self.images.view(sample) for sample in samples]
        drawn = [self._draw(sample, view) for sample, view in zip(samples, views, strict=True)]
        latents, noise = (torch.stack(each).to(device) for each in (zip(*drawn, strict=True)))  # (b, c, h, w)
        timesteps = torch.tensor(
            [family.draw_timestep(generator(self.seed, "timestep", sample)) for sample in samples], device=device
        )
        noisy = family.add_noise(latents, noise, timesteps)
        conditioning = {
            **self._condition([self.images.prompt] * len(views)),
            **family.encode_framings([self.images.framing(view) for view in views]),
        }
        prediction = family.predict(noisy, timesteps, conditioning)
        return sample_losses(prediction, family.target(latents, noise, timesteps))

    def _draw(self, sample: int, view: View) -> tuple[Tensor, Tensor]:
        """Latents and noise of one sample, (c, h, w) each."""
        latents = self.family.make_latents(self._encode(view), generator(self.seed, "latents", sample))
        noise = torch.randn(latents.shape, generator=generator(self.seed, "noise", sample))
        return latents, noise.to(latents.device)

    @torch.no_grad()
    def _encode(self, view: View) -> Tensor:
        """The autoencoder's answer for a view, kept: with few pictures and crops most views come back.

        Views are encoded one by one, so that the result does not depend on the batch.
        """
        if view not in self._moments:
            if len(self._moments) >= _KEPT_VIEWS:
                del self._moments[next(iter(self._moments))]
            self._moments[view] = self.family.encode_pixels(self.images.pixels(view))
        return self._moments[view]

    def _condition(self, prompts: Sequence[str]) -> Conditioning:
        """The encoded prompts; computed once where no text encoder is trained."""
        if any(name in self.components for name in self.family.text_encoders):
            return self.family.encode_prompts(prompts)
        for prompt in prompts:
            if prompt not in self._fixed_conditioning:
                with torch.no_grad():
                    self._fixed_conditioning[prompt] = self.family.encode_prompts([prompt])
        return join_conditioning([self._fixed_conditioning[prompt] for prompt in prompts])


def join_conditioning(rows: Sequence[Conditioning]) -> Mapping[str, Tensor]:
    """The conditioning of several samples as one batch."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def denoising_loss(
    pipe: DiffusionPipeline,
    image: Image.Image,
    prompt: str,
    *,
    resolution: int | None = None,
    timesteps: int = 10,
    noises: int = 4,
    seed: int = 0,
    batch_size: int = 8,
) -> float:
    """How well the pipeline denoises one picture under a prompt: the training loss over a fixed grid.

    The mean over `timesteps` x `noises` of |target − prediction|² (mean over the latent's elements): timesteps at the
    middles of equal parts of the schedule, noises drawn from (seed, number of the noise), the latents the mean of the
    autoencoder's distribution. Nothing else is random, so two pipelines can be compared on equal terms.

    Args:
        pipe: a pipeline that a family covers, adapters active or not.
        image: any size; its central square is used.
        prompt: what the picture shows.
        resolution: side in pixels of the square. Default: the model's native size.
        timesteps: number of timesteps.
        noises: number of noises at each timestep.
        seed: of the noises.
        batch_size: predictions at a time.

    Returns:
        The loss, dimensionless; 1.0 is what an all-zero answer scores on epsilon targets.

    Raises:
        InputError: no family covers the pipeline.
        ValueError: an empty grid.
    """
    if timesteps < 1 or noises < 1 or batch_size < 1:
        raise ValueError(
            f"timesteps={timesteps}, noises={noises}, batch_size={batch_size}: each needs to be at least 1"
        )
    family = family_of(pipe)
    side = family.native_resolution if resolution is None else resolution
    latents = family.make_latents(family.encode_pixels(to_pixels(center_square(image, side))), None)  # (c, h, w)
    middles = [int((part + 0.5) * family.timestep_count / timesteps) for part in range(timesteps)]
    drawn = [torch.randn(latents.shape, generator=generator(seed, "held-out noise", each)) for each in range(noises)]
    grid = [(step, noise) for step in middles for noise in drawn]
    framing = frame(image.size, center_view(image.size, side), side)
    conditioning = {**family.encode_prompts([prompt]), **family.encode_framings([framing])}
    total = 0.0
    for start in range(0, len(grid), batch_size):
        part = grid[start : start + batch_size]
        steps = torch.tensor([step for step, _ in part], device=latents.device)
        noise = torch.stack([each for _, each in part]).to(latents.device)
        clean = latents.expand_as(noise)
        prediction = family.predict(
            family.add_noise(clean, noise, steps), steps, join_conditioning([conditioning] * len(part))
        )
        total += sample_losses(prediction, family.target(clean, noise, steps)).double().sum().item()
    return total / len(grid)
