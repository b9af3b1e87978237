"""What the UNet families share: CLIP text encoders, a KL autoencoder, a cross-attention UNet, discrete DDPM noise."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from ether_diffusion.errors import InputError
from ether_diffusion.training.families.base import Conditioning, Family
from ether_diffusion.training.families.source import Blueprint, ModelSource

PREDICTIONS = ("epsilon", "v_prediction")


def training_schedule(config: Mapping[str, Any], where: str) -> DDPMScheduler:
    """The noise schedule of a sampling scheduler's config, step by step, as training needs it.

    Raises:
        InputError: the config has no DDPM noise schedule, or the model predicts something else than noise or velocity.
    """
    if "beta_schedule" not in config:
        raise InputError(f"{where}: its scheduler has no beta_schedule; training covers DDPM noise schedules")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise InputError(f"{where}: it predicts {prediction!r}, training covers {', '.join(PREDICTIONS)}")
    return DDPMScheduler.from_config(config)


def latent_side(unet: nn.Module, where: str) -> int:
    """Side of the latents that a UNet was made for; its config holds one number, or a pair.

    Raises:
        InputError: it holds neither, or two sides.
    """
    size = unet.config.sample_size
    sides = size if isinstance(size, (list, tuple)) and size else [size]
    if all(type(side) is int and side > 0 and side == sides[0] for side in sides):
        return sides[0]
    raise InputError(
        f"{where}: its UNet's config has sample_size {size!r}, needs one whole number from 1, such as 64 for images "
        "of 512 pixels"
    )


def scaled(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Latents of an autoencoder as its UNet knows them."""
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def _check_tokenizer(source: ModelSource, name: str, encoder: CLIPTextConfig) -> None:
    """Make sure that a tokenizer is there and that a text encoder knows all of its tokens."""
    where = f"{source.given}: its {name}"
    if not (source.config().get(name) or [None])[-1]:
        raise InputError(f"{where} is missing, and without it prompts cannot be read")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(**source.config_place, subfolder=name)
        ids = tokenizer("a photo", padding="max_length", max_length=encoder.max_position_embeddings).input_ids
        if max(ids) >= encoder.vocab_size or not isinstance(tokenizer.model_max_length, int):
            raise ValueError(f"it makes token {max(ids)} and texts of up to {tokenizer.model_max_length} tokens")
    except Exception as error:  # of many kinds
        raise InputError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without its files
        raise InputError(f"{where} is missing or has no vocabulary, and without it prompts cannot be read")
    if len(tokenizer) > encoder.vocab_size:
        raise InputError(f"{where} has {len(tokenizer)} tokens, and its text encoder knows {encoder.vocab_size}")
    if not 0 < tokenizer.model_max_length <= encoder.max_position_embeddings:
        raise InputError(
            f"{where} makes up to {tokenizer.model_max_length} tokens, and its text encoder takes "
            f"{encoder.max_position_embeddings}"
        )


class UNetFamily(Family):
    """Latent diffusion with epsilon or v targets, by the pipeline's own scheduler config.

    A family of this kind adds `encode_prompts`, and `arguments(conditioning)`: the conditioning as keyword arguments
    of the UNet and of a ControlNet.

    Class attributes:
        light_control_pipeline_class, controlnet_pipeline_class: our pipeline of a light encoder, and the stock one of
            a ControlNet, for this family.
        loading: what `from_pretrained` is told besides.

    Sources: latent diffusion, arXiv:2112.10752; v targets, arXiv:2202.00512, appendix D.
    """

    denoiser = "unet"
    light_control_pipeline_class: ClassVar[type[DiffusionPipeline]]
    controlnet_pipeline_class: ClassVar[type[DiffusionPipeline]]
    loading: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        # The pipeline's scheduler is for sampling; training needs the same noise schedule, step by step.
        self.schedule = training_schedule(pipe.scheduler.config, "pipe")

    @classmethod
    def read_blueprint(cls, source: ModelSource) -> Blueprint:
        """The pipeline without weights. Raises `InputError` where training does not cover this pipeline."""
        index = source.config()
        for component, kind in {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **cls.text_encoders}.items():
            arrived = (index.get(component) or [None, None])[1]
            if arrived != kind.__name__:
                raise InputError(f"{source.given}: its {component} is a {arrived}, needs a {kind.__name__}")
        with source.reading():
            schedule = training_schedule(source.config("scheduler", DDPMScheduler), source.given)
        with source.reading(), torch.device("meta"):
            models = {"unet": UNet2DConditionModel.from_config(source.config("unet", UNet2DConditionModel))}
            for name, kind in cls.text_encoders.items():
                config = CLIPTextConfig.from_pretrained(**source.config_place, subfolder=name)
                models[name] = kind(config)
        with source.reading_vae() if source.vae else source.reading(), torch.device("meta"):
            vae = AutoencoderKL.from_config(source.vae_config())
        source.check_variant({*models, *(() if source.vae else ("vae",))})
        if models["unet"].config.in_channels != vae.config.latent_channels:
            raise InputError(
                f"{source.given}: the UNet takes {models['unet'].config.in_channels} channels and the autoencoder "
                f"makes {vae.config.latent_channels}; training needs the two to agree"
            )
        for name in cls.text_encoders:
            _check_tokenizer(source, name.replace("text_encoder", "tokenizer"), models[name].config)
        with source.reading():
            cls.try_out(models, vae, schedule, source.given)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return Blueprint(models, latent_side(models["unet"], source.given) * factor, factor)

    @classmethod
    def added_conditions(cls, models: Mapping[str, nn.Module], where: str) -> dict[str, Any]:
        """What else the UNet takes, without data, as keyword arguments; nothing unless the family says so.

        Raises:
            InputError: the models do not go together; begins with `where`.
        """
        return {}

    @classmethod
    @torch.no_grad()
    def try_out(cls, models: Mapping[str, nn.Module], vae: AutoencoderKL, schedule: DDPMScheduler, where: str) -> None:
        """Pass an image without data through the models without weights: configs can say what no check foresees.

        Raises:
            Exception: whatever the libraries raise where a part fails, or two do not go together.
        """
        side = 8 * 2 ** (len(vae.config.block_out_channels) - 1)
        with torch.device("meta"):
            latents = vae.encode(torch.empty(1, 3, side, side)).latent_dist.mode()
            latents = scaled(latents, vae)
            width = sum(models[name].config.hidden_size for name in cls.text_encoders)
            for name in cls.text_encoders:
                models[name](torch.zeros(1, 2, dtype=torch.long))
            conditions = {"encoder_hidden_states": torch.empty(1, 2, width), **cls.added_conditions(models, where)}
            answer = models["unet"](latents, torch.zeros(1), **conditions).sample
            vae.decode(answer / vae.config.scaling_factor)
        if answer.shape != latents.shape:
            raise ValueError(f"its UNet answers {tuple(answer.shape)} to latents of {tuple(latents.shape)}")
        one = torch.ones(1)
        noisy = schedule.add_noise(one, one, torch.tensor([schedule.config.num_train_timesteps - 1]))
        if not torch.isfinite(noisy).all():
            raise ValueError("its scheduler's noise is not finite")

    @classmethod
    def load(cls, source: ModelSource, dtype: torch.dtype) -> "UNetFamily":
        """The pipeline with its weights, all of one dtype. Raises `InputError` where it cannot be read."""
        with source.reading():
            more = {**source.own_parts(dtype), **cls.loading}
            if source.configs is not None:
                place = {"config": source.configs, "local_files_only": True}
                pipe = cls.pipeline_class.from_single_file(source.path, torch_dtype=dtype, **place, **more)
            else:
                place = {"revision": source.revision, "variant": source.variant}
                pipe = cls.pipeline_class.from_pretrained(source.path, dtype=dtype, **place, **more)
            for name, component in pipe.components.items():
                if isinstance(component, nn.Module) and any(each.is_meta for each in component.parameters()):
                    raise ValueError(f"its {name} lacks weights that its config asks for")
        return cls(pipe)

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the images that the denoiser was made for."""
        return latent_side(self.pipe.unet, "pipe") * self.pipe.vae_scale_factor

    @property
    def timestep_count(self) -> int:
        """Number of timesteps of the training schedule."""
        return self.schedule.config.num_train_timesteps

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """One image (3, h, w) as the autoencoder's distribution: its parameters, (2c, h', w'), float32."""
        vae = self.pipe.vae
        encoded = vae.encode(pixels[None].to(vae.device, vae.dtype))
        return encoded.latent_dist.parameters[0].float()

    def make_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Scaled latents (c, h', w'), float32, drawn from one distribution, or its mean where generator is None."""
        distribution = DiagonalGaussianDistribution(moments[None])
        latents = distribution.mode() if generator is None else distribution.sample(generator)
        return scaled(latents[0], self.pipe.vae)

    def draw_timestep(self, generator: torch.Generator) -> int:
        """A timestep for training, all alike."""
        return int(torch.randint(self.timestep_count, (), generator=generator))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The latents at these timesteps (b,), float32."""
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should answer, float32."""
        if self.schedule.config.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        return noise

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Weights of the losses at these timesteps (b,), float32.

        min(SNR, γ) / SNR for noise targets, min(SNR, γ) / (SNR + 1) for velocity targets, SNR = ᾱ / (1 − ᾱ).

        Source: Min-SNR, arXiv:2303.09556, section 3.4.
        """
        ratio = compute_snr(self.schedule, timesteps).float()
        if self.schedule.config.prediction_type == "v_prediction":
            return ratio.clamp(max=gamma) / (ratio + 1)
        return (gamma / ratio).clamp(max=1)  # 1 as well where the SNR is 0, at the end of some schedules

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, **residuals: Any) -> Tensor:
        """What the UNet answers, in the shape of the latents.

        Args:
            noisy: latents with noise.
            timesteps: of each, (b,).
            conditioning: of prompts and of framings, in one mapping.
            residuals: from a ControlNet.
        """
        unet = self.pipe.unet
        return unet(noisy.to(unet.dtype), timesteps, **self.arguments(conditioning), **residuals).sample

    def residuals(
        self,
        controlnet: ControlNetModel,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Tensor,
    ) -> dict[str, Any]:
        """What a ControlNet adds to the UNet's activations, as `predict` takes it.

        control: the control images (b, 3, height, width), from 0 to 1.
        """
        dtype = self.pipe.unet.dtype
        down, middle = controlnet(
            noisy.to(dtype),
            timesteps,
            controlnet_cond=control.to(dtype),
            return_dict=False,
            **self.arguments(conditioning),
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
