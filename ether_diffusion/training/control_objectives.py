"""The denoising objectives of control training: a light encoder's features, or a ControlNet's residuals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ControlNetModel
from torch import Tensor

from ether_diffusion.control.encoder import CONTROL, ControlEncoder, inject
from ether_diffusion.training.families import Family
from ether_diffusion.training.families.base import Conditioning
from ether_diffusion.training.objectives import DenoisingObjective, ImageSet, Sample

ENCODER, CONTROLNET = CONTROL, "controlnet"


def stacked_control(drawn: Sequence[Sample]) -> Tensor:
    """The control images of samples, (b, 3, height, width)."""
    return torch.stack([sample.control for sample in drawn])


class LightControlObjective(DenoisingObjective):
    """Denoise images under their captions, with the features of their control images after the UNet's conv_in.

    Args:
        family: the pipeline's family.
        encoder: of control images; trained.
        images, trained, snr_gamma: as for `DenoisingObjective`.

    Source: ETHER, arXiv:2405.20271, section 5.1.2, after OFT, arXiv:2306.07280.
    """

    def __init__(
        self,
        family: Family,
        encoder: ControlEncoder,
        images: ImageSet,
        *,
        trained: Sequence[str],
        snr_gamma: float | None = None,
    ):
        super().__init__(family, [images], trained=trained, snr_gamma=snr_gamma)
        self.components[ENCODER] = encoder

    def _predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, drawn: Sequence[Sample]
    ) -> Tensor:
        features = self.components[ENCODER](stacked_control(drawn))
        with inject(self.family.component(self.family.denoiser), features):
            return super()._predict(noisy, timesteps, conditioning, drawn)


class ControlNetObjective(DenoisingObjective):
    """Denoise images under their captions with a frozen UNet, to whose activations a ControlNet adds.

    Args:
        family: the pipeline's family.
        controlnet: holds all that is trained.
        images, snr_gamma: as for `DenoisingObjective`.

    Source: ControlNet, arXiv:2302.05543.
    """

    def __init__(
        self, family: Family, controlnet: ControlNetModel, images: ImageSet, *, snr_gamma: float | None = None
    ):
        super().__init__(family, [images], trained=(), snr_gamma=snr_gamma)
        self.components[CONTROLNET] = controlnet

    def _predict(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, drawn: Sequence[Sample]
    ) -> Tensor:
        controlnet = self.components[CONTROLNET]
        residuals = self.family.residuals(controlnet, noisy, timesteps, conditioning, stacked_control(drawn))
        return self.family.predict(noisy, timesteps, conditioning, **residuals)
