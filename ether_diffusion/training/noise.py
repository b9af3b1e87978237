"""How noise is added to latents and what is to be predicted: in discrete timesteps, or as a share (flow matching).

A level says how noisy a sample is: a timestep (a whole number) or σ, the share of noise (from 0 to 1). Levels (b,),
latents and noise (b, c, h, w).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from ether_diffusion.errors import InputError

PREDICTIONS = ("epsilon", "v_prediction")


class DiscreteNoise:
    """Discrete diffusion: √ᾱₜ·x + √(1 − ᾱₜ)·ε; the denoiser predicts ε, or the velocity √ᾱₜ·ε − √(1 − ᾱₜ)·x.

    Args:
        config: of the pipeline's scheduler, which is for sampling; training takes its noise schedule step by step.
        where: what the config is of, to begin an error message with.

    Raises:
        InputError: the config has no DDPM noise schedule, or the model predicts something else than noise or velocity.

    Sources: latent diffusion, arXiv:2112.10752; v targets, arXiv:2202.00512, appendix D.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "pipe"):
        if "beta_schedule" not in config:
            raise InputError(f"{where}: its scheduler has no beta_schedule; training covers DDPM noise schedules")
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise InputError(f"{where}: it predicts {prediction!r}, training covers {', '.join(PREDICTIONS)}")
        self.schedule = DDPMScheduler.from_config(config)
        self.predicts_velocity = prediction == "v_prediction"

    @property
    def count(self) -> int:
        """Number of timesteps."""
        return self.schedule.config.num_train_timesteps

    def draw(self, generator: torch.Generator, tokens: int) -> int:
        """A timestep for training, all alike; the size of the image has no part in it."""
        return int(torch.randint(self.count, (), generator=generator))

    def grid(self, count: int, tokens: int) -> list[int]:
        """The middles of so many equal parts of the schedule."""
        return [int((part + 0.5) * self.count / count) for part in range(count)]

    def add(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The latents at these timesteps, float32."""
        return self.schedule.add_noise(latents, noise, levels)

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the denoiser should answer, float32."""
        return self.schedule.get_velocity(latents, noise, levels) if self.predicts_velocity else noise

    def min_snr_weights(self, levels: Tensor, gamma: float) -> Tensor:
        """Weights of the losses at these timesteps (b,), float32.

        min(SNR, γ) / SNR for noise targets, min(SNR, γ) / (SNR + 1) for velocity targets, SNR = ᾱ / (1 − ᾱ).

        Source: Min-SNR, arXiv:2303.09556, section 3.4.
        """
        ratio = compute_snr(self.schedule, levels).float()
        if self.predicts_velocity:
            return ratio.clamp(max=gamma) / (ratio + 1)
        return (gamma / ratio).clamp(max=1)  # 1 as well where the SNR is 0, at the end of some schedules


class FlowNoise:
    """Flow matching: (1 − σ)·x + σ·ε; the denoiser predicts the velocity ε − x.

    σ = s·u / (1 + (s − 1)·u) with u drawn between 0 and 1. The shift s moves levels towards noise; large images need a
    larger one. By the scheduler it is fixed, or e^μ with μ linear in the number of tokens of the image.

    Args:
        config: of the pipeline's scheduler.
        sampling: "uniform", or "logit_normal", which draws the middle levels more often.
        shift: s; None takes the scheduler's, at the size of each image.

    Sources: SD3, arXiv:2403.03206, sections 3.1 and 5.3.2; the schedulers of diffusers.
    """

    def __init__(self, config: Mapping[str, Any], sampling: str = "logit_normal", shift: float | None = None):
        self.config, self.sampling, self.shift = config, sampling, shift

    def shift_at(self, tokens: int) -> float:
        """s for an image of so many tokens."""
        if self.shift is not None:
            return self.shift
        get = self.config.get
        if not get("use_dynamic_shifting", False):
            return get("shift") or get("flow_shift") or 1.0  # the latter: solvers that can also sample flows
        shifts, sizes = (get("base_shift", 0.5), get("max_shift", 1.15)), (256, 4096)
        sizes = (get("base_image_seq_len", sizes[0]), get("max_image_seq_len", sizes[1]))
        mu = shifts[0] + (shifts[1] - shifts[0]) * (tokens - sizes[0]) / (sizes[1] - sizes[0])
        return mu if get("time_shift_type", "exponential") == "linear" else math.exp(mu)

    def draw(self, generator: torch.Generator, tokens: int) -> float:
        """σ for training."""
        if self.sampling == "uniform":
            share = torch.rand((), generator=generator).item()
        else:
            share = torch.randn((), generator=generator).sigmoid().item()
        return self._shifted(share, tokens)

    def grid(self, count: int, tokens: int) -> list[float]:
        """So many levels, evenly spread before the shift."""
        return [self._shifted((part + 0.5) / count, tokens) for part in range(count)]

    def _shifted(self, share: float, tokens: int) -> float:
        shift = self.shift_at(tokens)
        return shift * share / (1 + (shift - 1) * share)

    def add(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The latents at these levels, float32."""
        share = levels.view(-1, 1, 1, 1)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the denoiser should answer, float32."""
        return noise - latents
