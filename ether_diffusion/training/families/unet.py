"""What the UNet families share: CLIP text encoders, a KL autoencoder, a cross-attention UNet, discrete DDPM noise."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer

from ether_diffusion.errors import InputError
from ether_diffusion.latents import LatentSpace, side_factor
from ether_diffusion.training.families.base import Conditioning, Family
from ether_diffusion.training.families.quantization import loading_config, quantize_loaded
from ether_diffusion.training.families.source import Blueprint, ModelSource, parameter_counts
from ether_diffusion.training.noise import DiscreteNoise
from ether_diffusion.training.options.run import GUIDANCE_SCALE


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
        encoder_classes: the components that encode prompts, name -> class.
        loading: what `from_pretrained` is told besides.
        vae_precision: of the autoencoder's arithmetic; None leaves that of its weights.

    Source: latent diffusion, arXiv:2112.10752.
    """

    denoiser = "unet"
    encoder_classes: ClassVar[Mapping[str, type[nn.Module]]]
    loading: ClassVar[Mapping[str, Any]] = {}
    vae_precision: ClassVar[torch.dtype | None] = None

    def __init_subclass__(cls) -> None:
        cls.text_encoders = cls.trained_text_encoders = tuple(cls.encoder_classes)

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        self.noise = DiscreteNoise(pipe.scheduler.config)
        self.latents = LatentSpace(lambda: pipe.vae, self.vae_precision)

    @classmethod
    def read_blueprint(cls, source: ModelSource) -> Blueprint:
        """The pipeline without weights. Raises `InputError` where training does not cover this pipeline."""
        index = source.config()
        for component, kind in {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **cls.encoder_classes}.items():
            arrived = (index.get(component) or [None, None])[1]
            if arrived != kind.__name__:
                raise InputError(f"{source.given}: its {component} is a {arrived}, needs a {kind.__name__}")
        with source.reading():
            noise = DiscreteNoise(source.config("scheduler", DDPMScheduler), source.given)
        with source.reading(), torch.device("meta"):
            models = {"unet": UNet2DConditionModel.from_config(source.config("unet", UNet2DConditionModel))}
            for name, kind in cls.encoder_classes.items():
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
            cls.try_out(models, vae, noise, source.given)
        factor, counts = side_factor(vae), parameter_counts({**models, "vae": vae})
        return Blueprint(models, latent_side(models["unet"], source.given) * factor, factor, counts)

    @classmethod
    def added_conditions(cls, models: Mapping[str, nn.Module], where: str) -> dict[str, Any]:
        """What else the UNet takes, without data, as keyword arguments; nothing unless the family says so.

        Raises:
            InputError: the models do not go together; begins with `where`.
        """
        return {}

    @classmethod
    @torch.no_grad()
    def try_out(cls, models: Mapping[str, nn.Module], vae: AutoencoderKL, noise: DiscreteNoise, where: str) -> None:
        """Pass an image without data through the models without weights: configs can say what no check foresees.

        Raises:
            Exception: whatever the libraries raise where a part fails, or two do not go together.
        """
        side, space = 8 * side_factor(vae), LatentSpace(lambda: vae)
        with torch.device("meta"):
            latents = space.draw(space.encode(torch.empty(3, side, side)), None)[None]
            width = sum(models[name].config.hidden_size for name in cls.text_encoders)
            for name in cls.text_encoders:
                models[name](torch.zeros(1, 2, dtype=torch.long))
            conditions = {"encoder_hidden_states": torch.empty(1, 2, width), **cls.added_conditions(models, where)}
            answer = models["unet"](latents, torch.zeros(1), **conditions).sample
            space.decode(answer)
        if answer.shape != latents.shape:
            raise ValueError(f"its UNet answers {tuple(answer.shape)} to latents of {tuple(latents.shape)}")
        one = torch.ones(1)
        noisy = noise.add(one, one, torch.tensor([noise.count - 1]))
        if not torch.isfinite(noisy).all():
            raise ValueError("its scheduler's noise is not finite")

    @classmethod
    def load(cls, source: ModelSource, dtype: torch.dtype, quantize: str | None = None) -> "UNetFamily":
        """The pipeline, of one dtype, the UNet quantised if asked. Raises `InputError` where it cannot be read."""
        kind, config = getattr(diffusers, cls.pipeline_class), loading_config(quantize, dtype)
        with source.reading():
            more = {**source.own_parts(dtype), **cls.loading}
            if config is not None:
                more["quantization_config"] = PipelineQuantizationConfig(quant_mapping={"unet": config})
            if source.configs is not None:
                place = {"config": source.configs, "local_files_only": True}
                pipe = kind.from_single_file(source.path, torch_dtype=dtype, **place, **more)
            else:
                place = {"revision": source.revision, "variant": source.variant}
                pipe = kind.from_pretrained(source.path, dtype=dtype, **place, **more)
            for name, component in pipe.components.items():
                if isinstance(component, nn.Module) and any(each.is_meta for each in component.parameters()):
                    raise ValueError(f"its {name} lacks weights that its config asks for")
        quantize_loaded(pipe.unet, quantize, dtype)
        return cls(pipe)

    @property
    def native_resolution(self) -> int:
        """Side in pixels of the images that the denoiser was made for."""
        return latent_side(self.pipe.unet, "pipe") * self.pipe.vae_scale_factor

    def generate(self, prompts: Sequence[str], **inputs: Any) -> Any:
        if "guidance_scale" in inputs and inputs["guidance_scale"] is None:
            inputs["guidance_scale"] = GUIDANCE_SCALE
        return super().generate(prompts, **inputs)

    def predict(self, noisy: Tensor, levels: Tensor, conditioning: Sequence[Conditioning], **residuals: Any) -> Tensor:
        """What the UNet answers, in the shape of the latents.

        Args:
            noisy: latents with noise.
            levels: the timestep of each, (b,).
            conditioning: of each, of its prompt and its framing.
            residuals: from a ControlNet.
        """
        unet = self.pipe.unet
        return unet(noisy.to(unet.dtype), levels, **self.arguments(conditioning), **residuals).sample

    def residuals(
        self,
        controlnet: ControlNetModel,
        noisy: Tensor,
        levels: Tensor,
        conditioning: Sequence[Conditioning],
        control: Tensor,
    ) -> dict[str, Any]:
        """What a ControlNet adds to the UNet's activations, as `predict` takes it.

        control: the control images (b, 3, height, width), from 0 to 1.
        """
        dtype = self.pipe.unet.dtype
        down, middle = controlnet(
            noisy.to(dtype),
            levels,
            controlnet_cond=control.to(dtype),
            return_dict=False,
            **self.arguments(conditioning),
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
