"""Images as latents and back, by what the autoencoder itself has: the same for every family."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ether_diffusion.tokens import PATCH, join_patches, split_patches


class LatentSpace:
    """The latents of an autoencoder, normalised as its denoiser sees them: (c, h, w) for one image.

    Four kinds of autoencoder, told apart by what they have:

    - means and deviations of each channel (Qwen-Image), and an axis of frames, which is 1 for images;
    - running statistics of a batch norm (FLUX.2): latents are means of distributions, 2×2 patches of them normalised;
    - an encoder without a distribution (the deep compression autoencoder of Sana);
    - a scale, and in newer models a shift.

    Args:
        get_vae: gives the autoencoder, which need not be in memory between two calls.
        precision: of its arithmetic; None leaves that of its weights.
    """

    def __init__(self, get_vae: Callable[[], nn.Module], precision: torch.dtype | None = None):
        self.get_vae, self.precision = get_vae, precision
        vae = get_vae()
        config = vae.config
        self.has_frames = getattr(config, "z_dim", None) is not None
        self.has_patches = isinstance(getattr(vae, "bn", None), nn.BatchNorm2d)
        self.is_deterministic = isinstance(vae, AutoencoderDC)
        if self.has_patches:
            self.offset = vae.bn.running_mean.float().view(-1, 1, 1)
            self.deviation = (vae.bn.running_var.float() + config.batch_norm_eps).sqrt().view(-1, 1, 1)
        elif self.has_frames:
            self.offset = torch.tensor(config.latents_mean).view(-1, 1, 1)
            self.deviation = torch.tensor(config.latents_std).view(-1, 1, 1)
        else:
            self.shift, self.scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    def encode(self, pixels: Tensor, device: torch.device | None = None) -> Tensor:
        """One image (3, height, width), from -1 to 1, as what its latents are drawn from, float32.

        That is the parameters of a distribution (2c, h, w), or the latents where the autoencoder has none.

        device: where the autoencoder computes, if its weights wait elsewhere.
        """
        with self._in_precision() as vae:
            pixels = pixels[None].to(device or vae.device, vae.dtype)
            encoded = vae.encode(pixels[:, :, None] if self.has_frames else pixels)
        if hasattr(encoded, "latent"):
            return encoded.latent[0].float()
        parameters = encoded.latent_dist.parameters[0].float()
        return parameters[:, 0] if self.has_frames else parameters

    def draw(self, statistics: Tensor, generator: torch.Generator | None) -> Tensor:
        """Latents (c, h, w), float32, drawn from what `encode` gave; their mean where generator is None."""
        if self.is_deterministic:
            latents = statistics
        else:
            distribution = DiagonalGaussianDistribution(statistics[None])
            # The batch norm of FLUX.2 was trained on means.
            mean = generator is None or self.has_patches
            latents = (distribution.mode() if mean else distribution.sample(generator))[0]
        if self.has_patches:
            latents = split_patches(latents[None])[0]
        if self.has_patches or self.has_frames:
            return (latents - self.offset.to(latents.device)) / self.deviation.to(latents.device)
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, height, width), from -1 to 1, of latents (b, c, h, w)."""
        if self.has_patches or self.has_frames:
            latents = latents * self.deviation.to(latents.device) + self.offset.to(latents.device)
        else:
            latents = latents / self.scale + self.shift
        if self.has_patches:
            latents = join_patches(latents)
        with self._in_precision() as vae:
            latents = latents.to(vae.device, vae.dtype)
            if self.has_frames:
                return vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]
            return vae.decode(latents, return_dict=False)[0]

    @contextmanager
    def _in_precision(self) -> Iterator[nn.Module]:
        """A context with the autoencoder in the precision of its arithmetic."""
        vae = self.get_vae()
        if self.precision is None:
            yield vae
            return
        dtype = vae.dtype
        nn.Module.to(vae, self.precision)  # `ModelMixin.to` would log a warning at every change of dtype
        try:
            with torch.autocast(vae.device.type, enabled=False):
                yield vae
        finally:
            nn.Module.to(vae, dtype)


def latents_factor(vae: nn.Module) -> int:
    """How many times smaller a side of the latents is, as the denoiser sees them: 2×2 patches count as one."""
    return side_factor(vae) * (PATCH if isinstance(getattr(vae, "bn", None), nn.BatchNorm2d) else 1)


def side_factor(vae: nn.Module) -> int:
    """How many times smaller an autoencoder makes a side."""
    config = vae.config
    if getattr(config, "temperal_downsample", None) is not None:
        return 2 ** len(config.temperal_downsample)
    widths = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
    return 2 ** (len(widths) - 1)
