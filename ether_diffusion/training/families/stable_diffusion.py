"""Stable Diffusion 1 and 2: one CLIP text encoder, a KL autoencoder, a cross-attention UNet, discrete DDPM noise."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ether_diffusion.training.families.base import Blueprint, Conditioning, Family, ModelSource
from ether_diffusion.training.options import InputError

PREDICTIONS = ("epsilon", "v_prediction")


class StableDiffusion(Family):
    """Latent diffusion with epsilon or v targets, by the pipeline's own scheduler config.

    Sources: latent diffusion, arXiv:2112.10752; v targets, arXiv:2202.00512, appendix D.
    """

    pipeline_class = StableDiffusionPipeline
    denoiser = "unet"
    text_encoders = ("text_encoder",)

    def __init__(self, pipe: StableDiffusionPipeline):
        super().__init__(pipe)
        # The pipeline's scheduler is for sampling; training needs the same noise schedule, step by step.
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)

    @classmethod
    def read_blueprint(cls, source: ModelSource) -> Blueprint:
        index = source.config()
        for component, kind in {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
        }.items():
            arrived = (index.get(component) or [None, None])[1]
            if arrived != kind.__name__:
                raise InputError(f"{source.given}: its {component} is a {arrived}, needs a {kind.__name__}")
        unet_config = source.config("unet", UNet2DConditionModel)
        vae_config = source.config("vae", AutoencoderKL)
        prediction = source.config("scheduler", DDPMScheduler).get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise InputError(f"{source.given}: it predicts {prediction!r}, training covers {', '.join(PREDICTIONS)}")
        with source.reading(), torch.device("meta"):
            text_config = CLIPTextConfig.from_pretrained(
                source.path, subfolder="text_encoder", revision=source.revision
            )
            models = {
                "unet": UNet2DConditionModel.from_config(unet_config),
                "text_encoder": CLIPTextModel(text_config),
            }
            vae = AutoencoderKL.from_config(vae_config)
        if models["unet"].config.in_channels != vae.config.latent_channels:
            raise InputError(
                f"{source.given}: the UNet takes {models['unet'].config.in_channels} channels and the autoencoder "
                f"makes {vae.config.latent_channels}; training needs the two to agree"
            )
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return Blueprint(models, models["unet"].config.sample_size * factor, factor)

    @classmethod
    def load(cls, source: ModelSource, dtype: torch.dtype) -> "StableDiffusion":
        arguments: dict[str, Any] = {"revision": source.revision, "variant": source.variant}
        with source.reading():
            # The safety checker is left out: it costs 1.2 GB and has no part in training.
            pipe = StableDiffusionPipeline.from_pretrained(
                source.path, dtype=dtype, safety_checker=None, requires_safety_checker=False, **arguments
            )
        return cls(pipe)

    @property
    def native_resolution(self) -> int:
        return self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor

    @property
    def timestep_count(self) -> int:
        return self.schedule.config.num_train_timesteps

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        states, _ = self.pipe.encode_prompt(
            list(prompts), self.pipe.text_encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states}  # (b, tokens, width)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        vae = self.pipe.vae
        encoded = vae.encode(pixels[None].to(vae.device, vae.dtype))
        return encoded.latent_dist.parameters[0].float()

    def make_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        distribution = DiagonalGaussianDistribution(moments[None])
        latents = distribution.mode() if generator is None else distribution.sample(generator)
        shift = getattr(self.pipe.vae.config, "shift_factor", None) or 0.0
        return (latents[0] - shift) * self.pipe.vae.config.scaling_factor

    def draw_timestep(self, generator: torch.Generator) -> int:
        return int(torch.randint(self.timestep_count, (), generator=generator))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        return noise

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        unet = self.pipe.unet
        states = conditioning["encoder_hidden_states"].to(unet.dtype)
        return unet(noisy.to(unet.dtype), timesteps, encoder_hidden_states=states).sample
