"""Images as latents and back, by what the autoencoder itself has: the same for every family."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from ether_diffusion.training.tokens import join_patches, split_patches


class LatentSpace:
    """The latents of an autoencoder, normalised as its denoiser sees them: (c, h, w) for one image.

    Four kinds of autoencoder, told apart by what they have:

    - means and deviations of each channel (Qwen-Image), and an axis of frames, which is 1 for images;
    - running statistics of a batch norm (FLUX.2): latents are 2×2 patches, normalised, and the mean of the distribution;
    - an encoder without a distribution (the deep compression autoencoder of Sana);
    - a scale, and in newer models a shift.

    Args:
        vae: the autoencoder.
        precision: its arithmetic; None leaves that of its weights.
    """

    def __init__(self, vae: nn.Module, precision: torch.dtype | None = None):
        self.vae, self.precision = vae, precision
        self.has_frames = getattr(vae.config, "latents_mean", None) is not None and hasattr(vae.config, "z_dim")
        self.has_patches = isinstance(getattr(vae, "bn", None), nn.BatchNorm2d)
        self.is_deterministic = isinstance(vae, AutoencoderDC)

    @property
    def factor(self) -> int:
        """How many times smaller the autoencoder makes a side."""
        config = self.vae.config
        if self.has_frames:
            return 2 ** len(config.temperal_downsample)
        widths = config.encoder_block_out_channels if self.is_deterministic else config.block_out_channels
        return 2 ** (len(widths) - 1)

    def encode(self, pixels: Tensor) -> Tensor:
        """One image (3, height, width), from -1 to 1, as what its latents are drawn from, float32.

        That is the parameters of a distribution (2c, h, w), or the latents where the autoencoder has none.
        """
        with self._in_precision():
            pixels = pixels[None].to(self.vae.device, self.vae.dtype)
            encoded = self.vae.encode(pixels[:, :, None] if self.has_frames else pixels)
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
        offset, factor = self._normalisation(latents)
        return (latents - offset) * factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (b, 3, height, width), from -1 to 1, of latents (b, c, h, w)."""
        offset, factor = self._normalisation(latents)
        latents = latents / factor + offset
        if self.has_patches:
            latents = join_patches(latents)
        with self._in_precision():
            latents = latents.to(self.vae.device, self.vae.dtype)
            if self.has_frames:
                return self.vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]
            return self.vae.decode(latents, return_dict=False)[0]

    def _normalisation(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is taken from latents, and what they are then multiplied by."""
        config, like = self.vae.config, {"device": latents.device, "dtype": latents.dtype}
        if self.has_patches:
            norm = self.vae.bn
            deviation = (norm.running_var.to(**like) + config.batch_norm_eps).sqrt()
            return norm.running_mean.to(**like).view(-1, 1, 1), 1 / deviation.view(-1, 1, 1)
        if self.has_frames:
            mean, deviation = (torch.tensor(each, **like) for each in (config.latents_mean, config.latents_std))
            return mean.view(-1, 1, 1), 1 / deviation.view(-1, 1, 1)
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    @contextmanager
    def _in_precision(self) -> Iterator[None]:
        if self.precision is None:
            yield
            return
        dtype = self.vae.dtype
        nn.Module.to(self.vae, self.precision)  # `ModelMixin.to` would log a warning at every change of dtype
        try:
            with torch.autocast(self.vae.device.type, enabled=False):
                yield
        finally:
            nn.Module.to(self.vae, dtype)
